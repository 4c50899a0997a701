"""How probable it is that somebody speaks of an answer, so that answers of the kind that nobody speaks of are not
forgotten: silence is no verdict, but who is silent differs.

A label counts as the inverse of that probability (Horvitz and Thompson 1952), within LEAST and MOST, and divided by the
mean so far, so that labels weigh 1 on the whole. The probability is logistic in the turn, the tools, and the answer's
length. A call is first seen without a word; if one comes it is seen again, with it: so the odds of what is learned are
the probability (the fake negatives of Ktena et al. 2019, arXiv:1907.06558), whenever the word came.

What drives both the silence and the verdict and is none of these (the displeased speak more) is not seen here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from reward import features
from reward.features import Example, style_vector

Array = np.ndarray[Any, np.dtype[np.float64]]
LEAST, MOST = 0.2, 5.0  # of a label's weight
TRUST = 50.0  # labels after which half of the logarithm of a weight is believed
STEEPEST = 6.0  # log-odds that a call may differ from the mean one
PRIOR = 1.0  # precision of each coefficient around none
LONG = 5_000.0  # calls, and labels, over which means are formed
FADE = 1 - 1 / LONG  # of what is known, a call
LENGTHS = 2  # of the style's numbers: those of length
SIZE = len(features.STRUCTURE) + LENGTHS


class Propensity:
    """Constant memory; the same calls in the same order give the same bits. ``weights`` (1 + SIZE,): the constant, then
    what each number, less its mean, adds to the log-odds."""

    def __init__(self) -> None:
        self.weights: Array = np.zeros(1 + SIZE)
        self.known: Array = np.zeros((1 + SIZE, 1 + SIZE))  # precision beyond the prior's
        self.means: Array = np.zeros(SIZE)
        self.calls, self.labels = 0.0, 0.0
        self.mean = 1.0  # of the labels' weights before they were divided by it

    def saw(self, example: Example) -> None:
        """A call that nobody has spoken of yet."""
        self.calls += 1
        self.means += (_numbers(example) - self.means) / min(self.calls, LONG)
        self._step(example, 0.0)

    def spoken(self, example: Example) -> float:
        """The first word about a call: what its label weighs. Then learn that there was one."""
        weight = self.weight(example)
        self.labels += 1
        self.mean += (self._raw(example) - self.mean) / min(self.labels + TRUST, LONG)
        self._step(example, 1.0)
        return weight

    def weight(self, example: Example) -> float:
        """LEAST to MOST; 1 while nothing is known."""
        return min(max(self._raw(example) / self.mean, LEAST), MOST)

    def _raw(self, example: Example) -> float:
        """Up to a factor, which the mean takes out, the inverse of the probability; believed by how many spoke."""
        believed = self.labels / (self.labels + TRUST)
        odds = float(self.weights[1:] @ (_numbers(example) - self.means))
        return math.exp(-believed * min(max(odds, -STEEPEST), STEEPEST))

    def _step(self, example: Example, spoken: float) -> None:
        """One Newton step of the logistic likelihood, with a Gaussian prior."""
        seen = np.concatenate([[1.0], _numbers(example) - self.means])
        probability = 1 / (1 + math.exp(-min(max(float(self.weights @ seen), -30.0), 30.0)))
        self.known = FADE * self.known + probability * (1 - probability) * np.outer(seen, seen)
        self.weights += np.linalg.solve(self.known + PRIOR * np.eye(1 + SIZE), seen * (spoken - probability))

    def dump(self) -> list[Any]:
        """JSON values, from which :meth:`take` makes the same."""
        return [self.weights.tolist(), self.known.tolist(), self.means.tolist(), self.calls, self.labels, self.mean]

    def take(self, held: list[Any]) -> None:
        weights, known, means, self.calls, self.labels, self.mean = held
        self.weights[:], self.known[:], self.means[:] = weights, known, means


def _numbers(example: Example) -> Array:
    return np.array([*example.structure.vector(), *style_vector(example.answer)[:LENGTHS]])
