"""The lessons that are remembered for replay: of every slice of the traffic its newest, in fair shares.

A full memory drops the oldest lesson of the slice that has most. So a slice that is quiet keeps what it has until all
others are as small, and a busy one cannot push it out. A slice is the topic of the prompt and how far into the
episode it came.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np

from reward.heads import Lesson

REPLAY = 64  # remembered lessons in each step, beside the new one
RECENT = 512  # half of them are drawn from so many newest
LATE = 2  # turns of an episode from which on they are one slice


def slice_of(topic: int, turn: int) -> int:
    return topic * (LATE + 1) + min(turn, LATE)


class Reservoir:
    """At most ``capacity`` lessons in as many slots; ``count``: how many were ever added."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.lessons: list[Lesson] = []
        self.marks: list[tuple[int, int]] = []  # of each slot: the lesson's number, its slice
        self.count = 0
        self._slots: dict[int, int] = {}  # by number, oldest first
        self._slices: dict[int, dict[int, None]] = {}  # numbers of each slice, oldest first

    def add(self, lesson: Lesson, slice_: int = 0) -> int:
        """Returns the slot that was written."""
        slot = len(self.lessons) if len(self.lessons) < self.capacity else self._emptied(slice_)
        self._put(slot, self.count, slice_, lesson)
        self.count += 1
        return slot

    def _emptied(self, coming: int) -> int:
        """The slot of the oldest lesson of the largest slice, given up; among equals, of the one that it comes to."""
        largest = max(self._slices, key=lambda one: (len(self._slices[one]), one == coming, -one))
        number = next(iter(self._slices[largest]))
        del self._slices[largest][number]
        return self._slots.pop(number)

    def _put(self, slot: int, number: int, slice_: int, lesson: Lesson) -> None:
        if slot == len(self.lessons):
            self.lessons.append(lesson)
            self.marks.append((number, slice_))
        self.lessons[slot], self.marks[slot] = lesson, (number, slice_)
        self._slots[number] = slot
        self._slices.setdefault(slice_, {})[number] = None

    def restore(self, held: Iterable[tuple[int, int, Lesson]], count: int) -> None:
        """Take (number, slice, lesson) of each slot in order. Raises ValueError where two have one number."""
        for number, slice_, lesson in held:
            self.lessons.append(lesson)
            self.marks.append((number, slice_))
        for slot in sorted(range(len(self.marks)), key=lambda slot: self.marks[slot]):
            self._put(slot, *self.marks[slot], self.lessons[slot])
        if len(self._slots) != len(self.lessons) or any(number >= count for number in self._slots):
            raise ValueError(f"{len(self.lessons)} lessons with {len(self._slots)} numbers below {count}")
        self.count = count

    def silence(self, number: int) -> int | None:
        """Have the lesson that was added as the ``number``-th (from 0) teach nothing more; its slot, if it is there."""
        slot = self._slots.get(number)
        if slot is not None:
            self.lessons[slot] = self.lessons[slot]._replace(weight=0.0)
        return slot

    def sizes(self) -> dict[int, int]:
        """Lessons by slice."""
        return {slice_: len(numbers) for slice_, numbers in sorted(self._slices.items())}

    def sample(self, turn: int = 0) -> list[Lesson]:
        """REPLAY lessons, half of them from the RECENT newest; the draw depends on the count and ``turn`` alone."""
        random = np.random.default_rng([self.count, turn] if turn else self.count)
        newest = list(islice(reversed(self._slots.values()), RECENT))
        anywhere = random.integers(len(self.lessons), size=REPLAY // 2)
        back = random.integers(len(newest), size=REPLAY - REPLAY // 2)
        return [self.lessons[slot] for slot in (*anywhere, *(newest[at] for at in back))]
