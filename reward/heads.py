"""The ensemble: members that weigh features into a logit, trained online with replay.

A member is linear in its features, so a label and a preference are learned by one step: the logistic loss on an
answer's features, or (Bradley and Terry 1952) on the difference of two answers' features with label 1. Members
differ by the labels that they see (bootstrap masks) and by their own features; steps are AdaGrad (Duchi et al. 2011).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]
OWN_RATE, SHARED_RATE = 16.0, 6.0  # times the learning rate: few features are steered faster than many
DECAY = 1e-4  # of the weights of shared features, a step


class Lesson(NamedTuple):
    """One label as the members see it: what is kept for replay.

    ``own`` (heads, features): each member's features. ``shared`` (features,): those all members see alike. For a
    preference both are differences, chosen minus rejected. ``label`` 0 to 1, ``members`` (heads,) 0 or 1.
    """

    own: Array
    shared: Array
    label: float
    weight: float
    members: Array


class Batch(NamedTuple):
    """Lessons together: own (n, heads, a), shared (n, b), labels (n,), weights (n,), members (n, heads)."""

    own: Array
    shared: Array
    labels: Array
    weights: Array
    members: Array


def probability(logits: Array) -> Array:
    """The logistic function, without overflow."""
    found: Array = np.tanh(0.5 * logits)
    found *= 0.5
    found += 0.5
    return found


@np.errstate(invalid="ignore", over="ignore")  # what is not finite is found by the caller
def loss(own_weights: Array, shared_weights: Array, lessons: Batch) -> float:
    """Mean weighted cross-entropy of all members together."""
    own, shared, labels, weights, members = lessons
    logits = logits_of(own_weights, shared_weights, own.transpose(1, 0, 2), shared)
    return float((weights * members.T * (np.logaddexp(0, logits) - labels * logits)).sum() / labels.size)


@np.errstate(invalid="ignore", over="ignore")
def gradients(own_weights: Array, shared_weights: Array, lessons: Batch) -> tuple[Array, Array]:
    """Those of the loss (heads, features), by own and by shared weights."""
    own, shared, labels, weights, members = lessons
    each = own.transpose(1, 0, 2)  # the lessons of each member
    error = probability(logits_of(own_weights, shared_weights, each, shared)) - labels
    error *= members.T * (weights / labels.size)
    return (error[:, None] @ each)[:, 0], error @ shared


def logits_of(own_weights: Array, shared_weights: Array, own: Array, shared: Array) -> Array:
    """(heads, n) from weights (heads, features), own features (heads, n, a) and shared ones (n, b)."""
    found: Array = shared_weights @ shared.T
    found += (own @ own_weights[:, :, None])[:, :, 0]
    return found


class Heads:
    """Weights (heads, own) and (heads, shared), and AdaGrad's sums beside them; ``own`` and ``shared``: the start."""

    def __init__(self, heads: int, own: Array, shared: Array, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.own = np.tile(own.astype(np.float32), (heads, 1))
        self.shared = np.tile(shared.astype(np.float32), (heads, 1))
        self.own_sums = np.ones_like(self.own)
        self.shared_sums = np.full_like(self.shared, 1e-3)

    def logits(self, own: Array, shared: Array) -> Array:
        """(heads, n) from own features (heads, n, a) and shared ones (n, b)."""
        return logits_of(self.own, self.shared, own, shared)

    def step(self, lessons: Batch) -> bool:
        """One step on these lessons. One that would not be finite is not made; returns whether it was."""
        by_own, by_shared = gradients(self.own, self.shared, lessons)
        if not math.isfinite(float(np.vdot(by_own, by_own)) + float(np.vdot(by_shared, by_shared))):
            return False
        self.own_sums += by_own**2
        self.own -= OWN_RATE * self.learning_rate * by_own / np.sqrt(self.own_sums)
        self.shared_sums += by_shared**2
        self.shared *= 1 - DECAY
        by_shared *= SHARED_RATE * self.learning_rate
        by_shared /= np.sqrt(self.shared_sums)
        self.shared -= by_shared
        return True

    def arrays(self) -> dict[str, Array]:
        """The weights and sums, by name: these very arrays."""
        return {
            "own": self.own,
            "shared": self.shared,
            "own_sums": self.own_sums,
            "shared_sums": self.shared_sums,
        }
