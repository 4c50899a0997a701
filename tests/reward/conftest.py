"""What the reward model's tests share: an encoder without weights, episodes, and a state in memory."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from everloop import wire
from everloop.episode import Episode, Turn
from everloop.event import Call, Message
from everloop.feedback import Feedback
from everloop.log.base import NewRecord, Record


@functools.cache
def word_vector(word: str) -> Any:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).normal(size=48).astype(np.float32)


class WordEncoder:
    """A real, small encoder: the sum of one fixed vector a word, normalised; texts that share words are near."""

    name = "words"
    size = 48
    version = "words-1"

    def encode(self, texts: Sequence[str]) -> Any:
        sums = [sum((word_vector(w) for w in text.lower().split()), np.zeros(48, np.float32)) for text in texts]
        rows = np.array(sums, np.float32).reshape(-1, 48)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


class MemoryState:
    """The state's promises in a dict; ``rolled_back`` puts an earlier content in place."""

    def __init__(self, entries: dict[str, bytes] | None = None) -> None:
        self.entries = dict(entries or {})

    def get(self, key: str) -> bytes | None:
        return self.entries.get(key)

    def put(self, key: str, value: bytes) -> None:
        self.entries[key] = value

    def delete(self, key: str) -> None:
        self.entries.pop(key, None)

    def scan(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        return iter(sorted(item for item in self.entries.items() if item[0].startswith(prefix)))


def thumb(value: int, name: str = "f1", time: float = 10.0, **fields: Any) -> Feedback:
    return Feedback(id=name, kind="thumb", value=value, time=time, rater=fields.pop("rater", "r1"), **fields)


def episode(
    name: str, *exchanges: tuple[str, str], feedback: Sequence[Feedback] = (), about: int = -1, **fields: Any
) -> Episode:
    """One turn for each (asked, answered); ``feedback`` is about the turn number ``about``."""
    turns = []
    for number, (asked, answered) in enumerate(exchanges):
        call = Call(
            id=f"{name}-c{number}",
            messages=(Message(role="user", content=asked),),
            output=Message(role="assistant", content=answered),
            finish_reason="stop",
        )
        mine = tuple(feedback) if number == about % len(exchanges) else ()
        turns.append(Turn(call=call, feedback=mine))
    fields.setdefault("version", len(exchanges) + len(feedback))
    fields = {"tenant": "default", "policy": "assistant", "started": 1.0, "updated": 2.0, **fields}
    return Episode(id=name, turns=tuple(turns), **fields)


def records(*episodes: Episode, start: int = 0) -> list[Record]:
    return [
        Record("episodes", 0, start + i, one.key, wire.encode(one), {"schema": "Episode"}, one.updated)
        for i, one in enumerate(episodes)
    ]


def desk_traffic(count: int, *, flipped: int = 20, every: int = 1) -> list[Episode]:
    """Rated single-turn episodes of an agent with four answers: right for a prompt that names the same thing."""
    things = ("card", "loan", "rate", "pin")
    verbs = ("lost", "want", "about", "my", "help", "today", "again")
    made = []
    for i in range(count):
        asked, answered = things[i % 4], things[(i * 7 + i // 4) % 4]
        up = (asked == answered) != (i % flipped == flipped - 1)
        rated = [thumb(1 if up else -1, f"f{i}", rater=f"r{i}")] if i % every == 0 else []
        prompt = f"{verbs[i % 7]} {asked} {verbs[i * 3 % 5]}"
        made.append(episode(f"ep_{i}", (prompt, f"{answered} desk"), feedback=rated, updated=float(i + 1)))
    return made


def run(handler: Any, state: MemoryState, records: Sequence[Record], batch: int = 20) -> list[NewRecord]:
    """All that a handler gives for the records, a flush after every batch of them."""
    outputs: list[NewRecord] = []
    for start in range(0, len(records), batch):
        for record in records[start : start + batch]:
            outputs += handler.handle(state, record, 0.0)
        outputs += handler.flush(state, 0.0)
    return outputs


class Kit:
    WordEncoder = WordEncoder
    MemoryState = MemoryState
    thumb = staticmethod(thumb)
    episode = staticmethod(episode)
    records = staticmethod(records)
    desk_traffic = staticmethod(desk_traffic)

    @staticmethod
    def decoded(contract: Any, outputs: Sequence[NewRecord], topic: str) -> list[Any]:
        return [wire.decode(contract, one.value) for one in outputs if one.topic == topic and one.value is not None]


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


@pytest.fixture(scope="session")
def words() -> WordEncoder:
    return WordEncoder()
