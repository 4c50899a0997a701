"""What ``/status`` of the releaser says of each policy: what is live, what is on its way, what was decided last."""

from __future__ import annotations

import math
import time
from typing import Any

from everloop.event import BASE
from everloop.release import CanaryPlan, Release

from pipelines.sequential import bounds, units_needed
from services.releaser.evidence import lacking
from services.releaser.releaser import Canary, Releaser, Work, state_key
from services.releaser.state import PolicyState, S, last_decision

EVERY = 0.5  # seconds between reports


class Board:
    """The newest report. Written by the releaser's own thread between rounds, read by any."""

    def __init__(self) -> None:
        self.policies: dict[str, Any] = {}
        self.commands: dict[str, Any] = {}
        self._again_at = 0.0

    def update(self, releaser: Releaser) -> None:
        """Make a new report where the last one is ``EVERY`` s old, or an order was answered since."""
        newest = next(reversed(releaser.office.answers), None)
        if time.monotonic() < self._again_at and (newest is None or newest in self.commands):
            return
        self._again_at = time.monotonic() + EVERY
        self.policies = report(releaser)
        self.commands = dict(releaser.office.answers)


def report(releaser: Releaser) -> dict[str, Any]:
    """By 'tenant/policy'. JSON values; times in seconds since 1970."""
    return {key: _policy(releaser, state, releaser.work[key]) for key, state in releaser.states.items()}


def _policy(releaser: Releaser, state: PolicyState, work: Work) -> dict[str, Any]:
    live, decided = state.live, last_decision(state)
    gold = releaser.examiner.gold_count(state.tenant, state.policy)
    return {
        "live": {
            "adapter": BASE if live is None else live.adapter,
            "release": None if live is None else live.id,
            "since": None if live is None else live.time,
            "previous": state.previous.adapter if state.previous else BASE,
            "lacks": [] if live is None else lacking(live),
        },
        "in_progress": _in_progress(state, work, releaser.now()),
        "waiting": [_brief(release, work) for release in state.among(S.CANDIDATE)],
        "last_decision": None if decided is None else _brief(decided, work),
        "gold": {"items": gold, "needed": work.config.gate.min_gold, "enough": gold >= work.config.gate.min_gold},
        "paused": releaser.office.paused(state_key(state)),
        "epoch": state.route.epoch if state.route else 0,
    }


def _brief(release: Release, work: Work) -> dict[str, Any]:
    return {
        "release": release.id,
        "adapter": release.adapter,
        "state": release.state.value,
        "reason": release.reason,
        "waits": work.waits.get(release.id),
        "evidence": _finite({k: v for k, v in release.evidence.items() if k in ("gate", "canary", "by", "run")}),
        "time": release.time,
    }


def _in_progress(state: PolicyState, work: Work, now: float) -> dict[str, Any] | None:
    release = state.canary or state.gated
    if release is None:
        return None
    shown = _brief(release, work)
    canary = work.canary
    if release.plan is None or canary is None or canary.traffic.release != release.id:
        return shown
    return shown | {
        "plan": release.plan.model_dump(),
        "stage": release.stage,
        "seconds": round(now - release.canary_began, 1),
        "arms": _finite(canary.traffic.numbers()),
        "interval": _interval(canary, release.plan),
        "decides": _decides(canary, release.plan),
    }


def _interval(canary: Canary, plan: CanaryPlan) -> dict[str, Any]:
    difference, low, high = bounds(canary.traffic.stages(), plan)
    return {"difference": None if math.isnan(difference) else difference, "low": low, "high": high}


def _decides(canary: Canary, plan: CanaryPlan) -> str:
    """When a verdict may be expected, in words."""
    treated, control = canary.traffic.arms()
    have = min(treated.units, control.units)
    needed = units_needed(plan, variance=control.variance)
    return f"{have} rated units in the smaller arm; about {needed} show that nothing is lost, fewer where it is better"


def _finite(value: Any) -> Any:
    """JSON has no nan: what is not a number is null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
