"""Answers worth nothing whatever a model has learned: that say nothing, only say back, or are a broken tool call.

A rule, since people rarely rate such answers, so that nothing else would teach it, and a policy in training finds them.
It needs no right to an opinion: what a model is unsure of is not trained on, and would so escape a penalty.
"""

from __future__ import annotations

import json
import re

from reward.features import ANSWER_CHARS, Example

ECHO = 0.95  # share of an answer's words that are its prompt's, from which on it only says it back
COVERED = 0.5  # share of the prompt's words that it then has: a passage that was asked for has fewer
FEWEST = 6  # distinct words below which two texts may well be the same
CALL = re.compile(r"<tool_call>|^\s*\{\s*\"(?:name|function|arguments)\"\s*:")


def broken_call(text: str) -> bool:
    """Whether an answer's words are a tool call that never became one.

    Where an engine reads calls out of the words, what is left of one there could not be read.
    """
    found = CALL.search(text)
    if found is None:
        return False
    if found[0] == "<tool_call>":
        return True
    if len(text) >= ANSWER_CHARS:  # it may have been cut here
        return False
    try:
        return not isinstance(json.loads(text), dict)
    except ValueError:
        return True


def worthless(example: Example) -> bool:
    """Whether an answer says and does nothing, is its own prompt, or a tool call that nobody can carry out."""
    said = set(example.answer.lower().split())
    if not said or broken_call(example.answer):
        return True
    asked = set(example.prompt.lower().split())
    same = len(said & asked)
    return len(said) >= FEWEST and same >= ECHO * len(said) and same >= COVERED * len(asked)
