"""The canary's test: is the new adapter worse than the incumbent, by a verdict that may be looked at all the time?

Asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit
theory and asymptotic confidence sequences" (Annals of Statistics 52(6), 2024), one-sided form: for the mean of t
observations with variance s2, all bounds ``mean ± h(t)`` hold at once, over all t, with probability 1 - alpha each
side, where

    h(t) = sqrt( s2 * 2 (t r2 + 1) / (t^2 r2) * log(1 + sqrt(t r2 + 1) / (2 alpha)) )

and ``r2`` only says at which t the bound is tightest. An observation is a *unit of assignment* (a person, else an
episode): one mean each, whoever talks most counts once, and intention to treat.

**Stages.** A unit belongs to the stage in which it came first. Canary and control are compared within a stage, and the
differences d_k are weighted by Mantel and Haenszel's w_k ~ n1 n0 / (n1 + n0) (Journal of the National Cancer Institute
22(4), 1959), so a stage in which only one arm was seen weighs nothing, and a base rate that moves from stage to stage
moves neither side. The weighted difference is a mean over the t units of both arms in all stages, with s2 = t times
its variance, sum of w_k^2 (v1 / n1 + v0 / n0). One sequence runs over all stages: both arms are drawn at the same
time with equal probability in each, nobody changes arms, and the bound holds at any t, so also at those at which a
share was made to grow because of what was seen; alpha is not divided. (Where arms' shares of the traffic did differ
from stage to stage, a plain mean over stages could even change its sign: Crook, Frasca, Kohavi and Longbotham, "Seven
pitfalls to avoid when running controlled experiments on the web", KDD 2009.)

Verdicts: **harm** when the upper bound is below 0 (it is worse, however little: then there is no reason to take
it); **promote**, in the last stage, when the lower bound is above -margin and both arms have ``min_units``; else
**continue**, until time or episodes run out, then **inconclusive**: the incumbent stays. Harm comes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from everloop.release import CanaryPlan
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

FEWEST = 20  # units in each arm before any verdict: the bound holds in the limit, not for a handful
REACHED = 0.8  # of the canary's answers that its adapter must have given before a promotion
WORST_VARIANCE = 0.25  # of a value between 0 and 1
POWER = 0.8  # with which the units that are said to be needed decide

Action = Literal["promote", "harm", "inconclusive", "continue"]


@dataclass(frozen=True)
class Arm:
    """Unit means of one arm: how many, their mean and their variance, on a scale from 0 to 1."""

    units: int
    mean: float
    variance: float


Stages: TypeAlias = Sequence[tuple[Arm, Arm]]
"""(canary, control) of every stage: the units that came in it first."""
Moments: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""Units, means and variances of one arm, stages along the first axis."""


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


def weighted(canary: Moments, control: Moments) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(difference, its variance, units of both arms) over stages, which lie along the first axis of each array.

    Units are 0 where no stage has some of both arms.
    """
    (n1, m1, v1), (n0, m0, v0) = canary, control
    used = (n1 > 0) & (n0 > 0)
    first, second = np.maximum(n1, 1), np.maximum(n0, 1)
    units = np.where(used, n1 + n0, 0.0)
    weights = np.where(used, n1 * n0 / (first + second), 0.0)
    weights = weights / np.maximum(weights.sum(axis=0), 1e-300)
    difference = np.where(used, weights * (m1 - m0), 0.0).sum(axis=0)
    variance = (weights**2 * (v1 / first + v0 / second)).sum(axis=0)
    return difference, variance, units.sum(axis=0)


def stratified(canary: Moments, control: Moments, plan: CanaryPlan) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(difference, half the width of its sequence) of canary minus control; nan and infinity where nothing compares."""
    difference, variance, units = weighted(canary, control)
    total = np.maximum(units, 1)
    width = half_width(total, total * variance, plan.alpha, mixture_variance(plan.alpha, tightest_at(plan)))
    return np.where(units > 0, difference, math.nan), np.where(units > 0, width, math.inf)


def bounds(stages: Stages, plan: CanaryPlan) -> tuple[float, float, float]:
    """(difference, lower bound, upper bound) of canary minus control; (nan, -1, 1) while nothing can be compared."""
    canary, control = (_moments([pair[side] for pair in stages]) for side in (0, 1))
    difference, width = (float(value) for value in stratified(canary, control, plan))
    if math.isnan(difference):
        return math.nan, -1.0, 1.0
    return difference, max(difference - width, -1.0), min(difference + width, 1.0)


def _moments(arms: Sequence[Arm]) -> Moments:
    fields = ([one.units for one in arms], [one.mean for one in arms], [one.variance for one in arms])
    units, mean, variance = (np.asarray(values, dtype=np.float64) for values in fields)
    return units, mean, variance


def over_all(stages: Stages) -> tuple[Arm, Arm]:
    """(canary, control) with the units of all stages together, for people: verdicts compare within stages."""
    return _together([canary for canary, _ in stages]), _together([control for _, control in stages])


def _together(arms: Sequence[Arm]) -> Arm:
    units = sum(one.units for one in arms)
    if not units:
        return Arm(0, math.nan, WORST_VARIANCE)
    mean = sum(one.units * one.mean for one in arms if one.units) / units
    around = sum(one.units * (one.variance + (one.mean - mean) ** 2) for one in arms if one.units)
    return Arm(units, mean, around / units)


def judge(
    stages: Stages, plan: CanaryPlan, *, seconds: float, episodes: int, last: bool = True, reached: float = 1.0
) -> Verdict:
    """The verdict now. ``seconds`` since the canary began, ``episodes`` assigned to both arms so far.

    ``last``: the canary is in its last stage, the only one that leads to a promotion. ``reached``: the share of the
    canary's answers that its adapter gave. Units count for the arm that they were assigned to, so an adapter that
    the engine seldom holds looks like what is live: below :data:`REACHED` that is no reason to promote it.
    """
    difference, low, high = bounds(stages, plan)
    canary, control = over_all(stages)
    fewest = min(canary.units, control.units)
    seen = f"{plan.metric} {canary.mean:.3f} against {control.mean:.3f} ({canary.units} and {control.units} units)"
    if fewest >= FEWEST and high < 0:
        return Verdict("harm", f"{seen}: worse, the upper bound is {high:+.3f}", difference, low, high)
    if last and reached < REACHED:
        seen += f"; the adapter gave {reached:.0%} of the canary's answers, and {REACHED:.0%} are needed"
    elif last and not_inferior(fewest, low, plan):
        text = f"{seen}: not inferior, the lower bound {low:+.3f} is above -{plan.margin:g}"
        return Verdict("promote", text, difference, low, high)
    over = _over(plan, seconds, episodes)
    if over:
        return Verdict("inconclusive", f"{seen}: undecided {over}, so the incumbent stays", difference, low, high)
    return Verdict("continue", f"{seen}: undecided, between {low:+.3f} and {high:+.3f}", difference, low, high)


def stage_lacks(plan: CanaryPlan, canary: int, control: int, seconds: float) -> str | None:
    """What a stage still needs before the share grows, in words; None: nothing.

    ``canary`` and ``control`` are the units of each arm that came in this stage, rated or not, ``seconds`` its age.
    That guards are quiet and no harm is shown goes without saying: either ends the canary.
    """
    fewest = min(canary, control)
    if fewest < plan.stage_units:
        return f"{fewest} of {plan.stage_units} people (or episodes) that each arm needs before the share grows"
    if seconds < plan.stage_seconds:
        return f"the share grows in {plan.stage_seconds - seconds:.0f} s at the earliest"
    return None


def not_inferior(units: int, low: float, plan: CanaryPlan) -> bool:
    """Whether ``units`` in the smaller arm, with this lower bound of the difference, show that nothing is lost."""
    return units >= max(FEWEST, plan.min_units) and low > -plan.margin


def _over(plan: CanaryPlan, seconds: float, episodes: int) -> str:
    if seconds >= plan.max_seconds:
        return f"after its longest time of {plan.max_seconds:g} s"
    return f"after its {plan.max_episodes} episodes" if episodes >= plan.max_episodes else ""


def units_needed(
    plan: CanaryPlan, *, difference: float = 0.0, variance: float = 0.65 * 0.35, power: float = POWER
) -> int:
    """Rated units in each arm with which a canary of this true ``difference`` is promoted with this ``power``.

    ``variance`` is that of unit means. The same number shows a true drop of ``difference + margin`` to be harm: the
    room between truth and bound is the same. The sequence's width and the normal spread of the difference at n units
    an arm must both fit into that room, so the power is that of one look at n; earlier looks only add to it.

    Raises ValueError where the difference is at or below -margin: never.
    """
    room = difference + plan.margin
    if room <= 0:
        raise ValueError(f"a difference of {difference:g} is never shown to be within a margin of {plan.margin:g}")
    r2 = mixture_variance(plan.alpha, tightest_at(plan))
    spread = float(ndtri(power))

    def short(n: int) -> bool:
        return float(half_width(2 * n, 4 * variance, plan.alpha, r2)) + spread * math.sqrt(2 * variance / n) > room

    high = max(plan.min_units, FEWEST)
    if not short(high):
        return high
    while short(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if short(middle) else (low, middle)
    return high
