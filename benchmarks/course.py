"""How early the reward model foretells how an episode ends, beside its opinion of the answer and the count of turns.

200 recorded episodes of an airline agent (tau-bench), 12 turns on the mean, five tasks at once: the end of each is
foretold before its first turn and after a quarter, half, three quarters and all of its turns, before any outcome of
the five tasks is told. AUC over all episodes but those that came before anything could be said, mean and deviation of
three orders of the tasks. The count of turns is given the better sign, which it could not have known, and so is nothing
else; a share of an episode's turns is known only when it has ended, so the count at a quarter already tells how long
the episode will be. The last rows are what values would foretell with another λ, over twenty orders: AUC less that of
Monte Carlo (λ = 1) on the same order, mean of the five moments, with its standard error. ``--quick``: fewer orders.
Needs EVERLOOP_DATA; vectors are kept below ``.everloop/cache``.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from typing import Any, NamedTuple

import numpy as np
from everloop.config import RewardConfig
from everloop.episode import Episode

from benchmarks import _reward_streams as streams
from benchmarks._report import aim, loads, parser, publish
from benchmarks._report import load as load_now
from benchmarks._reward_streams import DataError, Remembering
from examples.airline_replay.evaluation import auc, either_way
from reward import course, evidence, value
from reward.calibration import calibration_error
from reward.features import examples
from reward.model import Label, RewardModel

SEEDS, ORDERS = range(3), range(20)
QUICK_SEEDS, QUICK_ORDERS = range(2), range(4)
LAMBDAS = (0.0, 0.5, 0.8, 0.9)
STAGES = {"before turn 1": 0.0, "a quarter": 0.25, "half": 0.5, "three quarters": 0.75, "end": 1.0}


class Seen(NamedTuple):
    """What was foretold of an episode at each of STAGES, by each judge, and what it came to."""

    values: list[float]
    opinions: list[float]
    turns: list[float]
    ended: float


def streamed(encoder: Remembering, seed: int, *, opinions: bool = True) -> list[Seen]:
    """Every episode as it was foretold; nothing of those that came before anything could be said."""
    model = RewardModel(RewardConfig(), encoder)
    found = []
    for block in streams.recordings(seed):
        if model.values.may_say:
            found += [_seen(model, one, opinions) for one in block]
        for one in block:
            learn(model, one)
    return found


def _seen(model: RewardModel, episode: Episode, opinions: bool) -> Seen:
    its = examples(episode)
    both = course.foretold(model, episode, its, range(len(its)))
    turns = [math.ceil(share * len(its)) for share in STAGES.values()]
    said = [one.value for one in model.estimate([its[max(turn, 1) - 1] for turn in turns])] if opinions else []
    values = [both[turn - 1][1] if turn else both[0][0] for turn in turns]
    return Seen(values, said, [float(turn) for turn in turns], float(episode.outcome or 0.0))


def learn(model: RewardModel, episode: Episode) -> None:
    """As the handler "score" learns an episode: its labels, then what it came to."""
    its, calls = examples(episode), {turn.call.id: dict[str, Any]() for turn in episode.turns}
    for number, lesson in evidence.lessons(episode, its, model.reliability):
        model.learn([lesson])
        if isinstance(lesson, Label) and model.trace is not None:
            taught = calls[episode.turns[number].call.id].setdefault("taught", {})
            taught[lesson.id] = [*model.trace]
    course.learn(model, episode, its, calls, {}, teaches=True)


def rows_of(found: list[list[Seen]]) -> list[dict[str, Any]]:
    """A row for each judge: AUC by stage, and the calibration error of probabilities at the end."""
    rows = []
    for name, column, judge in (
        ("value", "values", auc),
        ("opinion of the answer", "opinions", auc),
        ("count of turns", "turns", either_way),
    ):
        row: dict[str, Any] = {"judge": name}
        for at, stage in enumerate(STAGES):
            each = [judge([getattr(one, column)[at] for one in its], [one.ended for one in its]) for its in found]
            row |= {stage: round(statistics.mean(each), 3), f"± {stage}": round(statistics.stdev(each), 3)}
        rows.append(row)
    rows[1]["before turn 1"] = rows[1]["± before turn 1"] = None  # there is no answer yet
    errors = [
        [calibration_error(np.array([one.values[at] for one in its]), np.array([one.ended for one in its]))
         for its in found]
        for at in range(len(STAGES))
    ]  # fmt: skip
    error = {stage: round(statistics.mean(each), 3) for stage, each in zip(STAGES, errors, strict=True)}
    return [*rows, {"judge": "value: calibration error", **error}]


def other_lambdas(encoder: Remembering, orders: range) -> list[dict[str, Any]]:
    """Mean AUC over the stages with each λ, less that of Monte Carlo on the same order."""

    def means(trace: float) -> list[list[float]]:
        value.LAMBDA = trace
        runs = [streamed(encoder, seed, opinions=False) for seed in orders]
        return [
            [auc([one.values[at] for one in its], [one.ended for one in its]) for at in range(len(STAGES))]
            for its in runs
        ]

    kept = value.LAMBDA
    try:
        plain = np.array(means(1.0))
        found = {trace: np.array(means(trace)) - plain for trace in LAMBDAS}
    finally:
        value.LAMBDA = kept
    rows: list[dict[str, Any]] = [
        {"judge": "λ = 1, many orders"} | dict(zip(STAGES, plain.mean(axis=0).round(3).tolist(), strict=True))
    ]
    for trace, apart in found.items():
        by_stage = dict(zip(STAGES, apart.mean(axis=0).round(3).tolist(), strict=True))
        each = apart.mean(axis=1)
        error = each.std(ddof=1) / len(each) ** 0.5
        rows.append(
            {"judge": f"λ = {trace:g} less λ = 1", **by_stage, "mean": round(float(each.mean()), 3)}
            | {"± mean": round(float(error), 3)}
        )
    return rows


def main() -> int:
    options, began, started = parser(__doc__ or "").parse_args(), load_now(), time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    encoder = Remembering()
    try:
        first = [one for block in streams.recordings(0) for one in block]
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    encoder.prepare([text for one in first for its in examples(one) for text in (its.prompt, its.answer)])
    found = [streamed(encoder, seed) for seed in (QUICK_SEEDS if options.quick else SEEDS)]
    rows = rows_of(found)
    notes = [
        f"{len(found[0])} episodes of each order foretold, {sum(one.ended for one in found[0]):.0f} of them solved",
        f"{time.monotonic() - started:.0f} s; {loads(began)}",
    ]
    aims = [
        aim(f"{stage}: AUC above the opinion of the answer", rows[1][stage], rows[0][stage])
        for stage in list(STAGES)[1:]
    ]
    rows += other_lambdas(encoder, QUICK_ORDERS if options.quick else ORDERS)
    publish("course", rows, aims, quick=options.quick, notes=notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
