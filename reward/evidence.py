"""What people and products said about an answer: what is learned from it, and what it does to the score.

A score follows the strongest source there is:

- an **outcome** was measured: it is the value, whatever the model thinks ("outcome");
- somebody **spoke** (thumb, rating, correction): by Bayes, the model's opinion times what was said, each word weighed
  by how far its source and its rater are found to be right ("feedback"), so that a thumb against all other evidence
  weighs mildly, and that of somebody careless hardly at all;
- nobody did: the model's opinion ("model"), moved by comments, implicit signals, checks and judges as far as they bear
  it out.

How far that is, :mod:`reward.reliability` learns; before it has heard anything a thumb in twenty is a slip.

Credit: what is said about an episode as a whole is about its last answer. The three answers before it are taught
the same with a weight that falls by half each time, so that the model can judge an episode under way; their scores
remain the model's opinion, since a trainer spreads the outcome over turns itself (by GAE).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from everloop.episode import Episode, Turn
from everloop.feedback import Feedback, FeedbackKind

from reward import comments
from reward.features import Example, answer_text
from reward.model import Estimate, Label, Pair, opinion
from reward.prototypes import key_of
from reward.reliability import MODEL, OUTCOME, Piece, Reliability, person_of, rater_of, source_of, vote

SUREST = 4.0  # log-odds that an opinion may bring against them
CREDIT = 0.5  # weight of an episode's label for the answer before its last
BEFORE = 3  # answers before the last that are taught it
SPOKEN = (FeedbackKind.THUMB, FeedbackKind.RATING)


SUPPOSED = Reliability()
"""What is believed of everybody before anything was heard."""


@dataclass(frozen=True)
class Said:
    """Everything that was said of one call, in one form.

    ``label``: 0 to 1, what it amounts to; None: nothing explicit. ``certain``: measured or corrected. ``odds``: the
    log-odds that the words add to an opinion. ``outcome``: measured; None: it was not. ``value`` and ``weight``: what
    is learned of the label, and how much, 0 to 1: each word as believable as its source and rater are.
    """

    label: float | None
    certain: bool
    odds: float
    outcome: float | None
    corrections: tuple[Feedback, ...] = ()
    preferences: tuple[Feedback, ...] = ()
    value: float = 0.0
    weight: float = 1.0

    @property
    def measured(self) -> Said:
        """What is left of it where people's words are held: an outcome, which none of them said; else nothing."""
        return NOTHING if self.outcome is None else Said(self.outcome, True, 0.0, self.outcome, value=self.outcome)


NOTHING = Said(None, False, 0.0, None)


def goodness(answer: str, word: Feedback, trust: Reliability) -> float | None:
    """How good a word says that the answer is, 0 to 1; None: it does not say."""
    if word.kind is FeedbackKind.COMMENT:
        return trust.reading(word.text or "")
    if word.kind is FeedbackKind.CORRECTION:
        return float(key_of(word.text or "") == key_of(answer))
    return word.success


def said_of(answer: str, words: tuple[Feedback, ...], trust: Reliability = SUPPOSED) -> Said:
    """What these settled words amount to for an answer, as far as they are to be trusted."""
    words = tuple(word for word in words if trust.counts(word))
    outcome = next((word.value for word in reversed(words) if source_of(word) == OUTCOME), None)
    told = [(word, good) for word in words if (good := goodness(answer, word, trust)) is not None]
    told = [(word, good) for word, good in told if word.kind is not FeedbackKind.COMMENT or comments.adds(word, words)]
    odds = sum(trust.odds(source_of(w), rater_of(w), good) for w, good in told if source_of(w) != OUTCOME)
    people = [(word, good) for word, good in told if word.source is None]
    corrected = [(word, good) for word, good in people if word.kind is FeedbackKind.CORRECTION]
    spoken = corrected or [(word, good) for word, good in people if word.kind in SPOKEN]
    label = sum(good for _, good in spoken) / len(spoken) if spoken else None
    if corrected:
        label = float(all(good for _, good in corrected))
    value, weight = _believable(spoken, trust)
    if corrected:
        value = label or 0.0
    most = trust.declaration.combine.cap
    return Said(
        label=label if outcome is None else outcome,
        certain=outcome is not None or bool(corrected),
        odds=min(max(odds, -most), most),
        outcome=outcome,
        corrections=tuple(word for word, good in corrected if not good),
        preferences=tuple(word for word in words if word.kind is FeedbackKind.PREFERENCE and word.source is None),
        value=value if outcome is None else outcome,
        weight=weight if outcome is None else 1.0,
    )


def _believable(spoken: list[tuple[Feedback, float]], trust: Reliability) -> tuple[float, float]:
    """Mean of what was said, each word as believable as it is; and how believable they are on the mean."""
    worths = [trust.worth(source_of(word), rater_of(word)) for word, _ in spoken]
    if not sum(worths):
        return sum(good for _, good in spoken) / max(1, len(spoken)), 0.0
    value = sum(worth * good for worth, (_, good) in zip(worths, spoken, strict=True)) / sum(worths)
    return value, sum(worths) / len(worths)


def pieces(
    turn: Turn,
    about: tuple[Feedback, ...],
    expected: float | None,
    trust: Reliability,
    read: Mapping[str, float | None],
) -> list[Piece]:
    """All that was said of a turn, to learn who is right how far; with the model's opinion from before, if any.

    ``about``: its words. ``read``: by id, what comments seemed to say when they were new.
    """
    answer = answer_text(turn.call.output)
    found = []
    for word in filter(trust.counts, about):
        is_comment = word.kind is FeedbackKind.COMMENT
        good = read.get(word.id) if is_comment else goodness(answer, word, trust)
        if good is not None and source_of(word) != MODEL:
            weight = abs(2 * good - 1) if is_comment else 1.0  # how sure the reading is
            said = float(good > 0.5) if is_comment else good
            found.append(Piece(source_of(word), rater_of(word), said, weight, person_of(word)))
    return found + ([vote(expected)] if found and expected is not None else [])


def words(episode: Episode) -> list[tuple[Feedback, ...]]:
    """What stands about each turn, the words about the whole with its last turn."""
    last = last_turn(episode)
    return [turn.feedback + (episode.feedback if number == last else ()) for number, turn in enumerate(episode.turns)]


def last_turn(episode: Episode) -> int | None:
    """The turn that the episode as a whole is judged by."""
    return episode.judged


def said(episode: Episode, trust: Reliability = SUPPOSED) -> list[Said]:
    """What was said of each turn of an episode."""
    return [
        said_of(answer_text(turn.call.output), its, trust)
        for turn, its in zip(episode.turns, words(episode), strict=True)
    ]


def is_credited(lesson: Label | Pair) -> bool:
    """Whether it is what was said of the whole, for an answer before the last."""
    return "<" in lesson.id


def words_of(episode: Episode, number: int, lesson: Label | Pair) -> list[Feedback]:
    """The words that a lesson about a turn was made of."""
    whole = episode.feedback if number == last_turn(episode) or is_credited(lesson) else ()
    words = [*episode.turns[number].feedback, *whole]
    if isinstance(lesson, Pair):
        return [word for word in words if word.id == lesson.id]
    labelling = (*SPOKEN, FeedbackKind.OUTCOME, FeedbackKind.CORRECTION)
    return [word for word in words if word.kind in labelling]


def lessons(episode: Episode, examples: list[Example], trust: Reliability = SUPPOSED) -> list[tuple[int, Label | Pair]]:
    """What there is to learn from an episode, each with its turn. Ids name what was said: unchanged, it is the same.

    A label that an earlier version of the episode had and this one has not was revised or withdrawn: the handler takes
    it back, as it does a pair.
    """
    found: list[tuple[int, Label | Pair]] = []
    for number, (turn, one, example) in enumerate(zip(episode.turns, said(episode, trust), examples, strict=True)):
        if turn.call.error is not None:
            continue
        found += [(number, label) for label in _labels(turn, one, example)]
        found += [(number, pair) for pair in _pairs(one, example, trust)]
    return found + _credited(episode, examples, trust)


def _labels(turn: Turn, one: Said, example: Example) -> list[Label]:
    if one.label is None:
        return []
    name = f"{turn.call.id}={one.label:g}{'!' * one.certain}"
    return [Label(name, example, one.value, weight=one.weight, certain=one.certain)]


def _pairs(one: Said, example: Example, trust: Reliability) -> list[Pair]:
    better = [(word, word.text or "", example.answer, True) for word in one.corrections]
    better += [(word, word.chosen or "", word.rejected or "", False) for word in one.preferences]
    return [
        Pair(
            word.id,
            example.prompt,
            chosen,
            rejected,
            weight=trust.worth(source_of(word), rater_of(word)) if absolute else 1.0,
            absolute=absolute,
            structure=example.structure,
        )
        for word, chosen, rejected, absolute in better
        if key_of(chosen) != key_of(rejected)
    ]


def _credited(episode: Episode, examples: list[Example], trust: Reliability) -> list[tuple[int, Label | Pair]]:
    """The label of the episode as a whole, for the answers before its last."""
    last = last_turn(episode)
    whole = said_of("", episode.feedback, trust)
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
                whole.value,
                weight=whole.weight * CREDIT ** ago[number],
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
