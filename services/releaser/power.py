"""What is said before a canary starts: how many rated people it needs, and how long that takes. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple

from everloop.release import CanaryPlan

from pipelines.sequential import POWER, WORST_VARIANCE, units_needed
from services.releaser.recent import Recent

DROP = 0.02  # the small loss that is told beside the margin's
FEW = 20  # rated units lately, below which nothing is concluded from their spread


def forecast(plan: CanaryPlan, recent: Recent) -> dict[str, Any]:
    """For evidence: units and episodes of each arm, and seconds (None: nothing new was rated lately), for two drops."""
    variance = recent.rated.variance if recent.rated.units >= FEW else WORST_VARIANCE
    return {
        "power": POWER,
        "rated_units_a_day": round(86_400 * recent.rated_rate, 1),
        "margin": _needed(plan, recent, plan.margin, variance),
        "small": _needed(plan, recent, DROP, variance),
    }


def _needed(plan: CanaryPlan, recent: Recent, drop: float, variance: float) -> dict[str, Any]:
    units = units_needed(plan, difference=drop - plan.margin, variance=variance)
    episodes = round(units * max(recent.episodes, 1.0))
    seconds = seconds_until(plan, Rates(recent.rated_rate, recent.seen_rate), units)
    return {"drop": drop, "units": units, "episodes": episodes, "seconds": seconds}


class Rates(NamedTuple):
    """New units a second of the whole traffic: that rate, and that come at all."""

    rated: float
    seen: float


def seconds_until(plan: CanaryPlan, rates: Rates, units: int, have: int = 0, stage: int = 0) -> float | None:
    """Until each arm has ``units`` rated ones, from the beginning of ``stage``; None: never, at this traffic."""
    if rates.rated <= 0 or rates.seen <= 0:
        return None
    *before, last = plan.shares[stage:]
    waited, rated = 0.0, float(have)
    for share in before:
        longest = max(plan.stage_seconds, plan.stage_units / (share * rates.seen))
        waited += longest
        rated += longest * share * rates.rated
    return waited + max(units - rated, 0.0) / (last * rates.rated)


def told(plan: CanaryPlan, its: dict[str, Any]) -> str:
    """The forecast in words."""
    margin, small = its["margin"], its["small"]
    text = (
        f"to show with {its['power']:.0%} power that no more than {100 * margin['drop']:g} points are lost takes about "
        f"{_units(margin)} in each arm: {_time(margin)}"
    )
    if margin["seconds"] is not None and margin["seconds"] > plan.max_seconds:
        text += f", longer than the {duration(plan.max_seconds)} that it may take: a larger share or margin is needed"
    return f"{text}; a {100 * small['drop']:g}-point drop takes about {_units(small)}: {_time(small)}"


def _units(needed: dict[str, Any]) -> str:
    return f"{needed['units']:,} rated people ({needed['episodes']:,} rated episodes)"


def _time(needed: dict[str, Any]) -> str:
    seconds = needed["seconds"]
    return (
        "nobody knows how long, for nobody new rated lately"
        if seconds is None
        else f"{duration(seconds)} at your traffic"
    )


def duration(seconds: float) -> str:
    """As people say it: '40 s', '12 min', '5 h', '3.2 days'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 2 * 86_400 else f"{seconds / 86_400:,.1f} days"
