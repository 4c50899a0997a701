"""Advantages: how much better a turn was than expected. Pure functions on NumPy arrays.

A logged episode gives one reward a turn, and generalised advantage estimation over its turns with the value head
as the baseline. A fresh rollout has siblings on the same prompt: the mean of the group is its baseline, and needs
no value head. Either way each turn has one advantage, and every token of the turn carries it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class TurnAdvantages(NamedTuple):
    """One number a turn, shape (turns,). ``returns`` is what the value head learns to predict."""

    advantages: Floats
    returns: Floats


def gae(rewards: Floats, values: Floats, *, discount: float, trace: float) -> TurnAdvantages:
    """Generalised advantage estimation over the turns of one episode, which ends after the last (its value is 0).

    δ_t = r_t + discount · V_{t+1} − V_t and A_t = Σ_k (discount · trace)^k δ_{t+k}; returns are A + V
    (Schulman et al. 2016, arXiv:1506.02438).

    Example: ``gae([0, 1], [0.5, 0.5], discount=1, trace=1)`` gives advantages ``[0.5, 0.5]``.
    """
    if rewards.shape != values.shape:
        raise ValueError(f"one value a turn is needed: {rewards.shape[0]} rewards, {values.shape[0]} values")
    following = np.append(values[1:], 0.0)
    errors = rewards + discount * following - values
    advantages = np.zeros_like(errors)
    carried = 0.0
    for turn in range(len(errors) - 1, -1, -1):
        carried = errors[turn] + discount * trace * carried
        advantages[turn] = carried
    return TurnAdvantages(advantages, advantages + values)


def shaped(rewards: Floats, potentials: Floats, discount: float) -> Floats:
    """Rewards of the turns of one episode with discount · Φ(the next turn) - Φ(this one) added; Φ is 0 after the last.

    Which policy is best does not change, whatever Φ is (Ng, Harada and Russell 1999), also where it learns meanwhile
    (Devlin and Kudenko 2012). What Φ knows of the end reaches a turn when it happens, and not when the episode is over.

    Example: ``shaped([0, 0, 1], [0, 0, 0.9], 1)`` gives ``[0, 0.9, 0.1]``.
    """
    return rewards + discount * np.append(potentials[1:], 0.0) - potentials


def group_centred(rewards: Floats, counts: Floats) -> Floats:
    """Reward minus the mean of the group: all samples of one prompt, identical answers given once with ``counts``.

    Not divided by the group's spread, which would weigh up prompts that are nearly decided (Liu et al. 2025,
    arXiv:2503.20783).

    Example: ``group_centred([1, 0], [3, 1])`` gives ``[0.25, -0.75]``.
    """
    return rewards - float(np.average(rewards, weights=counts))


def normalised(advantages: Floats, weights: Floats, *, centre: bool) -> Floats:
    """Divided by the weighted standard deviation; with ``centre``, the weighted mean is taken off first.

    ``weights`` give every episode the same say, however many calls it has. A batch without any spread has nothing
    to teach: its advantages are 0.
    """
    if advantages.size == 0 or weights.sum() <= 0:
        return np.zeros_like(advantages)
    mean = float(np.average(advantages, weights=weights))
    spread = float(np.sqrt(np.average((advantages - mean * centre) ** 2, weights=weights)))
    return np.zeros_like(advantages) if spread < 1e-8 else (advantages - mean * centre) / spread
