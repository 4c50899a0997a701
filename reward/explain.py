"""Why an answer got its score, in words and numbers: what the model saw, what people said, what would change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from everloop.feedback import Feedback, FeedbackKind

from reward import evidence, features
from reward.evidence import Said
from reward.features import Example
from reward.model import SHARED, Estimate, RewardModel
from reward.prototypes import NAMES

WORDS = {
    "base": "before anything is known of the answer",
    "rival": "other known answers fit this prompt better (against) or worse",
    "similarity": "prompts that this answer was right for are like this one",
    "badly_rated": "prompts that this answer was wrong for are like this one",
    "rate": "how this answer is rated in general",
    "support": "how often this answer was rated well",
    "chosen": "it is the one that fits best among the known answers",
    "texts": "prompt and answer by themselves, as the encoder reads them",
    "turn": "how late in the episode it is",
    "tools": "how many tools were called before",
    "tool_error_share": "share of those that failed",
    "tool_errors": "tools that failed",
    "retries": "answers repeated before",
    "calls_tool": "it calls a tool",
    "cut_off": "it was cut off",
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
    found = dict(zip(("base", *NAMES), map(float, by_own), strict=True))
    found["base"] += float(shift)
    found |= dict(zip(features.NAMES, map(float, by_shared[: len(features.NAMES)]), strict=True))
    found["texts"] = float(by_shared[SHARED:].sum())
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


def alternatives(
    estimate: Estimate, answer: str, words: Sequence[Feedback], pessimism: float
) -> list[tuple[str, Estimate]]:
    """What the score would be if one more thing were said of the answer."""
    last = max((word.time for word in words), default=0.0) + 1
    more: dict[str, dict[str, Any]] = {
        "one more thumb up": {"kind": FeedbackKind.THUMB, "value": 1.0},
        "one more thumb down": {"kind": FeedbackKind.THUMB, "value": -1.0},
        "a correction to another answer": {"kind": FeedbackKind.CORRECTION, "text": f"not: {answer}"},
        "an outcome of 1": {"kind": FeedbackKind.OUTCOME, "value": 1.0},
        "an outcome of 0": {"kind": FeedbackKind.OUTCOME, "value": 0.0},
    }
    said = {"nothing said of it": evidence.said_of(answer, ())} if words else {}
    for name, fields in more.items():
        said[name] = evidence.said_of(answer, (*words, Feedback(id="what if", time=last, **fields)))
    return [(name, evidence.decide(estimate, one, pessimism)[0]) for name, one in said.items()]


def told(said: Said, words: Sequence[Feedback]) -> list[str]:
    """What was said of an answer, a line each, and what it adds up to."""
    lines = [f"{_named(word)}{'' if word.rater is None else f' by {word.rater[:12]}'}" for word in words]
    if said.outcome is not None:
        lines.append(f"an outcome decides: {said.outcome:g}")
    elif said.odds:
        lines.append(f"together {said.odds:+.2f} log-odds")
    return lines or ["nobody said anything"]


def _named(word: Feedback) -> str:
    name = f" {word.name!r}" if word.name else ""
    value = "" if word.value is None else f" {word.value:+g}" if word.kind is FeedbackKind.THUMB else f" {word.value:g}"
    text = f" {' '.join(word.text.split())[:60]!r}" if word.text else ""
    return f"{word.kind.value}{name}{value}{text}"
