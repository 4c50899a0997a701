"""What ``/status`` of the releaser says of each policy: what is live, what is on its way, what was decided last."""

from __future__ import annotations

import math
import time
from typing import Any

from everloop.event import BASE, PROVIDER
from everloop.release import CanaryPlan, Release

from pipelines.sequential import bounds, units_needed
from services.releaser.evidence import lacking
from services.releaser.power import Rates, duration, seconds_until
from services.releaser.releaser import Canary, Releaser, Work, state_key
from services.releaser.state import PolicyState, S, last_decision

EVERY = 0.5  # seconds between reports


class Board:
    """The newest report. Written by the releaser's own thread between rounds, read by any."""

    def __init__(self) -> None:
        self.policies: dict[str, Any] = {}
        self.commands: dict[str, Any] = {}
        self.releases: dict[str, Release] = {}
        self._again_at = 0.0

    def progress(self, id: str) -> dict[str, Any] | None:
        """Of the release that is on its way now; None: it is not this one."""
        found = ((policy.get("in_progress") or {}) for policy in self.policies.values())
        return next((its for its in found if its.get("release") == id), None)

    def update(self, releaser: Releaser) -> None:
        """Make a new report where the last one is ``EVERY`` s old, or an order was answered since."""
        newest = next(reversed(releaser.office.answers), None)
        if time.monotonic() < self._again_at and (newest is None or newest in self.commands):
            return
        self._again_at = time.monotonic() + EVERY
        self.policies = report(releaser)
        self.releases = {id: release for state in releaser.states.values() for id, release in state.releases.items()}
        self.commands = dict(releaser.office.answers)


def report(releaser: Releaser) -> dict[str, Any]:
    """By 'tenant/policy'. JSON values; times in seconds since 1970."""
    return {key: _policy(releaser, state, releaser.work[key]) for key, state in releaser.states.items()}


def _policy(releaser: Releaser, state: PolicyState, work: Work) -> dict[str, Any]:
    live, decided = state.live, last_decision(state)
    gold = releaser.examiner.gold_count(state.tenant, state.policy)
    provider = work.config.provider
    unadapted = BASE if work.config.incumbent is None else PROVIDER
    return {
        "provider": provider and {"host": provider.host, "model": provider.model, "role": provider.role},
        "live": {
            "adapter": unadapted if live is None else live.adapter,
            "release": None if live is None else live.id,
            "since": None if live is None else live.time,
            "previous": state.previous.adapter if state.previous else unadapted,
            "lacks": [] if live is None else lacking(live),
        },
        "in_progress": _in_progress(state, work, releaser.now()),
        "waiting": [_brief(release, work) for release in state.among(S.CANDIDATE)],
        "last_decision": None if decided is None else _brief(decided, work),
        "gold": {"items": gold, "needed": work.config.gate.min_gold, "enough": gold >= work.config.gate.min_gold},
        "registry": list(releaser.aliases.said(state_key(state))),
        "pinned": releaser.pins.described(state_key(state)),
        "paused": releaser.office.paused(state_key(state)),
        "frozen": releaser.office.frozen(state_key(state)),
        "epoch": state.route.epoch if state.route else 0,
    }


def _brief(release: Release, work: Work) -> dict[str, Any]:
    return {
        "release": release.id,
        "adapter": release.adapter,
        "state": release.state.value,
        "reason": release.reason,
        "waits": work.waits.get(release.id),
        "evidence": _finite(_short(release.evidence)),
        "time": release.time,
    }


def _short(evidence: dict[str, Any]) -> dict[str, Any]:
    shown = {k: v for k, v in evidence.items() if k in ("gate", "canary", "shadow", "power", "by", "run")}
    if "canary" in shown:
        shown["canary"] = {k: v for k, v in shown["canary"].items() if k != "history"}
    return shown


def _in_progress(state: PolicyState, work: Work, now: float) -> dict[str, Any] | None:
    release = state.canary or state.gated
    if release is None:
        return None
    shown = _brief(release, work)
    canary = work.canary
    if release.plan is None or canary is None or canary.traffic.release != release.id:
        return shown
    limits = work.config.canary
    return shown | {
        "plan": release.plan.model_dump(),
        "stage": release.stage,
        "share": release.plan.shares[release.stage],
        "seconds": round(now - release.canary_began, 1),
        "arms": _finite(canary.traffic.numbers()),
        "interval": _interval(canary, release.plan),
        "history": canary.history.points,
        "decides": decides(release, release.plan, canary, now),
        "guards": limits.model_dump(include=set(GUARDS)),
        "stops": stops(release.plan, limits.model_dump(include=set(GUARDS))),
    }


def _interval(canary: Canary, plan: CanaryPlan) -> dict[str, Any]:
    difference, low, high = bounds(canary.traffic.stages(), plan)
    return {"difference": None if math.isnan(difference) else difference, "low": low, "high": high}


def decides(release: Release, plan: CanaryPlan, canary: Canary, now: float) -> str:
    """When a verdict may be expected at the traffic that this canary has had, in words."""
    treated, control = canary.traffic.arms()
    have, needed = min(treated.units, control.units), units_needed(plan, variance=control.variance)
    left = seconds_until(plan, rates(release, plan, canary, now), needed, have, release.stage)
    when = "at this traffic nobody can say when" if left is None else f"at this traffic in about {duration(left)}"
    latest = duration(max(plan.max_seconds - (now - release.canary_began), 0.0))
    return (
        f"{have:,} rated units in the smaller arm of about {needed:,} that show that nothing is lost: {when}, sooner "
        f"where it is better; in {latest} at the latest, or the incumbent stays"
    )


def rates(release: Release, plan: CanaryPlan, canary: Canary, now: float) -> Rates:
    """Of the whole traffic, from what the arms got of it in the stages so far."""
    ends = [*release.stages[1:], now]
    given = sum(share * (end - begun) for share, begun, end in zip(plan.shares, release.stages, ends, strict=False))
    came = min(sum(side) for side in zip(*(canary.traffic.came(at) for at in range(len(plan.shares))), strict=True))
    if given <= 0:
        return Rates(0.0, 0.0)
    return Rates(min(arm.units for arm in canary.traffic.arms()) / given, came / given)


GUARDS = ("max_error_share", "max_empty_share", "max_broken_share", "max_length_ratio")


def stops(plan: CanaryPlan, guards: dict[str, float]) -> list[str]:
    """What would end this canary without a promotion, in words. ``guards``: the configured limits."""
    told = [
        "the interval's upper bound falls below 0: worse, however little",
        f"{duration(plan.max_seconds)} or {plan.max_episodes:,} episodes pass without a verdict: the incumbent stays",
    ]
    if guards:
        told.append(
            f"a guard: calls fail for more than {guards['max_error_share']:.0%} of the canary's people, answers are "
            f"empty for {guards['max_empty_share']:.0%} or tool calls broken for {guards['max_broken_share']:.0%}, and "
            f"more than the control's; or answers are {guards['max_length_ratio']:g} times as long"
        )
    return told


def _finite(value: Any) -> Any:
    """JSON has no nan: what is not a number is null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
