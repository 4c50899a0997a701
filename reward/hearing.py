"""What words about answers teach beside the answers: whom to believe, and what comments mean.

::

    before:  read comments that are new ──▶ take back what was heard of words that stand no more
    (the answers are learned, each word as believable as it is by now)
    after:   hear all the words of an answer together ──▶ comments beside a learned label become examples

``calls`` is what is remembered of each call of the episode: under ``heard`` the words from which it was learned how far
whom is right, under ``read`` and ``examples`` what :mod:`reward.comments` notes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from everloop.episode import Episode, Turn
from everloop.feedback import Feedback, FeedbackKind

from reward import comments, evidence
from reward.features import Example
from reward.model import RewardModel
from reward.reliability import MOST_WORDS, Piece

Calls = dict[str, dict[str, Any]]
About = tuple[Turn, tuple[Feedback, ...]]


def before(model: RewardModel, episode: Episode, calls: Calls, teaches: bool) -> None:
    """Read each comment once, before anything is learned of it; and take back what was learned of whom is right from
    words that stand no more as they did, before what stands now is weighed: not by what the same person said before."""
    about = _about(episode)
    for name, (_, words) in about.items():
        comments.read_new(model, words, calls.setdefault(name, {}))
    for name, call in calls.items():
        if "heard" in call and call["heard"] != _words(model, about.get(name) if teaches else None, call):
            model.reliability.learn([Piece(*piece) for piece in call.pop("heard")], sign=-1)


def after(model: RewardModel, episode: Episode, calls: Calls, teaches: bool) -> None:
    """Learn from all the words that stand about an answer how far whom is right, and what comments mean."""
    for name, about in _about(episode).items():
        call = calls.setdefault(name, {})
        if "heard" not in call and (words := _words(model, about if teaches else None, call)):
            model.reliability.learn([Piece(*piece) for piece in words])
            call["heard"] = words
        taught = call.get("taught") and not held(name, call)
        comments.learn(model, name, about[1] if taught else (), call)


def unheard(model: RewardModel, name: str, call: dict[str, Any]) -> None:
    """Take back what the words about a call taught beside its label, which is held by now."""
    if "heard" in call:
        model.reliability.learn([Piece(*piece) for piece in call.pop("heard")], sign=-1)
    comments.learn(model, name, (), call)


def rarity(model: RewardModel, episode: Episode, examples: list[Example], number: int | None, calls: Calls) -> float:
    """For how many times the answers a label of this turn stands (:mod:`reward.propensity`): as it was when somebody
    first spoke of it who was heard, kept under ``rarity``."""
    if number is None:
        return 1.0
    call = calls.setdefault(episode.turns[number].call.id, {})
    return float(call["rarity"]) if "rarity" in call else model.propensity.weight(examples[number])


def spoke(model: RewardModel, episode: Episode, examples: list[Example], number: int | None, calls: Calls) -> None:
    """Somebody who is heard speaks of this turn: learned once."""
    if number is None:
        return
    call = calls.setdefault(episode.turns[number].call.id, {})
    if "rarity" not in call:
        call["rarity"] = model.propensity.spoken(examples[number])


def held(name: str, call: dict[str, Any]) -> str | None:
    """Why the label of a call is not believed; None: it is. What is held of a pair, or of an episode as a whole for
    its earlier answers, leaves the label of the call itself alone."""
    return next((why for lesson, (_, why) in call.get("held", {}).items() if lesson.startswith(f"{name}=")), None)


def kept_out(name: str, words: Sequence[Feedback], calls: Calls) -> str | None:
    """Why people's ``words`` about a call are kept out of its score; None: they are not.

    Its label is held; or a correction of it is, whose rater is heard no more: what is kept out has no correction that
    anybody is trained on.
    """
    why = held(name, calls.get(name, {}))
    if why is not None:
        return why
    silenced = {
        lesson: says for call in calls.values() for lesson, (guilty, says) in call.get("held", {}).items() if guilty
    }
    return next((silenced[w.id] for w in words if w.kind is FeedbackKind.CORRECTION and w.id in silenced), None)


def _about(episode: Episode) -> dict[str, About]:
    """Each turn with its words, by call."""
    return {turn.call.id: (turn, its) for turn, its in zip(episode.turns, evidence.words(episode), strict=True)}


def _words(model: RewardModel, about: About | None, call: dict[str, Any]) -> list[list[Any]]:
    """The words about a turn that anything may be learned from, as they are kept; of a turn that is gone, none."""
    if about is None or held(about[0].call.id, call):
        return []
    found = evidence.pieces(*about, call.get("vote"), model.reliability, call.get("read", {}))
    return [list(piece) for piece in found[:MOST_WORDS]]
