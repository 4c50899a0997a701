"""Training runs, reward-model versions and commands: what the learner, the reward service and people announce."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from everloop.contract import Contract


class RunState(StrEnum):
    RUNNING = "running"
    PUBLISHED = "published"
    FINISHED = "finished"  # without publishing
    FAILED = "failed"


class Run(Contract):
    """One version of a training run. Written by the learner; ``step`` grows with every version."""

    schema_version: int = 1
    id: str
    tenant: str
    policy: str
    state: RunState
    step: int = 0
    batch: str = Field(description="content hash of the pinned batch")
    seed: int = 0
    parent: str = Field(description="adapter hash that training started from, or 'base'")
    adapter: str | None = None
    trigger: str = Field(default="", description="one sentence: what started it")
    reason: str = Field(default="", description="one sentence: how it ended")
    metrics: dict[str, float] = {}
    publish: bool = True
    time: float

    @property
    def key(self) -> str:
        return f"{self.tenant}/{self.policy}"


class RewardVersion(Contract):
    """An immutable snapshot of a reward model. ``version`` hashes code, config, encoder, weights and offsets read.

    Only a released one scores, and gives opinions to a batch; a refused one is kept with the sentence that says why.
    """

    schema_version: int = 1
    version: str
    tenant: str
    policy: str
    path: str = Field(description="folder of the snapshot, relative to the installation's home")
    updates: int = Field(description="pieces of feedback learned from so far")
    auc: float | None = Field(default=None, description="predict-then-learn, over the recent window; None: too few")
    calibration_error: float | None = Field(default=None, description="expected calibration error, 0 to 1")
    offsets: dict[str, int] = Field(default={}, description="'topic/partition' to the next offset not yet read")
    state: Literal["released", "refused"] = Field(default="released", description="refused: the one before it stays")
    waits: bool = Field(default=False, description="of a refused one: more labels, or a person, may let it take over")
    reason: str = Field(default="", description="one sentence: why it took over, or why not")
    evidence: dict[str, Any] = Field(default={}, description="what was compared with the version that scored")
    time: float

    @property
    def key(self) -> str:
        return f"{self.tenant}/{self.policy}"


class CommandKind(StrEnum):
    PAUSE = "pause"  # no new runs, no new canaries; serving goes on. In the topic ``pauses``: the newest holds
    RESUME = "resume"  # as above
    FREEZE = "freeze"  # no promotions, no new canaries, no larger shares; rollbacks go on. Kept as a pause is; reason
    UNFREEZE = "unfreeze"  # as above
    RETRAIN = "retrain"  # arguments: batch, seed, publish
    PROMOTE = "promote"  # arguments: release, reason, without_evidence
    ROLLBACK = "rollback"  # arguments: release, reason, live
    VETO = "veto"  # arguments: release, reason
    REGISTER = "register"  # arguments: path of an adapter made elsewhere, reason
    RESCORE = "rescore"  # arguments: version
    REWARD_ROLLBACK = "reward-rollback"  # arguments: version, reason, after. Kept as a pause is
    REWARD_PROMOTE = "reward-promote"  # as above
    REWARD_RESUME = "reward-resume"  # arguments: reason, after. Kept as a pause is


STANDING = {
    CommandKind.PAUSE: "pause",
    CommandKind.RESUME: "pause",
    CommandKind.FREEZE: "freeze",
    CommandKind.UNFREEZE: "freeze",
    CommandKind.REWARD_ROLLBACK: "reward",
    CommandKind.REWARD_PROMOTE: "reward",
    CommandKind.REWARD_RESUME: "reward",
}
"""Orders that hold until another one of the same name: the newest of each policy and name is kept for ever."""


class Command(Contract):
    """What a person asks of a policy's loop. A request: the service that it concerns decides, and says so."""

    schema_version: int = 1
    id: str
    kind: CommandKind
    tenant: str
    policy: str
    arguments: dict[str, Any] = {}
    by: str = ""
    time: float

    @property
    def key(self) -> str:
        return f"{self.tenant}/{self.policy}"

    @property
    def log_key(self) -> str:
        """The key of its record: in a compacted topic, what the next one of its kind takes the place of."""
        name = STANDING.get(self.kind, "pause")
        return self.key if name == "pause" else f"{self.key}/{name}"


class DeadLetter(Contract):
    """A record that a handler could never take, with everything needed to mend and replay it."""

    schema_version: int = 1
    id: str
    handler: str
    topic: str
    partition: int
    offset: int
    record_key: str
    headers: dict[str, str] = {}
    value: bytes | None = Field(description="the original bytes; None: it was a tombstone")
    cause: str
    stack: str = ""
    time: float
    replayed: float | None = Field(default=None, description="when it was last replayed, unix seconds; None: never")

    @property
    def key(self) -> str:
        return self.handler
