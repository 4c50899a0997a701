"""Public data as streams of things to learn, each to be foretold before it is told; and an encoder that remembers.

A stream is a list of blocks: all of a block is foretold before any of it is told, so that solutions of one problem, or
trials of one task, are never recognised by one another. ``EVERLOOP_DATA`` names the folder of the data.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from everloop.episode import Episode, Turn
from everloop.event import Call, Message, ToolResult
from everloop.feedback import Feedback, FeedbackKind

from examples.airline_replay import recorded
from examples.bank_desk import data as bank
from examples.bank_desk.customer import Customer
from reward import evidence
from reward.encoder import Encoder
from reward.features import Example, examples, prompt_text
from reward.model import Label, Pair

Array = np.ndarray[Any, np.dtype[np.float32]]
TASKS_AT_ONCE = 5  # of the airline recordings, as in benchmarks/airline.py
RIGHT = 0.5  # share of the bank desk's answers that its policy gets right


class DataError(Exception):
    """Data that a benchmark needs are not here."""


class Moment(NamedTuple):
    """One thing to foretell (``asked``), and the lessons that are learned once it is told."""

    asked: Label | Pair
    lessons: tuple[Label | Pair, ...]


Stream = list[list[Moment]]


def folder() -> Path:
    """Where the data lie. Raises DataError where EVERLOOP_DATA does not say so."""
    named = os.environ.get("EVERLOOP_DATA")
    if not named or not Path(named).is_dir():
        raise DataError(
            "these streams are of public data: set EVERLOOP_DATA to the folder that holds hh_rlhf, gsm8k, …"
        )
    return Path(named)


def _alone(lesson: Label | Pair) -> list[Moment]:
    return [Moment(lesson, (lesson,))]


def preferences(seed: int, most: int | None) -> Stream:
    """HH harmless: which of two answers people preferred."""
    with gzip.open(folder() / "hh_rlhf/harmless_base_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in lines]
    random.Random(seed).shuffle(pairs)
    stream = []
    for number, pair in enumerate(pairs[:most]):
        asked, chosen = _talk(pair["chosen"])
        _, rejected = _talk(pair["rejected"])
        if chosen != rejected:
            stream.append(_alone(Pair(f"hh{number}", prompt_text(asked), chosen, rejected)))
    return stream


def _talk(transcript: str) -> tuple[list[dict[str, str]], str]:
    """What came before the last answer of a transcript, and that answer."""
    before, _, answer = transcript.rpartition("\n\nAssistant:")
    messages = []
    for part in before.split("\n\nHuman:")[1:]:
        human, *answers = part.split("\n\nAssistant:")
        messages.append({"role": "user", "content": human.strip()})
        messages += [{"role": "assistant", "content": one.strip()} for one in answers]
    return messages or [{"role": "user", "content": before.strip()}], answer.strip()


def solutions(seed: int, most: int | None) -> Stream:
    """GSM8K: whether each of four models' solutions of a problem is right."""
    lines = (folder() / "gsm8k/example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(seed).shuffle(lines)
    stream = []
    for number, line in enumerate(lines[:most]):
        problem = json.loads(line)
        block = []
        for name, one in sorted(problem.items()):
            if isinstance(one, dict):
                label = Label(
                    f"gsm{number}-{name}",
                    Example(problem["question"], one["solution"]),
                    float(one["is_correct"]),
                    certain=True,
                )
                block += _alone(label)
        stream.append(block)
    return stream


def thumbs(seed: int, most: int | None) -> Stream:
    """banking77: thumbs of 60% of the customers, 5% of them flipped, about a policy that is right half of the time."""
    desk = bank.load(None, folder(), seed)
    customer, dice = Customer(seed), random.Random(seed)
    stream = []
    for number, message in enumerate(desk.stream[:most]):
        answer = message.topic if dice.random() < RIGHT else dice.choice(desk.topics)
        thumb = customer.judge(number, message.topic, answer).thumb
        if thumb is not None:
            stream.append(_alone(Label(f"bank{number}", Example(message.text, answer), float(thumb))))
    return stream


def outcomes(seed: int, most: int | None) -> Stream:
    """Airline recordings: whether each episode's task was solved, five tasks at once."""
    return [[_outcome(one) for one in block] for block in recordings(seed, most)]


def recordings(seed: int, most: int | None = None) -> list[list[Episode]]:
    """The airline episodes, each with its outcome: all trials of five tasks at once."""
    episodes = _recordings()
    tasks = sorted({task for task, _ in episodes})
    random.Random(seed).shuffle(tasks)
    blocks = [tasks[at : at + TASKS_AT_ONCE] for at in range(0, len(tasks[:most]), TASKS_AT_ONCE)]
    return [[one for task, one in episodes if task in block] for block in blocks]


@functools.cache
def _recordings() -> list[tuple[int, Episode]]:
    """Every recorded episode with its task, in the file's order."""
    return [(one.task, _episode(one)) for one in recorded.read(recorded.find(folder() / recorded.FILE, folder()))]


def _outcome(episode: Episode) -> Moment:
    lessons = evidence.lessons(episode, examples(episode))
    asked = next(lesson for number, lesson in lessons if number == episode.judged and isinstance(lesson, Label))
    return Moment(asked, tuple(lesson for _, lesson in lessons))


def _episode(one: recorded.Recorded) -> Episode:
    turns: list[Turn] = []
    for event in recorded.events(one.messages):
        if isinstance(event, recorded.Call):
            call = Call(
                id=f"air{one.task}-{one.trial}-{len(turns)}",
                messages=tuple(Message(**message) for message in event.prompt),
                output=Message(**event.output),
            )
            turns.append(Turn(call=call))
        elif turns:
            last = turns[-1].call.id
            result = ToolResult(
                id=f"{last}-{len(turns[-1].tools)}",
                name=event.name,
                arguments=event.arguments,
                result=event.result,
                error=event.error,
                call=last,
            )
            turns[-1] = turns[-1].model_copy(update={"tools": (*turns[-1].tools, result)})
    said = Feedback(
        id=f"air{one.task}-{one.trial}", kind=FeedbackKind.OUTCOME, value=one.outcome, time=1.0, rater="simulation"
    )
    name = f"air{one.task}-{one.trial}"
    return Episode(
        tenant="default", policy="p", id=name, version=1, started=0, updated=1, turns=tuple(turns), feedback=(said,)
    )


STREAMS: dict[str, Callable[[int, int | None], Stream]] = {
    "HH pairs": preferences,
    "GSM8K solutions": solutions,
    "banking77 thumbs": thumbs,
    "airline outcomes": outcomes,
}


class Remembering:
    """The packaged encoder, with every vector that it ever gave kept below ``cache``; for benchmarks alone."""

    def __init__(self, cache: Path = Path(".everloop/cache/vectors")) -> None:
        self._encoder = Encoder(remember=0)
        self.name, self.size, self.version = self._encoder.name, self._encoder.size, self._encoder.version
        self._file = cache / f"{self.version}.npz"
        self._known: dict[bytes, Array] = {}
        self._saved = 0
        if self._file.exists():
            held = np.load(self._file)
            self._known = dict(zip((key.tobytes() for key in held["keys"]), held["vectors"], strict=True))
            self._saved = len(self._known)

    def encode(self, texts: Sequence[str]) -> Array:
        keys = [hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest() for text in texts]
        fresh = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        if fresh:
            self._known.update(zip(fresh, self._encoder.encode(list(fresh.values())), strict=True))
        return np.array([self._known[key] for key in keys])

    def prepare(self, texts: Sequence[str]) -> None:
        """Encode these at once, and keep them on the disk."""
        distinct = list(dict.fromkeys(texts))
        for at in range(0, len(distinct), 2048):
            self.encode(distinct[at : at + 2048])
        if len(self._known) > self._saved:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_name(f".{os.getpid()}.npz")
            keys = np.frombuffer(b"".join(self._known), np.uint8).reshape(-1, 16)
            np.savez(partial, keys=keys, vectors=np.stack(list(self._known.values())))
            partial.replace(self._file)
            self._saved = len(self._known)


def texts_of(stream: Stream) -> list[str]:
    """Every text that a model will ask the encoder for."""
    found = []
    for block in stream:
        for moment in block:
            for one in moment.lessons:
                found += (
                    [one.prompt, one.chosen, one.rejected]
                    if isinstance(one, Pair)
                    else [one.example.prompt, one.example.answer]
                )
    return found
