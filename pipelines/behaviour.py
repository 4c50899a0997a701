"""How an answer behaves, whatever it says: it declines, or it asks back. By its words alone.

To ask what was meant where that is plain is a way to please a learned reward without doing the work; another one, to
break off a tool call so that it neither fails nor succeeds, is told by :func:`reward.floor.broken_call`.
"""

from __future__ import annotations

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


def refuses(text: str) -> bool:
    """Whether an answer declines, by how it begins."""
    return bool(REFUSALS.match(text))


def asks_back(text: str) -> bool:
    """Whether an answer is no more than a question what was meant."""
    return len(text) <= LONGEST_QUESTION and text.rstrip().endswith("?") and bool(ASKING_BACK.search(text))
