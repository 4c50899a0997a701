"""What people and products said about an answer: what is learned from it, and what it does to the score.

A score follows the strongest source there is:

- an **outcome** was measured: it is the value, whatever the model thinks ("outcome");
- somebody **spoke** (thumb, rating, correction): by Bayes, the model's opinion times what was said, knowing that
  one thumb in twenty is a slip ("feedback"), so that a thumb against all other evidence weighs mildly;
- nobody did: the model's opinion ("model"), moved a little by implicit signals.

Credit: what is said about an episode as a whole is about its last answer. The three answers before it are taught
the same with a weight that falls by half each time, so that the model can judge an episode under way; their scores
remain the model's opinion, since a trainer spreads the outcome over turns itself (by GAE).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from everloop.episode import Episode, Turn
from everloop.feedback import Feedback, FeedbackKind

from reward.features import Example, answer_text
from reward.model import SLIPS, Estimate, Label, Pair, opinion
from reward.prototypes import key_of

THUMB = math.log((1 - SLIPS) / SLIPS)  # log-odds that one thumb is worth
CORRECTED = 4.0  # who writes a better answer means it
IMPLICIT = 0.5  # of a product's guess: an answer kept, edited, asked again
MOST = 6.0  # log-odds, whatever many people say
SUREST = 4.0  # log-odds that an opinion may bring against them
CREDIT = 0.5  # weight of an episode's label for the answer before its last
BEFORE = 3  # answers before the last that are taught it
SPOKEN = (FeedbackKind.THUMB, FeedbackKind.RATING)


@dataclass(frozen=True)
class Said:
    """Everything that was said of one call, in one form.

    ``label``: 0 to 1, what it amounts to; None: nothing explicit. ``certain``: measured or corrected. ``odds``: the
    log-odds that the words add to an opinion. ``outcome``: measured; None: it was not.
    """

    label: float | None
    certain: bool
    odds: float
    outcome: float | None
    corrections: tuple[Feedback, ...] = ()
    preferences: tuple[Feedback, ...] = ()


NOTHING = Said(None, False, 0.0, None)


def said_of(answer: str, words: tuple[Feedback, ...]) -> Said:
    """What these settled words amount to for an answer."""
    outcome = next((word.value for word in reversed(words) if word.kind is FeedbackKind.OUTCOME), None)
    corrections = tuple(word for word in words if word.kind is FeedbackKind.CORRECTION)
    spoken = [word.success for word in words if word.kind in SPOKEN and word.success is not None]
    guessed = [word.success for word in words if word.kind is FeedbackKind.IMPLICIT and word.success is not None]
    odds = THUMB * sum(2 * value - 1 for value in spoken) + IMPLICIT * sum(2 * value - 1 for value in guessed)
    confirmed = [key_of(word.text or "") == key_of(answer) for word in corrections]
    odds += CORRECTED * sum(1 if same else -1 for same in confirmed)
    label = sum(spoken) / len(spoken) if spoken else None
    if confirmed:
        label = float(all(confirmed))
    return Said(
        label=label if outcome is None else outcome,
        certain=outcome is not None or bool(confirmed),
        odds=min(max(odds, -MOST), MOST),
        outcome=outcome,
        corrections=tuple(word for word, same in zip(corrections, confirmed, strict=True) if not same),
        preferences=tuple(word for word in words if word.kind is FeedbackKind.PREFERENCE),
    )


def last_turn(episode: Episode) -> int | None:
    """The turn that the episode as a whole is judged by."""
    return episode.judged


def said(episode: Episode) -> list[Said]:
    """What was said of each turn of an episode, the words about the whole with its last turn."""
    last = last_turn(episode)
    return [
        said_of(answer_text(turn.call.output), turn.feedback + (episode.feedback if number == last else ()))
        for number, turn in enumerate(episode.turns)
    ]


def words_of(episode: Episode, number: int, lesson: Label | Pair) -> list[Feedback]:
    """The words that a lesson about a turn was made of."""
    whole = episode.feedback if number == last_turn(episode) or "<" in lesson.id else ()
    words = [*episode.turns[number].feedback, *whole]
    if isinstance(lesson, Pair):
        return [word for word in words if word.id == lesson.id]
    labelling = (*SPOKEN, FeedbackKind.OUTCOME, FeedbackKind.CORRECTION)
    return [word for word in words if word.kind in labelling]


def lessons(episode: Episode, examples: list[Example]) -> list[tuple[int, Label | Pair]]:
    """What there is to learn from an episode, each with its turn. Ids name what was said: unchanged, it is the same.

    A label that an earlier version of the episode had and this one has not was revised or withdrawn: the handler takes
    it back. A pair stays learned: what it was about is not said any more.
    """
    found: list[tuple[int, Label | Pair]] = []
    for number, (turn, one, example) in enumerate(zip(episode.turns, said(episode), examples, strict=True)):
        if turn.call.error is not None:
            continue
        found += [(number, label) for label in _labels(turn, one, example)]
        found += [(number, pair) for pair in _pairs(one, example)]
    return found + _credited(episode, examples)


def _labels(turn: Turn, one: Said, example: Example) -> list[Label]:
    if one.label is None:
        return []
    return [Label(f"{turn.call.id}={one.label:g}{'!' * one.certain}", example, one.label, certain=one.certain)]


def _pairs(one: Said, example: Example) -> list[Pair]:
    better = [(word.id, word.text or "", example.answer, True) for word in one.corrections]
    better += [(word.id, word.chosen or "", word.rejected or "", False) for word in one.preferences]
    return [
        Pair(name, example.prompt, chosen, rejected, absolute=absolute, structure=example.structure)
        for name, chosen, rejected, absolute in better
        if key_of(chosen) != key_of(rejected)
    ]


def _credited(episode: Episode, examples: list[Example]) -> list[tuple[int, Label | Pair]]:
    """The label of the episode as a whole, for the answers before its last."""
    last = last_turn(episode)
    whole = said_of("", episode.feedback)
    if last is None or whole.label is None or whole.corrections:
        return []
    positions = episode.positions
    ago = [positions[last] - at for at in positions]
    return [
        (
            number,
            Label(
                f"{episode.turns[number].call.id}<{whole.label:g}",
                examples[number],
                whole.label,
                weight=CREDIT ** ago[number],
                certain=whole.certain,
                watched=False,
            ),
        )
        for number in range(last)
        if ago[number] <= BEFORE and episode.turns[number].call.error is None
    ]


def decide(estimate: Estimate, one: Said, pessimism: float) -> tuple[Estimate, str]:
    """The final word on an answer and its source: outcome, else what was said with the opinion, else the opinion."""
    if one.outcome is not None:
        return Estimate(one.outcome, 0.0, 2 * one.outcome - 1, True), "outcome"
    if one.label is None and not one.odds:
        return estimate, "model"
    before = estimate.logits if estimate.mask else (0.0,)
    spoken = one.label is not None
    combined = opinion(tuple(_held(logit) + one.odds for logit in before), pessimism, estimate.mask or spoken)
    if spoken:
        return Estimate(combined.value, combined.spread, combined.reward, True, combined.logits), "feedback"
    return combined, "model"


def _held(logit: float) -> float:
    """An opinion as a prior: never so sure that a clear word could not turn it."""
    return min(max(logit, -SUREST), SUREST)
