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
    def positions(self) -> tuple[int, ...]:
        """Which request each turn answers, from 0 on: the ``n`` answers to one request stand beside each other."""
        found: list[int] = []
        for at, turn in enumerate(self.turns):
            beside = at > 0 and _beside(self.turns[at - 1].call, turn.call)
            found.append(found[-1] + (not beside) if found else 0)
        return tuple(found)

    @property
    def judged(self) -> int | None:
        """The turn that words about the whole are about: the last request's first answer. Failed calls do not count."""
        able = [i for i, turn in enumerate(self.turns) if turn.call.error is None]
        positions = self.positions
        return next((i for i in able if positions[i] == positions[able[-1]]), None)

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


def _beside(before: Call, call: Call) -> bool:
    """Whether two calls answer one request."""
    return call.choice > before.choice and call.messages == before.messages
