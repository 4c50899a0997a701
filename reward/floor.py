"""Answers that are worth nothing whatever a model has learned: those that say nothing, and those that only say back.

A rule, since people rarely rate such answers, so that nothing else would teach it, and a policy in training finds them.
"""

from __future__ import annotations

from reward.features import Example

ECHO = 0.95  # share of an answer's words that are its prompt's, from which on it only says it back
COVERED = 0.5  # share of the prompt's words that it then has: a passage that was asked for has fewer
FEWEST = 6  # distinct words below which two texts may well be the same


def worthless(example: Example) -> bool:
    """Whether an answer says and does nothing, or is its own prompt."""
    said = set(example.answer.lower().split())
    if not said:
        return True
    asked = set(example.prompt.lower().split())
    same = len(said & asked)
    return len(said) >= FEWEST and same >= ECHO * len(said) and same >= COVERED * len(asked)
