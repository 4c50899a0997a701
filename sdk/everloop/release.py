"""Adapters and releases: the whole life of a trained adapter, its states and legal transitions, in this file.

::

    CANDIDATE ──gate passed──▶ GATED ──▶ CANARY ──not inferior──▶ LIVE ──next one promoted──▶ RETIRED
        │                        │          │                       │                            │
        └─gate failed▶ REJECTED  │          ├─harm, guard, time──┐  └─rollback──▶ ROLLED_BACK    │
        └──────── a person ──────┴──────────┴───▶ VETOED         └──▶ ROLLED_BACK                │
                                                                LIVE ◀──the one after it failed──┘

A canary goes to larger shares of the traffic stage by stage: each step leads from CANARY to CANARY.
A gated release is examined again, and gated anew or rejected, where something else went live before its canary.
The releaser's log (topic ``releases``) is the authority on what is live; MLflow aliases mirror it.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Any

from pydantic import Field

from everloop.contract import Contract
from everloop.errors import TransitionRefused
from everloop.event import BASE


class Adapter(Contract):
    """LoRA weights, registered. ``hash`` is the content hash of the files and the name in every engine.

    Written by the trainer once every file is in the registry; read by the releaser.
    """

    schema_version: int = 1
    hash: str
    tenant: str
    policy: str
    base: str = Field(description="name of the base model")
    parent: str = Field(default=BASE, description="adapter hash that training started from, or 'base'")
    run: str = Field(description="training run that made it")
    batch: str = Field(description="content hash of the batch that it was trained on")
    uri: str = Field(description="where the registry holds the files, e.g. models:/default.assistant/3")
    registry_run: str = Field(default="", description="the registry's own id of the run (MLflow's run id)")
    rank: int
    targets: tuple[str, ...]
    seed: int = 0
    metrics: dict[str, float] = {}
    time: float = Field(description="when it was registered, seconds since 1970")

    @property
    def key(self) -> str:
        return f"{self.tenant}/{self.policy}"


class ReleaseState(StrEnum):
    CANDIDATE = "candidate"
    GATED = "gated"
    CANARY = "canary"
    LIVE = "live"
    RETIRED = "retired"
    REJECTED = "rejected"
    ROLLED_BACK = "rolled_back"
    VETOED = "vetoed"


_S = ReleaseState
TRANSITIONS: dict[ReleaseState, frozenset[ReleaseState]] = {
    _S.CANDIDATE: frozenset({_S.GATED, _S.REJECTED, _S.VETOED}),
    _S.GATED: frozenset({_S.GATED, _S.CANARY, _S.REJECTED, _S.VETOED}),
    _S.CANARY: frozenset({_S.CANARY, _S.LIVE, _S.ROLLED_BACK, _S.VETOED}),
    _S.LIVE: frozenset({_S.RETIRED, _S.ROLLED_BACK}),
    _S.RETIRED: frozenset({_S.LIVE}),
    _S.REJECTED: frozenset(),
    _S.ROLLED_BACK: frozenset(),
    _S.VETOED: frozenset(),
}
ENDED = frozenset(state for state, following in TRANSITIONS.items() if not following)


class CanaryPlan(Contract):
    """What the canary will be judged by, registered before it starts and never changed after."""

    metric: str = Field(default="success", description="mean of thumbs, ratings and outcomes per episode, 0 to 1")
    margin: float = Field(default=0.05, description="largest loss of the metric that is not inferior")
    alpha: float = Field(default=0.05, description="probability of a wrong verdict, at any time of looking")
    share: float = Field(default=0.25, description="of traffic to the canary in its last stage; the control's too")
    stages: tuple[float, ...] = Field(default=(), description="the share of every stage, growing; (): one, of 'share'")
    stage_units: int = Field(default=20, description="units in each arm of a stage before the share grows")
    stage_seconds: float = Field(default=600, description="least time of a stage before the share grows")
    min_units: int = Field(default=50, description="rated units in each arm before a promotion")
    max_seconds: float = Field(default=604_800, description="past it, inconclusive: the incumbent stays")
    max_episodes: int = Field(default=100_000, description="assigned to both arms; past it, inconclusive")

    @property
    def shares(self) -> tuple[float, ...]:
        """Of every stage, the last one last."""
        return self.stages or (self.share,)


class Release(Contract):
    """One version of a release. ``step`` grows by one with every transition."""

    schema_version: int = 1
    id: str
    tenant: str
    policy: str
    adapter: str
    uri: str
    incumbent: str = Field(default=BASE, description="what it is or was compared with: what was live then")
    state: ReleaseState = ReleaseState.CANDIDATE
    step: int = 0
    reason: str = Field(default="", description="one sentence: why it is in this state")
    evidence: dict[str, Any] = Field(default={}, description="numbers behind the reason, by gate or arm")
    plan: CanaryPlan | None = None
    stages: tuple[float, ...] = Field(default=(), description="when each stage of its canary began, seconds since 1970")
    time: float = Field(description="of the transition, seconds since 1970")

    @property
    def key(self) -> str:
        return f"{self.tenant}/{self.policy}"

    @property
    def stage(self) -> int:
        """Which of the plan's shares its canary has now, from 0."""
        return max(len(self.stages) - 1, 0)

    @property
    def canary_began(self) -> float:
        return self.stages[0] if self.stages else self.time

    def to(self, state: ReleaseState, reason: str, now: float, **changes: Any) -> Release:
        """The next version of this release, in ``state``.

        Raises:
            TransitionRefused: the present state does not lead to ``state``.
        """
        if state not in TRANSITIONS[self.state]:
            allowed = ", ".join(sorted(TRANSITIONS[self.state])) or "none, it has ended"
            raise TransitionRefused(
                f"release {self.id} is {self.state}; from there it can go to: {allowed}; not {state}"
            )
        update = {"state": state, "reason": reason, "time": now, "step": self.step + 1, **changes}
        return self.model_copy(update=update)


class Route(Contract):
    """Who answers a policy's requests now. Written by the releaser, followed by every gateway.

    A newer ``epoch`` replaces an older one. A unit (the subject, else the episode) falls on a point in [0, 1)
    by :func:`point`; the first ``share`` of it is canary, the last ``share`` control, what is between them live. So a
    share that grows takes from live alone, and nobody changes arms. Control and live are both answered by ``live``;
    only control is compared, so that both arms are drawn at the same time.
    """

    schema_version: int = 1
    tenant: str
    policy: str
    epoch: int
    live: str = Field(default=BASE, description="adapter hash, or 'base'")
    uris: dict[str, str] = Field(default={}, description="registry uri by adapter hash, of what must be resident")
    release: str | None = Field(default=None, description="id of the release whose canary runs; None: none runs")
    canary: str | None = None
    share: float = Field(default=0.0, ge=0, le=0.5)
    time: float

    @property
    def key(self) -> str:
        return f"{self.tenant}/{self.policy}"

    def assign(self, unit: str) -> tuple[str, str, float]:
        """(adapter hash or 'base', arm, probability of that arm) for a unit of assignment."""
        if self.release is None or self.canary is None or self.share <= 0:
            return self.live, "live", 1.0
        at = point(self.release, unit)
        if at < self.share:
            return self.canary, "canary", self.share
        if at >= 1 - self.share:
            return self.live, "control", self.share
        return self.live, "live", 1 - 2 * self.share


def point(salt: str, unit: str) -> float:
    """A number in [0, 1), the same for the same salt and unit, uniform over units."""
    digest = hashlib.blake2b(f"{salt}\0{unit}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
