"""The number that an answer ends in, within a tolerance: '#### 1,234', 'A: 18', 'The answer is $3.50.'"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

from everloop.section import Section
from pydantic import Field

from reward.checks.base import LONGEST, NO_REFERENCE, Check, TurnView, Verdict, always, failed, right

NUMBER = r"[-+−]?\s?(?:[$€£]\s?)?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?:\s?/\s?\d+)?"
FOUND = re.compile(rf"(?<![\w.]){NUMBER}")
MARKED = re.compile(rf"(?:####|\bA:|\\boxed\{{|\banswer\s*(?:is|:|=))[\s*$]*({NUMBER})", re.IGNORECASE)


class NumberOptions(Section):
    absolute: float = Field(default=0.0, ge=0, description="largest difference that is right")
    relative: float = Field(default=0.0, ge=0, description="largest difference, as a share of the reference")
    marked: bool = Field(
        default=False, description="only a number after '####', 'A:', 'answer is' or in \\boxed counts"
    )


def read(text: str, *, marked: bool = False) -> Decimal | None:
    """The last marked number, else (unless ``marked``) the last number; None: there is none.

    Thousands' commas, a currency before it and a unit after it are left out; a fraction is divided.
    """
    text = text[-LONGEST:]
    for pattern, taken in ((MARKED, 1), (FOUND, 0)):
        values = [value for match in pattern.finditer(text) if (value := _value(match[taken])) is not None]
        if values:
            return values[-1]
        if marked:
            return None
    return None


def _value(written: str) -> Decimal | None:
    cleaned = re.sub(r"[\s,$€£+]", "", written.replace("−", "-"))
    over, _, under = cleaned.partition("/")
    try:
        value = Decimal(over) / Decimal(under) if under else Decimal(over)
    except (InvalidOperation, ZeroDivisionError):
        return None
    return value if value.is_finite() else None


def number(turn: TurnView, reference: Any, options: NumberOptions) -> Verdict:
    """Whether the answer's number is the reference's."""
    wanted = read(str(reference))
    if wanted is None:
        return failed(NO_REFERENCE, "the reference has no number in it")
    found = read(turn.answer, marked=options.marked)
    if found is None:
        return right(False, "the answer has no number")
    allowed = max(Decimal(str(options.absolute)), Decimal(str(options.relative)) * abs(wanted))
    return right(abs(found - wanted) <= allowed, f"it says {found}, the reference {wanted}")


NUMBER_CHECK = Check(number, NumberOptions, always)
