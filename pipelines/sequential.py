"""The canary's test: is the new adapter worse than the incumbent, by a verdict that may be looked at all the time?

Asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit
theory and asymptotic confidence sequences" (Annals of Statistics 52(6), 2024), one-sided form: for the mean of t
observations with variance s2, all bounds ``mean ± h(t)`` hold at once, over all t, with probability 1 - alpha each
side, where

    h(t) = sqrt( s2 * 2 (t r2 + 1) / (t^2 r2) * log(1 + sqrt(t r2 + 1) / (2 alpha)) )

and ``r2`` only says at which t the bound is tightest. The difference of two arms' means is such a mean over the
t = n1 + n0 units of both arms, with s2 = t (v1 / n1 + v0 / n0). An observation is a *unit of assignment* (a person,
else an episode): one mean each, whoever talks most counts once, and intention to treat.

Verdicts: **harm** when the upper bound is below 0 (it is worse, however little: then there is no reason to take
it); **promote** when the lower bound is above -margin and both arms have ``min_units``; else **continue**, until
time or episodes run out, then **inconclusive**: the incumbent stays. Harm comes first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from everloop.release import CanaryPlan
from numpy.typing import ArrayLike, NDArray

FEWEST = 20  # units in each arm before any verdict: the bound holds in the limit, not for a handful
WORST_VARIANCE = 0.25  # of a value between 0 and 1

Action = Literal["promote", "harm", "inconclusive", "continue"]


@dataclass(frozen=True)
class Arm:
    """Unit means of one arm: how many, their mean and their variance, on a scale from 0 to 1."""

    units: int
    mean: float
    variance: float


@dataclass(frozen=True)
class Verdict:
    """``low`` and ``high`` bound canary minus control; both hold at all times, each with probability 1 - alpha."""

    action: Action
    reason: str
    difference: float
    low: float
    high: float

    def numbers(self) -> dict[str, Any]:
        return {"difference": self.difference, "low": self.low, "high": self.high}


def arm(values: ArrayLike) -> Arm:
    """The summary of unit means, each from 0 to 1."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return Arm(0, math.nan, WORST_VARIANCE)
    variance = float(variance_of(array.size, array.sum(), np.square(array).sum()))
    return Arm(array.size, float(array.mean()), variance)


def variance_of(n: ArrayLike, total: ArrayLike, squares: ArrayLike) -> NDArray[np.float64]:
    """Sample variance from n, the sum and the sum of squares; for arrays.

    One observation at 0 and one at 1 are added: a few equal thumbs are no certainty.
    """
    count = np.asarray(n, dtype=np.float64) + 2
    spread: NDArray[np.float64] = (np.asarray(squares) + 1 - (np.asarray(total) + 1) ** 2 / count) / (count - 1)
    return spread


def tightest_at(plan: CanaryPlan) -> float:
    """The number of units in both arms at which the bound is tightest: about where a margin of no loss is shown."""
    return max(2.0 * plan.min_units, 9.0 * 4 * WORST_VARIANCE / plan.margin**2)


def mixture_variance(alpha: float, at: float) -> float:
    """``r2`` of the bound that is tightest at ``at`` units (the paper's equation for rho, one-sided: 2 alpha)."""
    spent = -2 * math.log(2 * alpha)
    return (spent + math.log(max(spent, 1e-12)) + 1) / at if spent > 0.1 else 1.0 / at


def half_width(units: ArrayLike, variance: ArrayLike, alpha: float, r2: float) -> NDArray[np.float64]:
    """h(t) above, for arrays of t and s2."""
    t, s2 = np.asarray(units, dtype=np.float64), np.asarray(variance, dtype=np.float64)
    grown = t * r2 + 1
    width: NDArray[np.float64] = np.sqrt(s2 * 2 * grown / (t**2 * r2) * np.log1p(np.sqrt(grown) / (2 * alpha)))
    return width


def width_between(n1: ArrayLike, v1: ArrayLike, n0: ArrayLike, v0: ArrayLike, plan: CanaryPlan) -> NDArray[np.float64]:
    """Half the width of the sequence for the difference of two arms' means; for arrays of units and variances."""
    first, second = np.asarray(n1, dtype=np.float64), np.asarray(n0, dtype=np.float64)
    units = first + second
    variance = units * (np.asarray(v1) / first + np.asarray(v0) / second)
    return half_width(units, variance, plan.alpha, mixture_variance(plan.alpha, tightest_at(plan)))


def bounds(canary: Arm, control: Arm, plan: CanaryPlan) -> tuple[float, float, float]:
    """(difference, lower bound, upper bound) of canary minus control; (nan, -1, 1) while an arm is empty."""
    if not canary.units or not control.units:
        return math.nan, -1.0, 1.0
    width = float(width_between(canary.units, canary.variance, control.units, control.variance, plan))
    difference = canary.mean - control.mean
    return difference, max(difference - width, -1.0), min(difference + width, 1.0)


def judge(canary: Arm, control: Arm, plan: CanaryPlan, *, seconds: float, episodes: int) -> Verdict:
    """The verdict now. ``seconds`` since the canary began, ``episodes`` assigned to both arms so far."""
    difference, low, high = bounds(canary, control, plan)
    fewest = min(canary.units, control.units)
    seen = f"{plan.metric} {canary.mean:.3f} against {control.mean:.3f} ({canary.units} and {control.units} units)"
    if fewest >= FEWEST and high < 0:
        return Verdict("harm", f"{seen}: worse, the upper bound is {high:+.3f}", difference, low, high)
    if not_inferior(fewest, low, plan):
        text = f"{seen}: not inferior, the lower bound {low:+.3f} is above -{plan.margin:g}"
        return Verdict("promote", text, difference, low, high)
    over = _over(plan, seconds, episodes)
    if over:
        return Verdict("inconclusive", f"{seen}: undecided {over}, so the incumbent stays", difference, low, high)
    return Verdict("continue", f"{seen}: undecided, between {low:+.3f} and {high:+.3f}", difference, low, high)


def not_inferior(units: int, low: float, plan: CanaryPlan) -> bool:
    """Whether ``units`` in the smaller arm, with this lower bound of the difference, show that nothing is lost."""
    return units >= max(FEWEST, plan.min_units) and low > -plan.margin


def _over(plan: CanaryPlan, seconds: float, episodes: int) -> str:
    if seconds >= plan.max_seconds:
        return f"after its longest time of {plan.max_seconds:g} s"
    return f"after its {plan.max_episodes} episodes" if episodes >= plan.max_episodes else ""


def units_needed(plan: CanaryPlan, *, rate: float = 0.65, difference: float = 0.0) -> int:
    """Rated units in each arm after which a canary of this true ``difference`` is promoted, typically.

    ``rate`` is the share of good answers. Raises ValueError where the difference is at or below -margin: never.
    """
    room = difference + plan.margin
    if room <= 0:
        raise ValueError(f"a difference of {difference:g} is never shown to be within a margin of {plan.margin:g}")
    r2 = mixture_variance(plan.alpha, tightest_at(plan))
    high = 1
    while half_width(high, 4 * rate * (1 - rate), plan.alpha, r2) > room:
        high *= 2
    totals = np.arange(max(high // 2, 1), high + 1)
    enough = totals[half_width(totals, 4 * rate * (1 - rate), plan.alpha, r2) <= room]
    return max(math.ceil(int(enough[0]) / 2), plan.min_units, FEWEST)
