"""Guards of a canary: does the new adapter fail, say nothing, break tool calls or ramble more than the incumbent does?

**Something went wrong for a unit, or it did not.** Whoever takes part in a canary is in one arm or the other with
equal probability. So, where the adapter makes no difference, every unit that something goes wrong for is the canary's
by the toss of a fair coin, whatever the cause: an engine that dies, an hour of hard questions, one person who asks a
thousand times (a unit counts once). The coin is tested by a mixture of likelihood ratios over its bias q,

    E = 2^(a + b) * integral over q in (1/2, 1) of q^a (1 - q)^b p(q),    p(q) ~ q^(SURE - 1)

for a units of the canary and b of the control. E is a nonnegative martingale that begins at 1, so the probability that
it ever reaches 1 / alpha is at most alpha (Ville's inequality; Robbins, "Statistical methods related to the law of the
iterated logarithm", Annals of Mathematical Statistics 41(5), 1970; Ramdas, Gruenwald, Vovk and Shafer,
"Game-theoretic statistics and safe anytime-valid inference", Statistical Science 38(4), 2023). It is exact for any
number of units, and may be looked at after every call. With alpha 0.005, nine units of the canary and none of the
control are enough.

**How long answers are** is compared by the confidence sequence of :mod:`pipelines.sequential`, on units' mean log
length: the canary's are longer for certain, *and* longer by the limit as measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.special import betaincc, betaln

from pipelines.sequential import FEWEST, half_width, mixture_variance

ALPHA = 0.005  # probability that one of the guards ever blames an adapter that makes no difference
SURE = 9.0  # weight of p(q) towards 1: what breaks most answers is to be found with few units
TYPICAL_LENGTHS = 100.0  # units of both arms at which the bound on lengths is tightest


class Lengths(NamedTuple):
    """Mean log lengths of one arm's units: how many units, their mean, their sample variance."""

    units: int
    mean: float
    variance: float


def e_value(canary: int, control: int) -> float:
    """E above, for so many affected units of each arm."""
    a, b = canary + SURE, control + 1.0
    tail = float(betaincc(a, b, 0.5))
    if tail <= 0:
        return 0.0
    at_start = float(betaln(SURE, 1.0)) + math.log1p(-(0.5**SURE))
    said = (canary + control) * math.log(2) + float(betaln(a, b)) + math.log(tail) - at_start
    return math.exp(min(said, 700.0))


def blamed(canary: int, control: int) -> bool:
    """Whether so many affected units of each arm are the adapter's doing."""
    return e_value(canary, control) >= 1 / ALPHA


def longer(canary: Lengths, control: Lengths) -> float | None:
    """By which factor the canary's answers are longer than the control's; None: they are not, for all one can say."""
    if min(canary.units, control.units) < FEWEST:
        return None
    t = canary.units + control.units
    variance = t * (canary.variance / canary.units + control.variance / control.units)
    width = float(half_width(t, variance, ALPHA, mixture_variance(ALPHA, TYPICAL_LENGTHS)))
    difference = canary.mean - control.mean
    return float(np.exp(difference)) if difference > width else None
