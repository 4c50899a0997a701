"""What is known of one policy's releases, folded from the log, and every step that may follow. Pure.

The topic ``releases`` is the authority; :class:`PolicyState` is it in memory, rebuilt at each start. A step is a
:class:`Change`: new versions of releases and the route that they make true, appended together, the route first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from everloop.errors import TransitionRefused
from everloop.event import BASE
from everloop.release import ENDED, Adapter, CanaryPlan, Release, ReleaseState, Route

S = ReleaseState


class Change(NamedTuple):
    """What to append. ``route`` None: who answers stays as it is."""

    releases: tuple[Release, ...]
    route: Route | None = None


@dataclass
class PolicyState:
    """All releases of a policy by id, newest version of each, in the order in which they became candidates."""

    tenant: str
    policy: str
    releases: dict[str, Release] = field(default_factory=dict)
    route: Route | None = None
    orders: set[str] = field(default_factory=set)
    """Ids of commands that releases say they were moved by: an order that is read again is not done again."""

    def take(self, release: Release) -> None:
        """Fold one version in; an older one, or the same again, changes nothing."""
        held = self.releases.get(release.id)
        if held is None or release.step > held.step:
            self.releases[release.id] = release
        if order := release.evidence.get("order"):
            self.orders.add(str(order))

    def take_route(self, route: Route) -> None:
        if self.route is None or route.epoch > self.route.epoch:
            self.route = route

    def apply(self, change: Change) -> None:
        """The state after a change that the log has."""
        for release in change.releases:
            self.take(release)
        if change.route is not None:
            self.take_route(change.route)

    def after(self, *releases: Release) -> PolicyState:
        """A copy with these versions folded in."""
        copy = PolicyState(self.tenant, self.policy, dict(self.releases), self.route, set(self.orders))
        for release in releases:
            copy.take(release)
        return copy

    def among(self, *states: ReleaseState) -> list[Release]:
        """Those in one of these states, oldest candidate first."""
        return [release for release in self.releases.values() if release.state in states]

    @property
    def live(self) -> Release | None:
        """None: the base model is live."""
        return next(iter(self.among(S.LIVE)), None)

    @property
    def live_adapter(self) -> str:
        return BASE if self.live is None else self.live.adapter

    @property
    def canary(self) -> Release | None:
        return next(iter(self.among(S.CANARY)), None)

    @property
    def gated(self) -> Release | None:
        return next(iter(self.among(S.GATED)), None)

    @property
    def waiting(self) -> Release | None:
        """The candidate whose turn it is: the newest."""
        candidates = self.among(S.CANDIDATE)
        return candidates[-1] if candidates else None

    @property
    def previous(self) -> Release | None:
        """What a rollback of the live release leads to; None: the base model."""
        if self.live is None:
            return None
        retired = self.among(S.RETIRED)
        return next((release for release in reversed(retired) if release.adapter == self.live.incumbent), None)

    @property
    def resident(self) -> dict[str, Release]:
        """By adapter, everything that an engine should hold: live, canary, next, and the way back."""
        wanted = (self.live, self.canary, self.gated, self.previous)
        return {release.adapter: release for release in wanted if release is not None}

    def find(self, name: str) -> Release:
        """By release id, adapter hash, or a prefix of either that fits one alone. Raises TransitionRefused."""
        fits = [r for r in self.releases.values() if r.id.startswith(name) or r.adapter.startswith(name)]
        exact = [r for r in fits if name in (r.id, r.adapter)]
        found = exact or fits
        if len(found) != 1 or not name:
            what = "no release" if not found else f"{len(found)} releases"
            raise TransitionRefused(
                f"{self.tenant}/{self.policy} has {what} named {name!r}; see 'everloop release list'"
            )
        return found[0]

    def route_now(self, now: float) -> Route | None:
        """The route that these releases call for; None where the present one is it already."""
        canary = self.canary
        wanted: dict[str, Any] = {
            "live": self.live_adapter,
            "uris": {adapter: r.uri for adapter, r in self.resident.items() if not self._is_next(adapter)},
            "release": canary.id if canary else None,
            "canary": canary.adapter if canary else None,
            "share": canary.plan.shares[canary.stage] if canary and canary.plan else 0.0,
        }
        held = self.route
        if held is not None and all(getattr(held, name) == value for name, value in wanted.items()):
            return None
        if held is None and wanted["live"] == BASE and canary is None:
            return None
        epoch = 1 if held is None else held.epoch + 1
        return Route(tenant=self.tenant, policy=self.policy, epoch=epoch, time=now, **wanted)

    def _is_next(self, adapter: str) -> bool:
        return self.gated is not None and self.gated.adapter == adapter


def release_id(adapter: Adapter) -> str:
    """The same for the same adapter of the same run: a candidate that is announced twice is one."""
    name = f"{adapter.tenant}\0{adapter.policy}\0{adapter.hash}\0{adapter.run}"
    return "rel_" + hashlib.sha256(name.encode()).hexdigest()[:16]


def candidate(state: PolicyState, adapter: Adapter, now: float) -> Change:
    """A new candidate; others that still wait give way to it."""
    release = Release(
        id=release_id(adapter),
        tenant=adapter.tenant,
        policy=adapter.policy,
        adapter=adapter.hash,
        uri=adapter.uri,
        incumbent=state.live_adapter,
        reason=f"Trained from {adapter.parent[:12]} by run {adapter.run}.",
        evidence={"run": adapter.run, "batch": adapter.batch, "metrics": adapter.metrics},
        time=now,
    )
    reason = f"Superseded: {release.id} came before its turn."
    late = (waiting.to(S.REJECTED, reason, now) for waiting in state.among(S.CANDIDATE))
    return Change((release, *late))


def gated(release: Release, reason: str, now: float, evidence: dict[str, Any]) -> Change:
    """``release.incumbent`` is what it was compared with."""
    return Change((_examined(release, S.GATED, reason, now, evidence),))


def rejected(release: Release, reason: str, now: float, evidence: dict[str, Any]) -> Change:
    return Change((_examined(release, S.REJECTED, reason, now, evidence),))


def rejected_in_shadow(release: Release, reason: str, now: float, evidence: dict[str, Any]) -> Change:
    return Change((release.to(S.REJECTED, reason, now, evidence={**release.evidence, **evidence}),))


def _examined(release: Release, state: ReleaseState, reason: str, now: float, evidence: dict[str, Any]) -> Release:
    gate = {"against": release.incumbent, **evidence}
    return release.to(state, reason, now, evidence={**release.evidence, "gate": gate})


def start_canary(state: PolicyState, release: Release, plan: CanaryPlan, now: float, note: str = "") -> Change:
    """Raises TransitionRefused where another canary runs: there is never more than one a policy."""
    if state.canary is not None:
        raise TransitionRefused(f"release {state.canary.id} is a canary already; {release.id} waits for its end")
    later = ", then " + ", ".join(f"{share:.0%}" for share in plan.shares[1:]) if plan.stages[1:] else ""
    reason = f"Canary with {plan.shares[0]:.0%}{later} of traffic against a control of equal size{note}."
    started = release.to(S.CANARY, reason, now, plan=plan, incumbent=state.live_adapter, stages=(now,))
    return _with_route(state, now, started)


def next_stage(state: PolicyState, release: Release, why: str, now: float) -> Change:
    """The canary goes to its next, larger share. Raises TransitionRefused where it has none."""
    shares = release.plan.shares if release.plan else ()
    if release.stage + 1 >= len(shares):
        raise TransitionRefused(f"the canary of {release.id} is in its last stage")
    number = release.stage + 2
    reason = f"Stage {number} of {len(shares)}, {shares[release.stage + 1]:.0%} of traffic: {why}."
    return _with_route(state, now, release.to(S.CANARY, reason, now, stages=(*release.stages, now)))


def promote(state: PolicyState, release: Release, reason: str, now: float, evidence: dict[str, Any]) -> Change:
    """Make it live, by every state on its way; what was live retires, and another canary ends.

    Raises TransitionRefused where its state does not lead to being live (it is, or has ended).
    """
    if release.state is S.LIVE:
        raise TransitionRefused(f"release {release.id} is live already")
    ways = {S.CANDIDATE: (S.GATED, S.CANARY, S.LIVE), S.GATED: (S.CANARY, S.LIVE)}
    steps = [release]
    for following in ways.get(release.state, (S.LIVE,)):
        changes = {"evidence": {**release.evidence, **evidence}}
        if release.state is not S.RETIRED:
            changes["incumbent"] = state.live_adapter
        steps.append(steps[-1].to(following, reason, now, **changes))
    retired = []
    if state.live is not None:
        retired.append(state.live.to(S.RETIRED, f"Replaced by {release.id}.", now))
    if state.canary is not None and state.canary.id != release.id:
        retired.append(state.canary.to(S.ROLLED_BACK, f"Ended: {release.id} was promoted over it.", now))
    return _with_route(state, now, *retired, *steps[1:])


def roll_back(state: PolicyState, release: Release, reason: str, now: float, evidence: dict[str, Any]) -> Change:
    """End a canary, or take the live release back to the one before it (else the base model).

    Raises TransitionRefused where the release is neither.
    """
    ended = release.to(S.ROLLED_BACK, reason, now, evidence={**release.evidence, **evidence})
    if release.state is S.CANARY:
        return _with_route(state, now, ended)
    others = []
    if state.canary is not None:
        others.append(state.canary.to(S.ROLLED_BACK, f"Ended: {release.id}, its control, was rolled back.", now))
    previous = state.previous
    if previous is not None:
        others.append(previous.to(S.LIVE, f"Live again: {release.id} was rolled back.", now))
    return _with_route(state, now, ended, *others)


def veto(state: PolicyState, release: Release, reason: str, now: float, evidence: dict[str, Any]) -> Change:
    """Raises TransitionRefused where it is live (roll it back) or has ended."""
    if release.state is S.LIVE:
        raise TransitionRefused(f"release {release.id} is live: 'everloop release rollback' takes it back")
    vetoed = release.to(S.VETOED, reason, now, evidence={**release.evidence, **evidence})
    return _with_route(state, now, vetoed)


def _with_route(state: PolicyState, now: float, *releases: Release) -> Change:
    return Change(releases, state.after(*releases).route_now(now))


def last_decision(state: PolicyState) -> Release | None:
    """The release whose fate was decided last: promoted, rejected, rolled back or vetoed."""
    decided = [r for r in state.releases.values() if r.state in ENDED or r.state is S.LIVE]
    return max(decided, key=lambda release: (release.time, release.step), default=None)
