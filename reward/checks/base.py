"""What a check is: a small function of an answer and a reference, to a verdict that can be verified.

::

    Check = (judge, options)        an entry point of the group ``everloop.checks``, named by its kind
    judge(turn, reference, options) -> Verdict(value 0 to 1, or None with why)

A verdict without a value is no opinion. Where the check itself failed, ``failure`` names how, for counting; that the
answer is wrong is no failure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from everloop.section import Section
from pydantic import Field

NO_REFERENCE = "no_reference"
RAISED = "raised"
NOT_A_VALUE = "not_a_value"
LONGEST = 100_000  # characters of an answer that a check reads


@dataclass(frozen=True)
class TurnView:
    """One answer as checks see it. ``tool_calls`` and ``tools`` (those on offer) are in OpenAI's form.

    ``references``: what it may be compared with, by the name of where it came from.

    Example: ``TurnView("#### 18", references={"gold": "18"})``
    """

    answer: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    references: Mapping[str, Any] = field(default_factory=dict)


class Verdict(NamedTuple):
    """``value``: 1 right, 0 wrong, or between; None: no opinion. ``failure``: how the check failed; None: not."""

    value: float | None
    why: str
    failure: str | None = None


def right(is_right: bool, why: str) -> Verdict:
    return Verdict(float(is_right), why)


def failed(failure: str, why: str) -> Verdict:
    return Verdict(None, why, failure)


class CheckConfig(Section):
    """One check of a policy's answers. ``name`` is its own, for scores and counts; ``kind`` says which check it is."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    kind: str = Field(description="name of an entry point of the group everloop.checks")
    reference: str | None = Field(
        default=None, description="which of a turn's references to compare with; None: the check needs none"
    )
    options: dict[str, Any] = {}


Judge = Callable[[TurnView, Any, Any], Verdict]


def _nothing(options: Any) -> bool:
    return False


class Check(NamedTuple):
    """What an entry point gives. ``options``: the section that a check's options are validated by. ``compares``:
    whether, with these options, it can say nothing without a reference."""

    judge: Judge
    options: type[Section] = Section
    compares: Callable[[Any], bool] = _nothing


def always(options: Any) -> bool:
    """``compares`` of a check that is nothing without a reference."""
    return True
