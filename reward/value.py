"""How an episode will end, foretold at each moment of it: the third thing that is learned of the trunk's features.

A moment is what is known before an answer, or with it; V is the probability that the episode ends well. It is learned
when that is known, by λ-returns (Sutton and Barto 2018, ch. 12): a moment's target is LAMBDA of the target after it and
the rest of what is foretold after it, the last one's is how it ended. With 1, which is how verifiers of solutions
are taught (Cobbe et al. 2021, arXiv:2110.14168; Wang et al. 2024, arXiv:2312.08935), one run's luck is learned of every
moment of it, and less is foretold. Well below 0.9 a turn that decides early gets next to no credit: the features see
little of what came before the newest exchange, so what is foretold later has forgotten it (docs/reward.md has both).

The heads, their steps, and replay are those of :mod:`reward.heads` and :mod:`reward.reservoir`: AdaGrad, members that
differ by bootstrap masks, nothing drawn by chance, constant time and memory for each moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from reward.heads import Heads, Lesson, probability
from reward.reservoir import Reservoir

Array = np.ndarray[Any, np.dtype[np.float32]]
LAMBDA = 0.9
MIN_ENDINGS = 20  # episodes whose end was learned, of either kind FEWEST_OF_A_KIND, before anything is foretold
FEWEST_OF_A_KIND = 5


class Moments(NamedTuple):
    """Some moments of one episode, in order: ``shared`` features (n, …), ``answered`` (n,) 0 or 1, and the ``slices``
    that they are remembered in."""

    shared: Array
    answered: Array
    slices: Sequence[int]


class Values:
    """Learned of one (tenant, policy). ``start``: shared weights (features,). Not thread-safe; one writer.

    ``begun``: whether an episode of more than one request was ever seen; nothing is learned before, since the course
    of a single answer is its score. ``ended``: episodes that ended badly and well. ``changed``: slots of replay, since
    they were written last; ``touched``: whether anything is new.
    """

    def __init__(self, heads: int, start: Array, learning_rate: float, capacity: int) -> None:
        self.heads = Heads(heads, np.zeros(2, np.float32), start, learning_rate)
        self.reservoir = Reservoir(capacity)
        self.begun = False
        self.ended = [0, 0]
        self.refused = 0  # moments that were not learned because something in them was not finite
        self.changed: set[int] = set()
        self.touched = False

    @property
    def may_say(self) -> bool:
        """Whether enough ends were learned to foretell one."""
        return sum(self.ended) >= MIN_ENDINGS and min(self.ended) >= FEWEST_OF_A_KIND

    def begin(self) -> None:
        """An episode of more than one request was seen."""
        self.touched |= not self.begun
        self.begun = True

    def foretell(self, moments: Moments) -> Array:
        """(n,) P(the episode ends well): mean of the members."""
        found: Array = probability(self.heads.logits(self._own(moments.answered), moments.shared)).mean(axis=0)
        return found

    def _own(self, answered: Array) -> Array:
        """(heads, n, 2): 1, and whether the answer is known."""
        own = np.stack([np.ones_like(answered), answered], axis=1)
        return np.tile(own, (len(self.heads.own), 1, 1))

    def targets(self, moments: Moments, end: float) -> Array:
        """(n,) λ-returns of the moments up to the end of an episode, of which the last one's is ``end`` (0 to 1)."""
        foretold = self.foretell(moments)
        found = np.empty_like(foretold)
        following = end
        for at in range(len(found) - 1, -1, -1):
            found[at] = following
            following = LAMBDA * following + (1 - LAMBDA) * float(foretold[at])
        return found

    def learn(self, moments: Moments, targets: Array, weight: float, members: Array) -> list[int]:
        """A step for each moment, with replay; the numbers of its lessons, to take them back by.

        What is not finite teaches nothing: it is counted, and the list is empty.
        """
        if not (np.isfinite(moments.shared).all() and np.isfinite(targets).all() and np.isfinite(weight)):
            self.refused += len(targets)
            return []
        own = self._own(moments.answered)
        numbers = []
        for at, target in enumerate(targets.tolist()):
            numbers.append(self.reservoir.count)
            lesson = Lesson(own[:, at], moments.shared[at], target, weight, members)
            slot = self.reservoir.add(lesson, moments.slices[at])
            self.changed.add(slot)
            self.heads.step(self.reservoir.sample(beside=slot))
        self.touched = True
        return numbers

    def silence(self, numbers: Sequence[int]) -> None:
        """Replay these lessons no more; the steps that they made stay, since later ones build on them."""
        for number in numbers:
            slot = self.reservoir.silence(number)
            self.changed.update(() if slot is None else (slot,))
        self.touched |= bool(numbers)

    def count(self, end: float, by: int) -> None:
        """Count an episode's end, or with ``by`` = -1 take it off again."""
        self.ended[end > 0.5] += by
        self.touched = True

    def facts(self) -> dict[str, Any]:
        """What is no array and decides what is foretold, or learned next: JSON values."""
        return {"begun": self.begun, "ended": self.ended, "lessons": self.reservoir.count}

    def take(self, facts: dict[str, Any]) -> None:
        """What :meth:`facts` gave; the count of lessons is the reservoir's to restore."""
        self.begun, self.ended = bool(facts["begun"]), [int(count) for count in facts["ended"]]
