"""How far is the value of a policy, told from another one's logs, from its true value?

The messages and topics of banking77: 77 possible answers, one of them right, so the true value of any policy is a sum.
A logging policy (a softmax over topics that learned from 5 labels of each, with a tenth of its answers anywhere)
answers messages of people who come again; 60% of answers get a thumb, 5% of thumbs say the opposite. Ten policies are
judged by that log alone: by plain importance sampling and by what 'everloop evaluate' prints. The reward model behind
the doubly robust estimate is the platform's own; it has learned from an earlier log, of other messages.

One of the ten says what the logging policy hardly ever says. There the right output is no number.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from everloop.config import RewardConfig
from everloop.errors import NotEnoughData
from numpy.typing import NDArray

from benchmarks import _report
from pipelines.offpolicy import Evaluation, Logged, evaluate
from reward.encoder import Encoder
from reward.features import Example
from reward.model import Label, RewardModel

LABELS = 5  # a topic, of the logging policy
ANYWHERE = 0.1  # of its answers
FLIPPED, RATED = 0.05, 0.6
PEOPLE = 800  # who send all messages of a log
OWN = 4  # answers of the candidate's own that the reward model judges for each message, as by default
CHUNK = 20_000  # pairs that the reward model judges at once
Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Desk:
    """Messages with their unit vectors and right topics: ``held`` are judged on, the others are learned from."""

    topics: list[str]
    texts: list[str]
    vectors: Floats
    right: Whole
    held_texts: list[str]
    held: Floats
    held_right: Whole


def desk(folder: Path, encoder: Encoder, most: int) -> Desk:
    """At most so many messages of each part, evenly over the file."""
    parts = [_messages(folder / "banking77" / name, most) for name in ("train.csv", "test.csv")]
    topics = sorted({topic for part in parts for _, topic in part})
    number = {topic: i for i, topic in enumerate(topics)}
    texts = [[text for text, _ in part] for part in parts]
    vectors = [encoder.encode(its).astype(np.float64) for its in texts]
    right = [np.array([number[topic] for _, topic in part]) for part in parts]
    return Desk(topics, texts[0], vectors[0], right[0], texts[1], vectors[1], right[1])


def _messages(path: Path, most: int) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    return rows[:: max(1, len(rows) // most)][:most]


def learned(vectors: Floats, topics: Whole, many: int, steps: int = 100) -> Floats:
    """Weights (dimensions, topics) of a softmax regression, by gradient descent with momentum."""
    weights = np.zeros((vectors.shape[1], many), np.float32)
    vectors, right = vectors.astype(np.float32), np.eye(many, dtype=np.float32)[topics]
    speed = np.zeros_like(weights)
    for _ in range(steps):
        error = softmax(vectors @ weights) - right
        speed = 0.9 * speed - 8.0 * (vectors.T @ error / len(topics) + 1e-4 * weights)
        weights += speed
    return weights


def softmax(scores: Floats) -> Floats:
    grown = np.exp(scores - scores.max(axis=1, keepdims=True))
    made: Floats = grown / grown.sum(axis=1, keepdims=True)
    return made


def nearly(choice: Whole, many: int, sure: float = 0.99) -> Floats:
    """A policy that gives one answer nearly always, and each other one with the same small probability."""
    spread = (1 - sure) / (many - 1)
    return np.where(np.eye(many, dtype=bool)[choice], sure, spread)


def first_of_each(topics: Whole, count: int) -> Whole:
    """Where the first so many messages of each topic stand."""
    return np.sort(np.concatenate([np.flatnonzero(topics == topic)[:count] for topic in np.unique(topics)]))


@dataclass(frozen=True)
class Policies:
    """Probabilities (messages, topics) on the held messages, and of the logging policy on the others as well."""

    logging: Floats
    logging_before: Floats
    targets: dict[str, Floats]


def policies(world: Desk) -> Policies:
    """The logging policy and the ten that are judged, from near to far."""
    many = len(world.topics)
    taught = {count: first_of_each(world.right, count) for count in (1, LABELS, 2 * LABELS, 10_000)}
    weights = {count: learned(world.vectors[at], world.right[at], many) for count, at in taught.items()}
    wrong = world.right[taught[LABELS]].copy()
    wrong[::3] = (wrong[::3] + 1) % many
    confused = learned(world.vectors[taught[LABELS]], wrong, many)

    def says(count: int, sharpness: float = 1.0, on: Floats = world.held) -> Floats:
        return softmax(sharpness * (on @ weights[count]))

    logging, before = ((1 - ANYWHERE) * says(LABELS, on=on) + ANYWHERE / many for on in (world.held, world.vectors))
    targets = {
        "the same, without what it says anywhere": says(LABELS),
        "the same, twice as sharp": says(LABELS, 2.0),
        "the same, nearly always its likeliest": nearly(logging.argmax(axis=1), many),
        "learned from 10 labels a topic": says(2 * LABELS),
        "learned from all labels": says(10_000),
        "learned from all, nearly always its likeliest": nearly(says(10_000).argmax(axis=1), many),
        "learned from 1 label a topic": says(1),
        "learned from labels of which a third is wrong": softmax(world.held @ confused),
        "any topic, whatever the message": np.full_like(logging, 1 / many),
        "what the logging policy says least": nearly(logging.argmin(axis=1), many),
    }
    return Policies(logging, before, targets)


def drawn(random: np.random.Generator, chances: Floats) -> Whole:
    """One answer for each row of probabilities."""
    cumulative = chances.cumsum(axis=1)
    at = random.random(len(chances))[:, None] * cumulative[:, -1:]
    return np.minimum((cumulative < at).sum(axis=1), chances.shape[1] - 1)


def thumbs(random: np.random.Generator, good: NDArray[np.bool_]) -> Floats:
    """What people say: 1, 0, or nan where they say nothing."""
    said = np.where(random.random(good.size) < FLIPPED, ~good, good).astype(np.float64)
    return np.where(random.random(good.size) < RATED, said, np.nan)


def opinions(world: Desk, before: Floats, encoder: Encoder) -> Floats:
    """What the reward model expects of every answer to the held messages, (messages, topics); it has learned from the
    earlier log."""
    random = np.random.default_rng(77)
    model = RewardModel(RewardConfig(), encoder)
    answers = drawn(random, before)
    said = thumbs(random, answers == world.right)
    for at in np.flatnonzero(~np.isnan(said)):
        example = Example(world.texts[at], world.topics[answers[at]])
        model.learn([Label(str(at), example, float(said[at]))])
    pairs = [Example(text, topic) for text in world.held_texts for topic in world.topics]
    parts = [pairs[start : start + CHUNK] for start in range(0, len(pairs), CHUNK)]
    values = [model.calibration.heard(one.value) for part in parts for one in model.estimate(part)]
    return np.array(values).reshape(len(world.held_texts), len(world.topics))


def true_value(chances: Floats, right: Whole) -> float:
    """The mean thumb that a policy would get, exactly."""
    good = chances[np.arange(len(right)), right].mean()
    return float(good * (1 - FLIPPED) + (1 - good) * FLIPPED)


@dataclass(frozen=True)
class Log:
    """Messages by their number, who sent them, what was answered and what was said of it."""

    asked: Whole
    who: Whole
    answers: Whole
    said: Floats


def one_log(world: Desk, made: Policies, random: np.random.Generator) -> Log:
    """As many messages as there are, drawn with replacement. Some people send many."""
    asked = random.integers(len(world.held), size=len(world.held))
    habit = random.lognormal(0, 1, PEOPLE)
    who = random.choice(PEOPLE, size=len(asked), p=habit / habit.sum())
    answers = drawn(random, made.logging[asked])
    return Log(asked, who, answers, thumbs(random, answers == world.held_right[asked]))


def judged(log: Log, made: Policies, target: Floats, values: Floats, random: np.random.Generator) -> Evaluation:
    """A policy by a log, with some answers of its own that the reward model judges."""
    own = [values[log.asked, drawn(random, target[log.asked])] for _ in range(OWN)]
    return evaluate(
        Logged.of(
            reward=log.said,
            behaviour=np.log(made.logging[log.asked, log.answers]),
            candidate=np.log(target[log.asked, log.answers]),
            cluster=log.who,
            predicted=values[log.asked, log.answers],
            expected=np.mean(own, axis=0),
        )
    )


def plain(log: Log, made: Policies, target: Floats) -> float:
    """Importance sampling as it stands in the books, also where there is hardly any overlap."""
    rated = ~np.isnan(log.said)
    at = log.asked[rated], log.answers[rated]
    return float((target[at] / made.logging[at] * log.said[rated]).mean())


def _row(name: str, true: float, found: Sequence[Evaluation], plain: Sequence[float]) -> dict[str, Any]:
    """Root mean square errors over the logs; of the last two over those in which a number was given."""
    given = [one for one in found if one.overlap.lacks is None]

    def error(values: Sequence[float]) -> float | None:
        return float(np.sqrt(np.mean((np.array(values) - true) ** 2))) if values else None

    best = [one.best for one in given if one.best is not None]
    return {
        "policy": name,
        "true value": round(true, 4),
        "ess": round(float(np.median([one.overlap.ess for one in found])), 1),
        "a number in": len(given) / len(found),
        "error, plain": error(plain),
        "error, self-normalised": error([one.snips.value for one in given if one.snips is not None]),
        "error, doubly robust": error([one.value for one in best]),
        "half width": float(np.mean([(one.high - one.low) / 2 for one in best])) if best else None,
        "interval holds it": float(np.mean([one.low <= true <= one.high for one in best])) if best else None,
    }


def measure(world: Desk, encoder: Encoder, logs: int) -> tuple[list[dict[str, Any]], list[_report.Aim]]:
    """The table and the aims, over so many logs."""
    made = policies(world)
    values = opinions(world, made.logging_before, encoder)
    found: dict[str, list[Evaluation]] = {name: [] for name in made.targets}
    beside: dict[str, list[float]] = {name: [] for name in made.targets}
    for seed in range(logs):
        random = np.random.default_rng(seed)
        log = one_log(world, made, random)
        for name, target in made.targets.items():
            found[name].append(judged(log, made, target, values, random))
            beside[name].append(plain(log, made, target))
    rows = [
        _row(name, true_value(target, world.held_right), found[name], beside[name])
        for name, target in made.targets.items()
    ]
    return rows, _aims(rows)


def _aims(rows: Sequence[dict[str, Any]]) -> list[_report.Aim]:
    """A policy whose value is not told in every log does not count as told better."""
    better = [row["a number in"] == 1 and row["error, doubly robust"] < row["error, plain"] for row in rows]
    held = [row["interval holds it"] for row in rows if row["interval holds it"] is not None]
    return [
        _report.aim("policies of ten with a smaller error than plain importance sampling", 9, sum(better)),
        _report.aim(
            "logs in which the one without overlap gets a number, share", 0, rows[-1]["a number in"], most=True
        ),
        _report.aim("share of 95% intervals that hold the true value, of all policies", 0.95, float(np.mean(held))),
    ]


def main() -> int:
    options = _report.parser("error of off-policy estimates against the true value of ten policies").parse_args()
    data = os.environ.get("EVERLOOP_DATA")
    if not data:
        raise NotEnoughData("banking77 is needed: set EVERLOOP_DATA to the folder that has banking77/ in it")
    began, load = time.monotonic(), _report.load()
    encoder = Encoder()
    world = desk(Path(data), encoder, 1540 if options.quick else 3080)
    logs = 10 if options.quick else 40
    rows, aims = measure(world, encoder, logs)
    notes = [
        f"{logs} logs of {len(world.held):,} messages by {PEOPLE} people, {RATED:.0%} rated, {FLIPPED:.0%} of thumbs "
        f"wrong; errors are root mean squares over the logs; {OWN} own answers a message for doubly robust",
        f"took {time.monotonic() - began:.0f} s; {_report.loads(load)}",
    ]
    _report.publish("offpolicy", rows, aims, quick=options.quick, notes=notes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
