"""The lessons that are remembered for replay: of every slice of the traffic its newest, in fair shares.

A full memory drops the oldest lesson of the slice that has most. So a slice that is quiet keeps what it has until all
others are as small, and a busy one cannot push it out. A slice is the topic of the prompt and how far into the
episode it came.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from reward.heads import Batch, Lesson

REPLAY = 64  # remembered lessons in each step, beside the new one
RECENT = 512  # half of them are drawn from so many newest
AHEAD = 16  # lessons whose draws are made together
LATE = 2  # turns of an episode from which on they are one slice
LABEL, WEIGHT, MEMBERS = 0, 1, 2  # columns of a row; after the members come each one's own features, then the shared


def slice_of(topic: int, turn: int) -> int:
    return topic * (LATE + 1) + min(turn, LATE)


class Reservoir:
    """At most ``capacity`` lessons in as many slots; ``count``: how many were ever added.

    Each is a row of one array that grows as it fills, so that a step takes its lessons by one look-up.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.marks: list[tuple[int, int]] = []  # of each slot: the lesson's number, its slice
        self.count = 0
        self._heads = self._own = 0  # members, and own features of each
        self._rows = np.zeros((0, 0), np.float32)  # at least as many as there are marks
        self._drawn = np.zeros((0, 0), np.float32)  # where a sample is put
        self._drawn_of = -1, 0  # the first count, and the turn, of the numbers that are made ahead
        self._ahead = np.zeros((AHEAD, REPLAY), np.int64)
        self._slots: dict[int, int] = {}  # by number, oldest first
        self._slices: dict[int, dict[int, None]] = {}  # numbers of each slice, oldest first
        self._newest = np.full(RECENT, -1)  # slots of the newest numbers, each at its number's remainder; -1: given up

    def __len__(self) -> int:
        return len(self.marks)

    def lesson(self, slot: int) -> Lesson:
        """The lesson of a slot, as it is now; what comes into the slot later does not change it."""
        own, shared, labels, weights, members = self._batch(self._rows[[slot]])
        return Lesson(own[0], shared[0], float(labels[0]), float(weights[0]), members[0])

    def _batch(self, rows: Any) -> Batch:
        """The lessons that these rows are: views of them."""
        own = MEMBERS + self._heads
        shared = own + self._heads * self._own
        each = rows[:, own:shared].reshape(len(rows), self._heads, self._own)
        return Batch(each, rows[:, shared:], rows[:, LABEL], rows[:, WEIGHT], rows[:, MEMBERS:own])

    def add(self, lesson: Lesson, slice_: int = 0) -> int:
        """Returns the slot that was written."""
        slot = len(self.marks) if len(self.marks) < self.capacity else self._emptied(slice_)
        self._put(slot, self.count, slice_, lesson)
        self.count += 1
        return slot

    def _emptied(self, coming: int) -> int:
        """The slot of the oldest lesson of the largest slice, given up; among equals, of the one that it comes to."""
        largest = max(self._slices, key=lambda one: (len(self._slices[one]), one == coming, -one))
        number = next(iter(self._slices[largest]))
        del self._slices[largest][number]
        if number >= self.count - RECENT:
            self._newest[number % RECENT] = -1
        return self._slots.pop(number)

    def _put(self, slot: int, number: int, slice_: int, lesson: Lesson) -> None:
        if slot == len(self.marks):
            self.marks.append((number, slice_))
            self._room(lesson)
        parts = ((lesson.label, lesson.weight), lesson.members, lesson.own.reshape(-1), lesson.shared)
        np.concatenate(parts, out=self._rows[slot], casting="same_kind")
        self.marks[slot] = number, slice_
        self._slots[number] = slot
        self._slices.setdefault(slice_, {})[number] = None
        self._newest[number % RECENT] = slot

    def _room(self, lesson: Lesson) -> None:
        """Room for as many lessons as there are marks: twice what there was, so that few fill it often."""
        held = len(self._rows)
        if len(self.marks) <= held:
            return
        self._heads, self._own = lesson.own.shape
        width = MEMBERS + self._heads + lesson.own.size + lesson.shared.size
        grown = np.zeros((min(max(64, 2 * held), self.capacity), width), np.float32)
        grown[:held] = self._rows.reshape(held, width)
        self._rows, self._drawn = grown, np.zeros((1 + REPLAY, width), np.float32)

    def restore(self, held: Iterable[tuple[int, int, Lesson]], count: int) -> None:
        """Take (number, slice, lesson) of each slot in order. Raises ValueError where two have one number."""
        for slot, (number, slice_, lesson) in enumerate(held):
            self._put(slot, number, slice_, lesson)
        self._slots = dict(sorted(self._slots.items()))
        self._slices = {slice_: dict.fromkeys(sorted(numbers)) for slice_, numbers in self._slices.items()}
        if len(self._slots) != len(self.marks) or any(number >= count for number in self._slots):
            raise ValueError(f"{len(self.marks)} lessons with {len(self._slots)} numbers below {count}")
        self.count = count
        self._newest[:] = -1
        for number in range(max(0, count - RECENT), count):
            self._newest[number % RECENT] = self._slots.get(number, -1)

    def silence(self, number: int) -> int | None:
        """Have the lesson that was added as the ``number``-th (from 0) teach nothing more; its slot, if it is there."""
        slot = self._slots.get(number)
        if slot is not None:
            self._rows[slot, WEIGHT] = 0.0
        return slot

    def sizes(self) -> dict[int, int]:
        """Lessons by slice."""
        return {slice_: len(numbers) for slice_, numbers in sorted(self._slices.items())}

    def sample(self, turn: int = 0, beside: int | None = None) -> Batch:
        """REPLAY lessons, half of them of the RECENT newest, after that of the slot ``beside`` if one is given.

        The draw depends on the count and ``turn`` alone; what it gives holds until the next one.
        """
        draws = self._draws(turn)
        newest = self._newest[self._newest >= 0]
        half = REPLAY // 2
        slots = np.empty(1 + REPLAY, np.int64)
        slots[0] = beside or 0
        slots[1 : 1 + half] = draws[:half] % len(self.marks)
        slots[1 + half :] = newest[draws[half:] % len(newest)]
        slots = slots[beside is None :]
        drawn = self._drawn[: len(slots)]
        self._rows.take(slots, axis=0, out=drawn, mode="clip")  # "raise" would make a copy first; none is outside
        return self._batch(drawn)

    def _draws(self, turn: int) -> Any:
        """REPLAY numbers of this count and turn. Those of AHEAD counts are made at once, which costs little more."""
        first = self.count - self.count % AHEAD
        if self._drawn_of != (first, turn):
            self._drawn_of = first, turn
            self._ahead = _mixed([((first + more) << 20) + (turn << 8) for more in range(AHEAD)])
        return self._ahead[self.count - first]


def _mixed(starts: list[int]) -> Any:
    """From each start on REPLAY numbers below 2**31 that look drawn by chance (splitmix64; Steele et al. 2014)."""
    bits = STREAM + np.array([start * GOLDEN % 2**64 for start in starts], np.uint64)[:, None]
    bits ^= bits >> SHIFTS[0]
    bits *= FACTORS[0]
    bits ^= bits >> SHIFTS[1]
    bits *= FACTORS[1]
    bits >>= SHIFTS[2]
    return bits.view(np.int64)


GOLDEN = 0x9E3779B97F4A7C15
STREAM = np.arange(REPLAY, dtype=np.uint64) * np.uint64(GOLDEN)
FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SHIFTS = np.uint64(30), np.uint64(27), np.uint64(33)
