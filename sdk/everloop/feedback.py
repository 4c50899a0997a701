"""Feedback: what a person or a product said about an answer, a turn or an episode.

It may come early, late, twice, revised or before the episode that it is about. :func:`settle` makes the final
state the same in every order: for each (rater, target, kind) the newest word counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum

from pydantic import Field, field_validator, model_validator

from everloop.contract import Contract


class FeedbackKind(StrEnum):
    THUMB = "thumb"  # value: +1 or -1
    RATING = "rating"  # value: 0.0 (worst) to 1.0 (best)
    CORRECTION = "correction"  # text: the better answer
    PREFERENCE = "preference"  # chosen and rejected: two answers to the same prompt
    OUTCOME = "outcome"  # value: a number the product measured, 0.0 failure to 1.0 success
    COMMENT = "comment"  # text: free words
    IMPLICIT = "implicit"  # name: kept, edited, retried, abandoned …; value: 0.0 to 1.0


RANGES = {
    FeedbackKind.THUMB: (-1.0, 1.0),
    FeedbackKind.RATING: (0.0, 1.0),
    FeedbackKind.OUTCOME: (0.0, 1.0),
    FeedbackKind.IMPLICIT: (0.0, 1.0),
}


SOURCE = r"^[a-z]+:[A-Za-z0-9._-]{1,62}$"


class Feedback(Contract):
    """One piece of feedback. Written by the gateway, read by assembly and reward.

    ``call`` is the model call that it is about; None means the episode as a whole. ``withdrawn`` takes back
    what the same rater said before about the same target in the same kind.

    Example: ``Feedback(id="f1", kind="thumb", value=1, time=1760000000.0)``
    """

    schema_version: int = 1
    id: str
    kind: FeedbackKind
    time: float = Field(description="event time, seconds since 1970, set by the producer")
    call: str | None = Field(default=None, description="id of the call it is about; None: the episode")
    rater: str | None = Field(default=None, description="pseudonymous id of who said it; None: unknown")
    value: float | None = Field(default=None, allow_inf_nan=False)
    text: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    name: str | None = Field(default=None, description="which outcome or which implicit signal")
    source: str | None = Field(
        default=None,
        pattern=SOURCE,
        description="who found it out: 'check:<name>', 'judge:<name>', 'critic:<name>' or 'derived:<name>'; None: "
        "somebody said it through the product",
    )
    withdrawn: bool = False

    @field_validator("time")
    @classmethod
    def _finite_time(cls, time: float) -> float:
        if not math.isfinite(time) or time < 0:
            raise ValueError("time must be a finite number of seconds since 1970")
        return time

    @model_validator(mode="after")
    def _complete(self) -> Feedback:
        if self.withdrawn:
            return self
        if self.kind in RANGES:
            low, high = RANGES[self.kind]
            if self.value is None:
                raise ValueError(f"a {self.kind} needs a value from {low:g} to {high:g}")
            if not low <= self.value <= high:
                raise ValueError(f"a {self.kind} goes from {low:g} to {high:g}, not {self.value:g}")
            if self.kind is FeedbackKind.THUMB and self.value not in (-1.0, 1.0):
                raise ValueError("a thumb is +1 (up) or -1 (down); use a rating for anything between")
        elif self.kind is FeedbackKind.PREFERENCE:
            if not self.chosen or not self.rejected:
                raise ValueError("a preference needs both answers: chosen and rejected")
        elif not self.text:
            raise ValueError(f"a {self.kind} needs text")
        return self

    @property
    def topic(self) -> tuple[str | None, str | None, FeedbackKind, str | None, str | None]:
        """What a later word by the same rater, or of the same source, replaces."""
        return (self.call, self.rater, self.kind, self.name, self.source)

    @property
    def success(self) -> float | None:
        """The value on a scale from 0 (bad) to 1 (good); None for words and preferences."""
        if self.value is None:
            return None
        return (self.value + 1) / 2 if self.kind is FeedbackKind.THUMB else self.value


def settle(feedback: Iterable[Feedback]) -> tuple[Feedback, ...]:
    """The final state of feedback that arrived in any order, with duplicates and revisions.

    For each (call, rater, kind, name, source) the newest by (time, id) stands; a withdrawn one leaves nothing.
    Anonymous words (neither rater nor source) do not replace each other unless they share an id.
    """
    newest: dict[object, Feedback] = {}
    for item in feedback:
        key = item.topic if item.rater is not None or item.source is not None else (item.topic, item.id)
        held = newest.get(key)
        if held is None or (item.time, item.id) > (held.time, held.id):
            newest[key] = item
    standing = (item for item in newest.values() if not item.withdrawn)
    return tuple(sorted(standing, key=lambda item: (item.time, item.id)))


class Preference(Contract):
    """An ordered pair of answers to one prompt, derived from a preference or a correction.

    Example: ``Preference(episode="ep_1", call="c1", prompt="…", chosen="b", rejected="a", source="correction")``
    """

    schema_version: int = 1
    episode: str
    call: str | None
    prompt: str
    chosen: str
    rejected: str
    source: FeedbackKind
    rater: str | None = None
