"""What is remembered of an episode, from one of its versions to the next; and what is read of a version."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import ormsgpack
from everloop.episode import Episode, Split
from everloop.log.base import Record
from everloop.stream import State

from reward.desk import Desk
from reward.features import Example
from reward.model import Label, Pair


@dataclass(frozen=True)
class Read:
    """One episode version, and everything in it that matters here."""

    record: Record
    episode: Episode
    examples: list[Example]
    lessons: list[tuple[int, Label | Pair]]


@dataclass
class Known:
    """What is remembered of an episode.

    ``calls``: by call id, what was expected, what it was scored by, under ``taught`` the trace of each label that was
    learned, by its id, under ``heard`` the words from which it was learned how far whom is right, under ``outcome``
    what was measured of it, and under ``course`` how the episode was foretold to end when the call was new. ``end``:
    see :func:`reward.course.learn`.
    """

    version: int = -1
    learned: list[str] = field(default_factory=list)
    calls: dict[str, dict[str, Any]] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def unpacked(cls, held: bytes) -> Known:
        """What a later release has put behind these fields is left out: workers of both run while one is replaced."""
        return cls(*ormsgpack.unpackb(held)[: len(fields(cls))])

    def packed(self) -> bytes:
        return ormsgpack.packb([self.version, self.learned, self.calls, self.end])

    def call(self, name: str) -> dict[str, Any]:
        return self.calls.setdefault(name, {})


def recall(state: State, desk: Desk, episode: str) -> Known:
    held = state.get(f"episode/{desk.tenant}/{desk.policy}/{episode}")
    return Known.unpacked(held) if held else Known()


def keep(state: State, desk: Desk, episode: str, known: Known) -> None:
    state.put(f"episode/{desk.tenant}/{desk.policy}/{episode}", known.packed())


def teaches(episode: Episode) -> bool:
    """Whether the model may learn from an episode: not from held-out, synthetic or quarantined ones."""
    return episode.split is Split.TRAIN and not episode.synthetic and episode.quarantine is None
