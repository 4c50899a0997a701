"""Why an answer got its score, in words and numbers: what the model saw, what people said, what would change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from everloop.feedback import Feedback, FeedbackKind

from reward import comments, evidence, features, hollow
from reward.evidence import Said
from reward.features import Example
from reward.model import SHARED, Estimate, RewardModel
from reward.prototypes import NAMES
from reward.reliability import OUTCOME, Reliability, rater_of, source_of
from reward.taught import name_of

WORDS = {
    "base": "before anything is known of the answer",
    "rival": "other known answers fit this prompt better (against) or worse",
    "similarity": "prompts that this answer was right for are like this one",
    "badly_rated": "prompts that this answer was wrong for are like this one",
    "rate": "how this answer is rated in general",
    "support": "how often this answer was rated well",
    "chosen": "it is the one that fits best among the known answers",
    "texts": "prompt and answer by themselves, as the encoder reads them",
    "length": "what of this it owes to its length, taken out",
    "offers": "it is nearer to an offer of help that fits everything than to its prompt",
    "thanks": "it is nearer to thanks that fit everything",
    "vague": "it is nearer to a sentence that leaves everything open",
    "placeholder": "it is nearer to words that stand for an answer",
    "declines": "it is nearer to a refusal that fits everything",
    "asks_back": "it is nearer to a question that fits everything",
    "turn": "how late in the episode it is",
    "tools": "how many tools were called before",
    "tool_error_share": "share of those that failed",
    "tool_errors": "tools that failed",
    "retries": "answers repeated before",
    "calls_tool": "it calls a tool",
    "cut_off": "it was cut off",
    "asked_words": "how long the prompt is",
    "asked_numbers": "how many numbers the prompt has",
    "numbers_used": "share of the prompt's numbers that the answer has",
    "numbers_given": "share of the answer's numbers that the prompt has",
    "words_repeated": "share of the answer's words that are the prompt's",
}


class Neighbour(NamedTuple):
    """A rated answer near to the explained one; ``near`` is the mean cosine of prompts and of answers."""

    near: float
    label: float
    example: Example
    episode: str


def contributions(model: RewardModel, example: Example) -> list[tuple[str, float]]:
    """Log-odds that each feature gives or takes, mean of the members, strongest first; they sum to the opinion's."""
    own, shared, topics, *_ = model.seen_of([example], style=False)
    shift = model.calibration.line(0.0, topics)[0]
    slope = model.calibration.line(1.0, topics)[0] - shift
    by_own = slope * (model.heads.own * own[:, 0]).mean(axis=0)
    by_shared = slope * (model.heads.shared * shared[0]).mean(axis=0)
    found = dict(zip(("base", *NAMES, *hollow.NAMES), map(float, by_own), strict=True))
    found["base"] += float(shift)
    found |= dict(zip(features.NAMES, map(float, by_shared[: len(features.NAMES)]), strict=True))
    found["texts"] = float(by_shared[SHARED:].sum())
    found["length"] = -float(slope * model.length.part([example.answer])[0])
    return sorted(found.items(), key=lambda item: -abs(item[1]))


def neighbours(
    model: RewardModel, example: Example, rated: Sequence[tuple[str, Example, float]], most: int = 5
) -> list[Neighbour]:
    """The nearest among rated answers, each (episode, example, label)."""
    if not rated:
        return []
    asked = model.encoder.encode([example.prompt, *(one.prompt for _, one, _ in rated)])
    said = model.encoder.encode([example.answer, *(one.answer for _, one, _ in rated)])
    near = (asked[1:] @ asked[0] + said[1:] @ said[0]) / 2
    best = np.argsort(-near, kind="stable")[:most]
    return [Neighbour(float(near[i]), rated[i][2], rated[i][1], rated[i][0]) for i in best]


class Weighed(NamedTuple):
    """A word about an answer. ``log_odds``: what it adds to the answer's being good; None: an outcome, which decides,
    or nothing that says how good the answer is. ``counts``: whether the declaration lets it."""

    says: str
    source: str
    log_odds: float | None
    counts: bool


def weighed(answer: str, words: Sequence[Feedback], trust: Reliability) -> list[Weighed]:
    """Each word with what it weighs by what is believed of its source and its rater."""
    found = []
    for word in words:
        source, good = source_of(word), evidence.goodness(answer, word, trust)
        repeats = word.kind is FeedbackKind.COMMENT and not comments.adds(word, tuple(words))
        silent = good is None or source == OUTCOME or repeats
        weight = None if silent or good is None else trust.odds(source, rater_of(word), good)
        found.append(Weighed(_named(word), source, weight, trust.counts(word)))
    return found


def alternatives(
    estimate: Estimate,
    answer: str,
    words: Sequence[Feedback],
    pessimism: float,
    trust: Reliability,
    held: bool = False,
) -> list[tuple[str, Estimate]]:
    """What the score would be if one more thing were said of the answer, by the trust that the score was made with.

    ``held``: its words are kept from learning, and more of them would be so too; then, if they were believed.
    """
    if held:
        return [("its words were believed", _decided(estimate, answer, words, pessimism, trust))]
    last = max((word.time for word in words), default=0.0) + 1
    more: dict[str, dict[str, Any]] = {
        "one more thumb up": {"kind": FeedbackKind.THUMB, "value": 1.0},
        "one more thumb down": {"kind": FeedbackKind.THUMB, "value": -1.0},
        "a correction to another answer": {"kind": FeedbackKind.CORRECTION, "text": f"not: {answer}"},
        "an outcome of 1": {"kind": FeedbackKind.OUTCOME, "value": 1.0},
        "an outcome of 0": {"kind": FeedbackKind.OUTCOME, "value": 0.0},
    }
    said: dict[str, Sequence[Feedback]] = {"nothing said of it": ()} if words else {}
    for name, fields in more.items():
        said[name] = (*words, Feedback(id="what if", time=last, **fields))
    return [(name, _decided(estimate, answer, its, pessimism, trust)) for name, its in said.items()]


def _decided(
    estimate: Estimate, answer: str, words: Sequence[Feedback], pessimism: float, trust: Reliability
) -> Estimate:
    return evidence.decide(estimate, evidence.said_of(answer, tuple(words), trust), pessimism)[0]


def told(said: Said, words: Sequence[Weighed]) -> list[str]:
    """What was said of an answer, a line each with its source and weight, and what it adds up to."""
    lines = [f"{word.says}: {_worth(word)}" for word in words]
    if said.outcome is not None:
        lines.append(f"an outcome decides: {said.outcome:g}")
    elif said.odds:
        summed = sum(word.log_odds or 0.0 for word in words if word.counts)
        cut = "" if abs(summed - said.odds) < 1e-9 else f" ({summed:+.2f}, of which no more counts)"
        lines.append(f"together {said.odds:+.2f} log-odds{cut}")
    return lines or ["nobody said anything"]


def _worth(word: Weighed) -> str:
    if not word.counts:
        return f"{word.source}, which the declaration does not count"
    if word.log_odds is not None:
        return f"{word.source}, {word.log_odds:+.2f} log-odds"
    return f"{word.source}, measured" if word.source == OUTCOME else f"{word.source}, for learning alone"


def _named(word: Feedback) -> str:
    name = f" {word.name!r}" if word.name else ""
    value = "" if word.value is None else f" {word.value:+g}" if word.kind is FeedbackKind.THUMB else f" {word.value:g}"
    text = f" {' '.join(word.text.split())[:60]!r}" if word.text else ""
    rater = "" if word.rater is None else f" by {word.rater[:12]} ({name_of('rater', word.rater)})"
    return f"{word.kind.value}{name}{value}{text}{rater}"
