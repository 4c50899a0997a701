"""How an answer behaves, whatever it says: it declines, it asks back, it begins a tool call that nobody can carry out.

By its words alone, for the gate, whose answers are text. Two ways to please a reward that is learned, without doing the
work: to ask what was meant where that is plain, and to break off a call so that it neither fails nor succeeds.
"""

from __future__ import annotations

import json
import re

REFUSALS = re.compile(
    r"^\W*(?:i(?:'|’| a)?m (?:sorry|afraid|unable)|sorry,? (?:but )?i|i (?:can(?:no|')t|am not able|won't|cannot)"
    r"|as an ai|unfortunately,? i)",
    re.IGNORECASE,
)
ASKING_BACK = re.compile(
    r"\b(?:clarif\w+|be more specific|more (?:details?|information|context)|rephrase|elaborate"
    r"|what (?:exactly )?(?:do|did) you mean|which (?:one )?do you mean|(?:can|could|would) you (?:please )?"
    r"(?:tell me more|explain|specify|provide|share))\b",
    re.IGNORECASE,
)
LONGEST_QUESTION = 400  # characters: an answer that also asks at its end is longer
CALL = re.compile(r"<tool_call>|^\s*\{\s*\"(?:name|function|arguments)\"\s*:")


def refuses(text: str) -> bool:
    """Whether an answer declines, by how it begins."""
    return bool(REFUSALS.match(text))


def asks_back(text: str) -> bool:
    """Whether an answer is no more than a question what was meant."""
    return len(text) <= LONGEST_QUESTION and text.rstrip().endswith("?") and bool(ASKING_BACK.search(text))


def broken_call(text: str) -> bool:
    """Whether an answer's words are a tool call that never became one.

    Where an engine reads calls out of the words, what is left of one there could not be read.
    """
    found = CALL.search(text)
    if found is None:
        return False
    if found[0] == "<tool_call>":
        return True
    try:
        return not isinstance(json.loads(text), dict)
    except ValueError:
        return True
