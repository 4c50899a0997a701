"""The course of an episode: what its moments look like, what it came to, and how the first foretell the last.

What it came to is its outcome, else the last label that somebody gave; both as they were learned, so what is held,
held out or believed little counts here as it does there. It is learned after the episode was scored: what a score
foretells of the end was never learned from that end. Answers beside each other (``n`` above 1) are one moment, the
first one's; failed calls are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from everloop.episode import Episode
from everloop.feedback import FeedbackKind

from reward import evidence
from reward.features import Example
from reward.model import RewardModel, shared_features
from reward.reservoir import slice_of
from reward.value import Moments

Calls = dict[str, dict[str, Any]]
MOST = 32  # turns of an episode that are learned at once: its first and its newest


class End(NamedTuple):
    """What an episode came to: ``value`` 0 to 1, at which turn and of which call that was said, and how much it is
    worth."""

    turn: int
    call: str
    value: float
    weight: float


def foretold(model: RewardModel, episode: Episode, examples: Sequence[Example], turns: Sequence[int]) -> list[Any]:
    """(before, after) of each of these turns: P(the episode ends well) without its answer, and with it.

    None: too few ends were learned to say, or what would be said is not finite.
    """
    if not turns or not model.values.may_say:
        return [None] * len(turns)
    said = model.values.foretell(moments(model, episode, examples, turns)).astype(float).reshape(-1, 2)
    return [both if np.isfinite(both).all() else None for both in said.tolist()]


def moments(model: RewardModel, episode: Episode, examples: Sequence[Example], turns: Sequence[int]) -> Moments:
    """Two of each turn: before its answer, and with it. Style is left out of both: nobody's taste is asked here."""
    vectors = model.encoder.encode([text for i in turns for text in (examples[i].prompt, examples[i].answer)])
    asked, said = vectors[0::2], vectors[1::2]
    positions = episode.positions
    after = [examples[i] for i in turns]
    before = [_unanswered(examples, positions, i) for i in turns]
    shared = np.empty((2 * len(turns), model.heads.shared.shape[1]), np.float32)
    shared[0::2] = shared_features(asked, np.zeros_like(said), before, style=False)
    shared[1::2] = shared_features(asked, said, after, style=False)
    topics = np.repeat(model.topics.of(asked), 2)
    places = np.repeat([positions[i] for i in turns], 2)
    slices = [slice_of(int(topic), int(place)) for topic, place in zip(topics, places, strict=True)]
    return Moments(shared, np.tile(np.array([0.0, 1.0], np.float32), len(turns)), slices)


def _unanswered(examples: Sequence[Example], positions: Sequence[int], turn: int) -> Example:
    """What is known of a turn before its answer."""
    at = positions[turn]
    retries = examples[positions.index(at - 1)].structure.retries if at else 0
    known = replace(examples[turn].structure, retries=retries, calls_tool=False, finish=None)
    return Example(examples[turn].prompt, "", known)


def ending(episode: Episode, calls: Calls) -> End | None:
    """What an episode came to, of what was learned of its calls; None: nobody said anything that was."""
    found = None
    words = evidence.words(episode)
    for number in course_of(episode):
        name = episode.turns[number].call.id
        call = calls.get(name, {})
        trace = next((one for label, one in call.get("taught", {}).items() if label.startswith(f"{name}=")), None)
        measured = any(word.kind is FeedbackKind.OUTCOME for word in words[number])
        if trace is not None and (measured or found is None or not found[1]):
            value, good, bad, _ = trace
            found = End(number, name, float(value), (good + bad) * call.get("rarity", 1.0)), measured
    return found[0] if found else None


def learn(
    model: RewardModel,
    episode: Episode,
    examples: Sequence[Example],
    calls: Calls,
    known: dict[str, Any],
    *,
    teaches: bool,
) -> None:
    """Learn what the moments of an episode came to; take back what it came to before, where that is something else.

    ``known`` is remembered of the episode: the ``value`` of its end, the ``call`` of which that was said, and by call
    the number of the first of the two lessons that it ``taught``.
    """
    values = model.values
    positions = episode.positions
    if teaches and positions and positions[-1] > 0:
        values.begin()
    if not values.begun:
        return
    end = ending(episode, calls) if teaches else None
    turns = [] if end is None else course_of(episode, end.turn)
    _take_back(model, known, end, {episode.turns[i].call.id for i in turns})
    if end is None:
        return
    turns = [*turns[: MOST // 2], *turns[MOST // 2 :][-MOST // 2 :]]
    taught = known.get("taught", {})
    new = [at for at, i in enumerate(turns) if episode.turns[i].call.id not in taught]
    if new:
        its = moments(model, episode, examples, turns)
        rows = np.array([row for at in new for row in (2 * at, 2 * at + 1)])
        part = Moments(its.shared[rows], its.answered[rows], [its.slices[row] for row in rows])
        numbers = values.learn(part, values.targets(its, end.value)[rows], end.weight, model.members(episode.id))
        if not numbers:  # something was not finite
            return
        taught |= {episode.turns[turns[at]].call.id: first for at, first in zip(new, numbers[0::2], strict=True)}
    if "value" not in known:
        values.count(end.value, 1)
    known |= {"value": end.value, "call": end.call, "taught": taught}


def forget(model: RewardModel, known: dict[str, Any], call: str) -> None:
    """Undo what an episode came to, where that was said of this call and is not believed any more. What else was said
    of it is learned with its next version."""
    if known.get("call") == call:
        _take_back(model, known, None, set())


def course_of(episode: Episode, last: int | None = None) -> list[int]:
    """The turns up to this one (None: all): of each request its first answer, failed calls left out."""
    positions = episode.positions
    end = len(positions) if last is None else last + 1
    firsts = [i for i in range(end) if i == 0 or positions[i] != positions[i - 1]]
    return [i for i in firsts if episode.turns[i].call.error is None]


def _take_back(model: RewardModel, known: dict[str, Any], end: End | None, standing: set[str]) -> None:
    """Undo what an episode came to, where it is something else now, and of turns that do not lead there any more."""
    taught = known.get("taught", {})
    other = "value" in known and (end is None or end.value != known["value"])
    gone = [name for name in taught if other or name not in standing]
    model.values.silence([number for name in gone for number in (taught[name], taught.pop(name) + 1)])
    if other:
        model.values.count(known.pop("value"), -1)
        del known["call"]


def told(said: Sequence[tuple[int, float, float]]) -> list[str]:
    """The course in words, from (turn, before, after) of each turn of which something was foretold, in order."""
    if not said:
        return []
    first, start, _ = said[0]
    course = ", ".join(f"{turn}: {after:.2f}" for turn, _, after in said)
    line = f"P(ends well), as each turn came: {start:.2f} before turn {first}; after turn {course}"
    if len(said) < 2:
        return [line]
    before = [start, *(after for _, _, after in said[:-1])]
    moves = [(after - was, turn) for was, (turn, _, after) in zip(before, said, strict=True)]
    move, turn = max(moves, key=lambda one: abs(one[0]))
    way = "rose" if move > 0 else "fell"
    return [line, f"it {way} most with turn {turn}, by {abs(move):.2f}"]
