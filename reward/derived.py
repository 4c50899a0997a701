"""What the course of an episode says about its answers, by plain rules: each a value from 0 (bad) to 1 (good).

- **kept**: how much of the answer is in what the product sent in the end (a person's correction, or the text of an
  implicit ``edited``)
- **repeated** (0): the next thing that the user says is the same question
- **retried** (0): its tool call failed, and the next answer calls the same tool
- **handover** (0): it calls one of the tools that pass the user on to a person
- **abandoned** (0): it asked something or failed, and nobody came back: see :class:`reward.signals.SignalsHandler`

They are opinions: what each is worth is learned from how often it agrees with outcomes and people.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from difflib import SequenceMatcher

from everloop.episode import Episode, Turn
from everloop.feedback import Feedback, FeedbackKind
from everloop.section import Section
from pydantic import Field

from reward.checks.words import COMPARED, ExactOptions, plain
from reward.features import says_error

SAME = 0.9  # likeness from which two questions are one
LOOSELY = ExactOptions(ignore_case=True, ignore_punctuation=True)
EDITED = "edited"  # the name of the implicit word whose text is what the product sent


class DerivedSignals(Section):
    """Which signals are drawn from the course of an episode; their words have the source ``derived:<name>``."""

    kept: bool = False
    repeated: bool = False
    retried: bool = False
    handover_tools: tuple[str, ...] = Field(default=(), description="tools that pass the user on to a person")
    abandoned_after: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="seconds of event time without a word; None: never"
    )

    @property
    def any(self) -> bool:
        return self != DerivedSignals()


def found(episode: Episode, declared: DerivedSignals) -> dict[tuple[str, str], float]:
    """(call, name of the signal) to its value: all but ``abandoned``, which needs time to pass."""
    signals: dict[tuple[str, str], float] = {}
    judged, positions = episode.judged, episode.positions
    firsts = dict(reversed(list(zip(positions, episode.turns, strict=True))))
    for number, turn in enumerate(episode.turns):
        call, after = turn.call.id, firsts.get(positions[number] + 1)
        words = turn.feedback + (episode.feedback if number == judged else ())
        sent = _sent(words) if declared.kept else None
        if sent is not None:
            signals[call, "kept"] = likeness(turn.call.output.text, sent)
        if declared.repeated and after is not None and _asks_again(turn, after):
            signals[call, "repeated"] = 0.0
        if declared.retried and after is not None and _failed_tools(turn) & _called(after):
            signals[call, "retried"] = 0.0
        if _called(turn) & set(declared.handover_tools):
            signals[call, "handover"] = 0.0
    return signals


def likeness(one: str, other: str) -> float:
    """From 0 to 1: twice the matching words over all (case and punctuation aside), of the first COMPARED."""
    words = [plain(text, LOOSELY).split()[:COMPARED] for text in (one, other)]
    return SequenceMatcher(None, *words, autojunk=False).ratio()


def waits(episode: Episode) -> str | None:
    """The call after which somebody should say something: it asks, or it failed. None: the last one does neither."""
    if episode.complete or not episode.turns:
        return None
    turn = episode.turns[-1]
    asked = turn.call.output.text.rstrip().endswith("?")
    failed = turn.call.error is not None or bool(_failed_tools(turn))
    return turn.call.id if asked or failed else None


def activity(episode: Episode) -> str:
    """Changes with everything that people and products do in an episode, and with nothing that we say of it."""
    seen = hashlib.blake2b(digest_size=8)
    spoken = [episode.feedback, *(turn.feedback for turn in episode.turns)]
    ids = [
        *(turn.call.id for turn in episode.turns),
        *(tool.id for turn in episode.turns for tool in turn.tools),
        *(word.id for words in spoken for word in words if word.source is None),
        str(episode.complete),
    ]
    seen.update("\n".join(ids).encode())
    return seen.hexdigest()


def _sent(words: Sequence[Feedback]) -> str | None:
    """What the product sent in place of the answer; None: it did not say."""
    kinds = (FeedbackKind.CORRECTION, FeedbackKind.IMPLICIT)
    said = [word for word in words if word.source is None and word.text and word.kind in kinds]
    said = [word for word in said if word.kind is FeedbackKind.CORRECTION or word.name == EDITED]
    return said[-1].text if said else None


def _asks_again(turn: Turn, after: Turn) -> bool:
    if not turn.call.messages or not after.call.messages or after.call.messages[-1].role != "user":
        return False
    asked = next((one.text for one in reversed(turn.call.messages) if one.role == "user"), "")
    again = after.call.messages[-1].text
    return bool(asked.strip()) and likeness(asked, again) >= SAME


def _failed_tools(turn: Turn) -> set[str]:
    return {tool.name for tool in turn.tools if tool.error or says_error(tool.result)}


def _called(turn: Turn) -> set[str]:
    return {str(call.get("function", {}).get("name", "")) for call in turn.call.output.tool_calls or ()}
