"""What a score owes to an answer's length, beyond what its label says: learned online, and taken out.

Style is left out of a score, but the vectors of the texts themselves tell long from short, so that a taste for either
comes back through them. What remains is the slope of the logits over the logarithm of the words, among answers of
the same label (of pairs: of the difference of both, among pairs); a score is less that slope times the length. This
is how length is controlled for in AlpacaEval (Dubois et al. 2024, arXiv:2404.04475).

Lessons fade, so that the slope is of the newest ones. Words beyond WORDS count no more: an encoder does not read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]
WORDS = 100  # of an answer: about what an encoder reads of it
FADE = 1 - 1 / 500  # of a lesson, with each one after it
PRIOR = 200.0  # lessons with lengths a factor of e apart, without any slope: how much is needed to believe in one
BAD, GOOD, PAIR = range(3)


def length_of(answer: str) -> float:
    """The logarithm of an answer's words, WORDS at most."""
    return math.log1p(min(len(answer.split()), WORDS))


class Length:
    """Sums over the newest lessons, by what was said: (BAD, GOOD, PAIR; weight, length, logit, length squared, length
    times logit)."""

    def __init__(self) -> None:
        self.sums = np.zeros((3, 5))

    def add(self, said: int, length: float, logit: float, weight: float) -> None:
        """Learn of one lesson; length and logit of a pair are those of the chosen answer less the rejected one's."""
        self.sums *= FADE
        self.sums[said] += np.multiply(weight, (1.0, length, logit, length * length, length * logit))

    @property
    def slope(self) -> float:
        """Logits for a unit of length."""
        weight, length, logit, squared, both = self.sums[self.sums[:, 0] > 0].T
        return float((both - length * logit / weight).sum() / ((squared - length**2 / weight).sum() + PRIOR))

    @property
    def usual(self) -> float:
        """Mean length of the rated answers; 0: none was."""
        weight, length = self.sums[:PAIR, :2].sum(0).tolist()
        return length / weight if weight > 0 else 0.0

    def part(self, answers: Sequence[str]) -> Array:
        """Of each answer's logit, what is its length's: (n,). An answer of the usual length owes nothing to it."""
        lengths = np.array([length_of(answer) for answer in answers])
        return (self.slope * (lengths - self.usual)).astype(np.float32)
