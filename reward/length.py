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
        self.sums = [[0.0] * 5 for _ in (BAD, GOOD, PAIR)]

    def add(self, said: int, length: float, logit: float, weight: float) -> None:
        """Learn of one lesson; length and logit of a pair are those of the chosen answer less the rejected one's."""
        for row in self.sums:
            row[:] = [FADE * part for part in row]
        told = (1.0, length, logit, length * length, length * logit)
        self.sums[said] = [part + weight * new for part, new in zip(self.sums[said], told, strict=True)]

    @property
    def slope(self) -> float:
        """Logits for a unit of length."""
        along, squares = 0.0, PRIOR
        for weight, length, logit, squared, both in self.sums:
            if weight > 0:
                along += both - length * logit / weight
                squares += squared - length * length / weight
        return along / squares

    @property
    def usual(self) -> float:
        """Mean length of the rated answers; 0: none was."""
        weight = self.sums[BAD][0] + self.sums[GOOD][0]
        return (self.sums[BAD][1] + self.sums[GOOD][1]) / weight if weight > 0 else 0.0

    def part(self, answers: Sequence[str]) -> Array:
        """Of each answer's logit, what is its length's: (n,). An answer of the usual length owes nothing to it."""
        slope, usual = self.slope, self.usual
        return np.array([slope * (length_of(answer) - usual) for answer in answers], np.float32)
