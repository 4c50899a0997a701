"""Checks by kind: their verdicts, and what becomes of a check that is unknown, misconfigured or broken itself."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from everloop.errors import ConfigError

from reward import checks
from reward.checks import Check, CheckConfig, Checks, TurnView, Verdict, kinds, run
from reward.checks.number import read


def verdict(
    kind: str, answer: str, reference: Any = None, turn: dict[str, Any] | None = None, **options: Any
) -> Verdict:
    source = None if reference is None else "gold"
    config = CheckConfig(name="it", kind=kind, reference=source, options=options)
    return run(config, TurnView(answer, references={"gold": reference}, **(turn or {})))


def test_all_kinds_are_found_by_entry_point() -> None:
    ours = {"exact", "fuzzy", "number", "json-schema", "pattern", "unit-tests", "sql", "tool-calls"}
    assert ours <= set(kinds())


@pytest.mark.parametrize(
    ("answer", "reference", "options", "value"),
    [
        (" card  arrival\n", "card arrival", {}, 1.0),
        ("Card arrival.", "card arrival", {}, 0.0),
        ("Card arrival.", "card arrival", {"ignore_case": True, "ignore_punctuation": True}, 1.0),
        ("ﬁne", "fine", {}, 1.0),
        ("b", ["a", "b"], {}, 1.0),
        ("", "a", {}, 0.0),
    ],
)
def test_exact(answer: str, reference: Any, options: dict[str, Any], value: float) -> None:
    assert verdict("exact", answer, reference, **options).value == value


def test_fuzzy_is_how_like_they_are_or_whether_that_is_enough() -> None:
    assert verdict("fuzzy", "abcd", "bcde").value == pytest.approx(2 * 3 / 8)
    assert verdict("fuzzy", "abcd", "bcde", at_least=0.75).value == 1.0
    assert verdict("fuzzy", "abcd", "bcde", at_least=0.76).value == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("He pays 3 + 4 = 7.\n#### 1,234.50\nThat is for 2 people.", "1234.50"),
        ("A: -5", "-5"),
        ("so 12 eggs, that is $1,000,000 a year.", "1000000"),
        ("The answer is **3.5** km", "3.5"),
        (r"thus \boxed{42}, as 7 is odd", "42"),
        ("it is 1/4 of it", "0.25"),
        ("−7 °C", "-7"),
        ("2e3", "2000"),
        ("nothing", None),
        ("1/0", None),
        ("version v2 of it", None),
    ],
)
def test_the_number_of_a_text(text: str, number: str | None) -> None:
    found = read(text)
    assert (None if found is None else float(found)) == (None if number is None else float(number))


def test_numbers_are_compared_within_a_tolerance() -> None:
    assert verdict("number", "about 3.14", "3.14159").value == 0.0
    assert verdict("number", "about 3.14", "3.14159", absolute=0.01).value == 1.0
    assert verdict("number", "990", 1000, relative=0.01).value == 1.0
    assert verdict("number", "989", 1000, relative=0.01).value == 0.0
    assert verdict("number", "no idea", 5).value == 0.0
    assert verdict("number", "5 of 7", 7, marked=True).value == 0.0
    assert verdict("number", "5", "none").failure == "no_reference"


def test_verdicts_on_gsm8k_are_the_marks_of_the_data_set() -> None:
    data = os.environ.get("EVERLOOP_DATA")
    if not data:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("EVERLOOP_DATA names no folder: GSM8K was not read")
    config = CheckConfig(name="gsm8k", kind="number", reference="gold")
    agree = of = 0
    with (Path(data) / "gsm8k" / "example_model_solutions.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            for solution in (one for one in row.values() if isinstance(one, dict)):
                turn = TurnView(solution["solution"], references={"gold": row["ground_truth"]})
                agree += run(config, turn).value == float(solution["is_correct"])
                of += 1
    print(f"GSM8K: the number check agrees with {agree} of {of} marks")
    assert of == 5276
    assert agree >= 0.999 * of


def test_patterns() -> None:
    assert verdict("pattern", "ticket AB-12 is open", pattern=r"[A-Z]{2}-\d+").value == 1.0
    assert verdict("pattern", "ticket AB-12 is open", pattern=r"[A-Z]{2}-\d+", whole=True).value == 0.0
    assert verdict("pattern", "ab-12", pattern=r"[A-Z]{2}-\d+", whole=True, ignore_case=True).value == 1.0


def test_a_pattern_that_explodes_is_no_opinion_and_one_that_is_none_is_refused() -> None:
    assert verdict("pattern", "a" * 60 + "b", pattern=r"(a+)+$", seconds=2).failure == "timeout"
    with pytest.raises(
        ConfigError, match=r"options\.pattern: '\(' is no regular expression .*(unterminated|missing \))"
    ):
        verdict("pattern", "a", pattern="(")


SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("answer", "value", "why"),
    [
        ('{"n": 3}', 1.0, "what the schema says"),
        ('Here:\n```json\n{"n": 3}\n```', 1.0, "what the schema says"),
        ('{"n": "3"}', 0.0, "$.n"),
        ('{"n": 3, "m": 4}', 0.0, "m"),
        ("n: 3", 0.0, "not JSON"),
        ("[" * 100_000, 0.0, "not JSON"),
    ],
)
def test_json_by_its_schema(answer: str, value: float, why: str) -> None:
    found = verdict("json-schema", answer, json_schema=SCHEMA)
    assert (found.value, found.failure) == (value, None)
    assert why in found.why


def test_a_schema_that_reaches_out_or_explodes_is_no_opinion_and_one_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"options\.json_schema: .* at \$\.type, 'number-ish'"):
        verdict("json-schema", "3", json_schema={"type": "number-ish"})
    told = verdict("json-schema", "3", {"type": "number-ish"})
    assert (told.failure, "the reference: it is no JSON Schema" in told.why) == ("no_reference", True)
    assert verdict("json-schema", "3", json_schema={"$ref": "http://127.0.0.1:9/x"}).failure == "raised"
    exploding = {"type": "string", "pattern": "(a+)+$"}
    answer = json.dumps("a" * 60 + "b")
    assert verdict("json-schema", answer, json_schema=exploding, seconds=3).failure == "timeout"


TOOL = {"type": "function", "function": {"name": "route", "parameters": SCHEMA}}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("calls", "value", "why"),
    [
        ([call("route", '{"n": 3}')], 1.0, "what the schema says"),
        ([call("route", '{"n": 3}'), call("route", '{"n": null}')], 0.0, "$.n"),
        ([call("rout", '{"n": 3}')], 0.0, "there is no tool 'rout'; on offer are: route"),
        ([call("route", '{"n": 3')], 0.0, "are not JSON"),
        ([call("route", "[3]")], 0.0, "are not an object"),
        ([call("route", "")], 0.0, "'n' is a required property"),
        ([], None, "it calls no tool"),
    ],
)
def test_tool_calls_by_what_was_on_offer(calls: list[Any], value: float | None, why: str) -> None:
    found = verdict("tool-calls", "", turn={"tool_calls": tuple(calls), "tools": (TOOL,)})
    assert (found.value, found.failure) == (value, None)
    assert why in found.why


def test_where_a_call_is_required_none_is_wrong() -> None:
    assert verdict("tool-calls", "hello", turn={"tools": (TOOL,)}, required=True).value == 0.0


SETUP = "CREATE TABLE card (id INTEGER, owner TEXT, fee REAL); INSERT INTO card VALUES (1, 'a', 0.1), (2, 'b', 0.2);"


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("```sql\nSELECT owner FROM card ORDER BY id DESC;\n```", "SELECT owner FROM card", 1.0),
        ("SELECT sum(fee) FROM card", [[0.30000000000000004]], 1.0),
        ("SELECT owner FROM card WHERE id = 1", "SELECT owner FROM card", 0.0),
        ("SELECT nothing FROM card", "SELECT owner FROM card", 0.0),
        ("DELETE FROM card", "SELECT owner FROM card", 0.0),
        ("ATTACH '/etc/passwd' AS x", "SELECT owner FROM card", 0.0),
        ("I would select it", "SELECT owner FROM card", 0.0),
    ],
)
def test_sql_by_its_result(answer: str, reference: Any, value: float) -> None:
    found = verdict("sql", answer, reference, setup=SETUP)
    assert (found.value, found.failure) == (value, None)


def test_sql_whose_order_matters_that_never_ends_or_has_no_reference() -> None:
    asked = "SELECT owner FROM card ORDER BY id DESC"
    assert verdict("sql", asked, "SELECT owner FROM card ORDER BY id", setup=SETUP, ordered=True).value == 0.0
    for_ever = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    assert verdict("sql", for_ever, asked, setup=SETUP, seconds=2).failure == "timeout"
    assert verdict("sql", asked, "SELECT nothing", setup=SETUP).failure == "no_reference"


def test_what_is_misconfigured_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"no check of the kind 'exakt'; there are: exact, fuzzy, json-schema"):
        Checks([CheckConfig(name="a", kind="exakt")])
    with pytest.raises(ConfigError, match=r"check 'a' \(exact\): options\.ignore_cse: .* Its options are: ignore_case"):
        Checks([CheckConfig(name="a", kind="exact", options={"ignore_cse": True})])
    with pytest.raises(ConfigError, match=r"check 'a' \(sql\): reference: it compares .* none is named"):
        Checks([CheckConfig(name="a", kind="sql", options={"setup": ""})])
    with pytest.raises(ConfigError, match="several checks are called a"):
        Checks([CheckConfig(name="a", kind="exact"), CheckConfig(name="a", kind="number")])


def test_a_turn_without_the_reference_is_no_opinion() -> None:
    found = run(CheckConfig(name="a", kind="exact", reference="gold"), TurnView("x"))
    assert (found.value, found.failure) == (None, "no_reference")


def test_an_answer_of_half_a_surrogate_is_answered_all_the_same() -> None:
    assert verdict("exact", "\ud800", "x").value == 0.0
    assert verdict("pattern", "\ud800", pattern="x").value == 0.0


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], CheckConfig]:
    """A check of somebody else's, found by an entry point."""

    def install(thing: Any) -> CheckConfig:
        monkeypatch.setattr(checks, "_theirs", thing, raising=False)
        point = EntryPoint("theirs", "reward.checks:_theirs", checks.GROUP)
        monkeypatch.setattr(checks, "kinds", lambda: {"theirs": point})
        checks._load.cache_clear()
        return CheckConfig(name="theirs", kind="theirs")

    yield install
    checks._load.cache_clear()


@pytest.mark.parametrize(
    ("returns", "failure"),
    [
        (Verdict(math.nan, ""), "not_a_value"),
        (Verdict(1.5, ""), "not_a_value"),
        (Verdict(True, ""), "not_a_value"),
        (1.0, "not_a_value"),
        (None, "not_a_value"),
        (Verdict(None, "cannot tell"), None),
        (Verdict(1, "right"), None),
    ],
)
def test_what_a_foreign_check_returns_is_looked_at(installed: Any, returns: Any, failure: str | None) -> None:
    found = Checks([installed(Check(lambda turn, reference, options: returns))])
    judged = found.run(TurnView("x"))["theirs"]
    assert judged.failure == failure
    assert judged.value is None or isinstance(judged.value, float)
    assert sum(found.failures.values()) == (failure is not None)


def test_a_foreign_check_that_raises_is_no_opinion_and_counted(installed: Any) -> None:
    def raises(turn: TurnView, reference: Any, options: Any) -> Verdict:
        raise KeyError("gold")

    found = Checks([installed(Check(raises))])
    for _ in range(2):
        assert found.run(TurnView("x"))["theirs"].why == "the check raised KeyError: 'gold'"
    assert found.failures == {("theirs", "raised"): 2}


def test_an_entry_point_that_is_no_check_is_refused(installed: Any) -> None:
    with pytest.raises(ConfigError, match=r"is 3, not a reward\.checks\.Check"):
        Checks([installed(3)])
