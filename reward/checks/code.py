"""What runs the answer: unit tests, SQL, and regular expressions, which can take for ever. All in the sandbox."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from reward.checks import sandbox
from reward.checks.base import NO_REFERENCE, Check, TurnView, Verdict, always, failed
from reward.checks.sandbox import LimitOptions, cut

FENCED = re.compile(r"```[ \t]*([\w+-]*)[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


class UnitTestOptions(LimitOptions):
    tests: str | None = Field(default=None, description="Python source; None: the reference is it")


class SqlOptions(LimitOptions):
    setup: str = Field(description="statements that make the tables (SQLite) which both queries read")
    ordered: bool = Field(default=False, description="whether the order of rows matters")
    most_rows: int = Field(default=10_000, ge=1, description="of a result that are compared")


class PatternOptions(LimitOptions):
    pattern: str = Field(min_length=1, description="Python's regular expressions")
    whole: bool = Field(default=False, description="it must be the whole answer, not be found in it")
    ignore_case: bool = False

    @field_validator("pattern")
    @classmethod
    def _is_one(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{pattern!r} is no regular expression of Python's ({error}); in TOML write it between single quotes, "
                "which leave backslashes alone"
            ) from None
        return pattern


def fenced(answer: str, languages: tuple[str, ...]) -> str:
    """The code of the answer's blocks of these languages, else of its blocks without one, else all of it."""
    blocks = [(match[1].lower(), match[2]) for match in FENCED.finditer(cut(answer))]
    for wanted in (languages, ("",)):
        found = [code for language, code in blocks if language in wanted]
        if found:
            return "\n\n".join(found)
    return cut(answer)


def unit_tests(turn: TurnView, reference: Any, options: UnitTestOptions) -> Verdict:
    """The share of the tests that pass. The tests see the names that the answer's code defines."""
    tests = options.tests if options.tests is not None else reference
    if not isinstance(tests, str):
        return failed(NO_REFERENCE, "there are no tests: give the option 'tests', or a reference that is Python source")
    job = {"answer": fenced(turn.answer, ("python", "py", "python3")), "tests": tests}
    return sandbox.run("unit_tests", job, options).verdict


def sql(turn: TurnView, reference: Any, options: SqlOptions) -> Verdict:
    """Whether the answer's query gives what the reference (a query, or a list of rows) gives."""
    if not isinstance(reference, str | list | tuple):
        return failed(NO_REFERENCE, "the reference is neither a query nor a list of rows")
    job = {
        "answer": fenced(turn.answer, ("sql", "sqlite")).strip().rstrip(";"),
        "reference": reference,
        **options.model_dump(include={"setup", "ordered", "most_rows"}),
    }
    verdict = sandbox.run("sql", job, options).verdict
    return failed(NO_REFERENCE, verdict.why) if verdict.value is None and verdict.failure is None else verdict


def pattern(turn: TurnView, reference: Any, options: PatternOptions) -> Verdict:
    """Whether the pattern is in the answer."""
    job = {"answer": cut(turn.answer), **options.model_dump(include={"pattern", "whole", "ignore_case"})}
    return sandbox.run("pattern", job, options).verdict


UNIT_TESTS = Check(unit_tests, UnitTestOptions, lambda options: options.tests is None)
SQL = Check(sql, SqlOptions, always)
PATTERN = Check(pattern, PatternOptions)
