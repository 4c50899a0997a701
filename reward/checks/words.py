"""Match with a reference text, exactly or nearly."""

from __future__ import annotations

import re
import unicodedata
from difflib import SequenceMatcher
from typing import Any

from everloop.section import Section
from pydantic import Field

from reward.checks.base import Check, TurnView, Verdict, always, right

COMPARED = 2000  # characters: the comparison takes time in the product of both lengths


class ExactOptions(Section):
    ignore_case: bool = False
    ignore_punctuation: bool = False


class FuzzyOptions(ExactOptions):
    at_least: float | None = Field(
        default=None, ge=0, le=1, description="likeness that is right; None: it is the value"
    )


def plain(text: str, options: ExactOptions) -> str:
    """One form of equal texts (Unicode NFKC), white space as single spaces."""
    text = unicodedata.normalize("NFKC", text)
    if options.ignore_case:
        text = text.casefold()
    if options.ignore_punctuation:
        text = re.sub(r"[^\w\s]", " ", text)
    return " ".join(text.split())


def exact(turn: TurnView, reference: Any, options: ExactOptions) -> Verdict:
    """Whether the answer is the reference, or one of several."""
    answer = plain(turn.answer, options)
    among = [plain(str(one), options) for one in (reference if isinstance(reference, list | tuple) else [reference])]
    return right(answer in among, "it is the reference" if answer in among else "it is not the reference")


def fuzzy(turn: TurnView, reference: Any, options: FuzzyOptions) -> Verdict:
    """How like the reference the answer is: twice the matching characters over all (Ratcliff and Obershelp)."""
    texts = [plain(str(text), options)[:COMPARED] for text in (turn.answer, reference)]
    likeness = SequenceMatcher(None, *texts, autojunk=False).ratio()
    why = f"likeness to the reference {likeness:.2f}"
    return Verdict(likeness, why) if options.at_least is None else right(likeness >= options.at_least, why)


EXACT = Check(exact, ExactOptions, always)
FUZZY = Check(fuzzy, FuzzyOptions, always)
