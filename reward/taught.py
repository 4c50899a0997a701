"""What was taught lately, so that it can be taken back: by its rater, or once he is heard no more. Part of a guard's
state.

Of each of the newest lessons is kept what undoing it takes: the lesson as it was learned, where it was said, and what
it did. A label of raters who are not known is left out: its episode remembers enough to undo it. The oldest goes where
there are too many: MOST times the size of a prompt and its answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import ormsgpack

from reward.features import Example, Structure
from reward.model import Label, Pair, Trace

MOST = 2000


def name_of(kind: str, *parts: str) -> str:
    return f"{kind}:{hashlib.blake2b(chr(0).join(parts).encode('utf-8', 'replace'), digest_size=8).hexdigest()}"


class Place(NamedTuple):
    """Where a lesson was said: the episode's and the call's id, and event time in seconds."""

    episode: str
    call: str
    time: float


class Taught(NamedTuple):
    """A lesson that was learned. ``raters``: all who said it."""

    lesson: Label | Pair
    trace: Trace
    place: Place
    raters: list[str]

    @property
    def names(self) -> list[str]:
        return [name_of("rater", rater) for rater in sorted(set(self.raters))]


class Lessons:
    """At most ``most`` lessons, oldest first."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.kept: dict[str, bytes] = {}
        self._names: dict[str, list[str]] = {}  # who taught each
        self._of: dict[str, dict[str, None]] = {}  # what each of them taught
        self._changed: set[str] = set()

    def note(self, taught: Taught) -> None:
        self.drop(taught.lesson.id)
        lesson, trace, place, *rest = taught
        self._put(lesson.id, ormsgpack.packb([packed(lesson), [*trace], [*place], *rest]), taught.names)
        self._changed.add(taught.lesson.id)
        if len(self.kept) > self.most:
            self.drop(next(iter(self.kept)))

    def _put(self, lesson: str, held: bytes, names: list[str]) -> None:
        self.kept[lesson], self._names[lesson] = held, names
        for name in names:
            self._of.setdefault(name, {})[lesson] = None

    def of(self, name: str) -> dict[str, list[str]]:
        """What the rater of this name taught: by lesson, the names of all who did."""
        return {lesson: self._names[lesson] for lesson in self._of.get(name, ())}

    def get(self, lesson: str) -> Taught:
        """Raises KeyError where it was never noted, or made room for newer ones."""
        return _taught(self.kept[lesson])

    def drop(self, lesson: str) -> None:
        """Remember it no more."""
        if self.kept.pop(lesson, None) is None:
            return
        self._changed.add(lesson)
        for name in self._names.pop(lesson):
            del self._of[name][lesson]
            if not self._of[name]:
                del self._of[name]

    def changes(self) -> Iterator[tuple[str, bytes | None]]:
        """What changed since the last call, by lesson; None: delete it."""
        for lesson in sorted(self._changed):
            yield lesson, self.kept.get(lesson)
        self._changed.clear()

    def restore(self, pieces: Mapping[str, bytes]) -> None:
        """What was ``changes`` before, in a new memory."""
        found = {lesson: (held, _taught(held)) for lesson, held in pieces.items()}
        for lesson, (held, taught) in sorted(found.items(), key=lambda item: item[1][1].trace.lesson):
            self._put(lesson, held, taught.names)


def _taught(held: bytes) -> Taught:
    lesson, trace, place, raters = ormsgpack.unpackb(held)
    return Taught(unpacked(lesson), Trace(*trace), Place(*place), raters)


def packed(lesson: Label | Pair) -> dict[str, Any]:
    return {"pair": isinstance(lesson, Pair), **asdict(lesson)}


def unpacked(held: dict[str, Any]) -> Label | Pair:
    if held.pop("pair"):
        return Pair(**{**held, "structure": Structure(**held["structure"])})
    example = held.pop("example")
    return Label(**held, example=Example(**{**example, "structure": Structure(**example["structure"])}))
