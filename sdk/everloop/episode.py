"""Episodes: one captured interaction, assembled from its events. Append-only versions; the newest counts."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from everloop.contract import Contract
from everloop.event import Call, ToolResult
from everloop.feedback import Feedback, FeedbackKind


class Split(StrEnum):
    """Which use an episode is for, decided once at ingest. Training and reward read ``TRAIN`` alone."""

    TRAIN = "train"
    GATE = "gate"
    REPORT = "report"


class Turn(Contract):
    """One exchange: a model call, the tools that answered after it, and the feedback about it."""

    call: Call = Field(description="without tokens: those are in the trajectory")
    tools: tuple[ToolResult, ...] = ()
    feedback: tuple[Feedback, ...] = Field(default=(), description="settled")

    @property
    def correction(self) -> str | None:
        """The newest better answer that somebody gave; None: nobody did."""
        return next((f.text for f in reversed(self.feedback) if f.kind is FeedbackKind.CORRECTION), None)


class Episode(Contract):
    """One version of an episode.

    ``version`` counts the distinct events folded into it, so it grows with every change and is the same
    after a rebuild. ``complete`` means that the agent ended it and no numbered event is missing.
    """

    schema_version: int = 1
    tenant: str
    policy: str
    id: str
    version: int
    subject: str | None = None
    started: float = Field(description="event time of its first event, seconds since 1970")
    updated: float = Field(description="event time of its newest event, seconds since 1970")
    complete: bool = False
    synthetic: bool = False
    split: Split = Split.TRAIN
    turns: tuple[Turn, ...] = ()
    feedback: tuple[Feedback, ...] = Field(default=(), description="about the episode as a whole, settled")
    quarantine: str | None = Field(default=None, description="why it must not be trained on; None: nothing")

    @property
    def key(self) -> str:
        return f"{self.tenant}/{self.id}"

    @property
    def route(self) -> str:
        """Decides its partition in place of the key: what is learned of a policy has one reader."""
        return f"{self.tenant}/{self.policy}"

    @property
    def outcome(self) -> float | None:
        """The newest outcome about the episode, 0 to 1; None: not measured."""
        values = [f.value for f in self.feedback if f.kind is FeedbackKind.OUTCOME]
        return values[-1] if values else None
