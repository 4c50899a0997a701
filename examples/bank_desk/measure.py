"""Measuring the desk: exact match on held-out messages, and whether a difference is more than luck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from examples.bank_desk.data import Message

RESAMPLES = 10_000


class Measured(NamedTuple):
    """``right[i]``: whether held-out message i was answered right. ``messages``: how many were served before."""

    messages: int
    version: str
    right: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


class Gain(NamedTuple):
    """Difference of two accuracies on the same messages, with its two-sided 95% bootstrap interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(before: Sequence[bool], after: Sequence[bool], seed: int = 0) -> Gain:
    """The gain from ``before`` to ``after``, message by message (Efron 1979; percentile interval).

    Messages are resampled with replacement, both answers to one together. Raises ValueError where the two are not
    about the same number of messages, or about none.

    Example: ``paired_bootstrap([False, False], [True, True]) == Gain(1.0, 1.0, 1.0)``
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"a paired gain needs the same messages in both: {len(before)} before, {len(after)} after")
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    many = len(difference)
    # How often each message is drawn is all that matters: three values occur, so draw their counts.
    values, counts = np.unique(difference, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(many, counts / many, size=RESAMPLES)
    means = drawn @ values / many
    low, high = np.quantile(means, [0.025, 0.975])
    return Gain(float(difference.mean()), float(low), float(high))


def measure(ask: Callable[[str], str], held_out: Sequence[Message], workers: int) -> tuple[bool, ...]:
    """Whether each held-out message is answered with exactly its topic."""
    with ThreadPoolExecutor(workers) as pool:
        return tuple(pool.map(lambda message: ask(message.text) == message.topic, held_out))
