"""Strict tools: the schemas that can be held, and what fits them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from trainer.policy.strict import fits, problem
from trainer.policy.tools import offered, parse

TREE = {
    "type": "object",
    "properties": {"left": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "name": {"$ref": "#/$defs/a~1b"}},
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"a/b": {"type": "string", "minLength": 2, "maxLength": 3}},
}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, [1, 1.0, -3], [1.5, True, "1", None]),
        ({"type": ["number", "null"]}, [1, 0.5, None], [True, "x", []]),
        ({"type": "boolean"}, [True, False], [0, 1, "true"]),
        ({"enum": ["a", 1, None]}, ["a", 1, None], ["b", True, 0]),
        ({"const": {"a": [1]}}, [{"a": [1]}], [{"a": [True]}, {}]),
        ({"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2}, [["a"]], [[], [1], ["a"] * 3]),
        ({"minimum": 1, "exclusiveMaximum": 3}, [1, 2.9, "no number"], [0, 3]),
        ({"exclusiveMinimum": 1, "maximum": 3}, [3, 1.1], [1, 4]),
        ({"additionalProperties": {"type": "string"}}, [{}, {"a": "b"}, 7], [{"a": 1}]),
        (TREE, [{"name": "ab"}, {"name": "ab", "left": {"name": "abc", "left": None}}], [{}, {"name": "a"}, [], None]),
        (TREE, [], [{"name": "ab", "more": 1}, {"name": "ab", "left": {"left": None}}, {"name": "abcd"}]),
        (True, [1, None], []),
        (False, [], [1, None]),
    ],
)
def test_what_fits_a_schema(schema: Any, good: list[Any], bad: list[Any]) -> None:
    assert problem(schema) is None
    assert [value for value in good if not fits(schema, value)] == []
    assert [value for value in bad if fits(schema, value)] == []


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ([], "must be an object"),
        ({"pattern": "(a+)+$"}, "'pattern' is not checked here"),
        ({"properties": {"a": {"allOf": []}}}, "'allOf' is not checked here"),
        ({"type": "text"}, "'type' cannot be 'text'"),
        ({"type": []}, "'type' cannot be"),
        ({"type": [["string"]]}, "'type' cannot be"),
        ({"properties": []}, "'properties' cannot be"),
        ({"required": "a"}, "'required' cannot be"),
        ({"anyOf": {}}, "'anyOf' cannot be"),
        ({"items": 7}, "must be an object"),
        ({"minimum": True}, "'minimum' cannot be"),
        ({"$ref": "#/$defs/none"}, "refers to nothing in it"),
        ({"$ref": "http://127.0.0.1/schema"}, "refers to nothing in it"),
        ({"$ref": 7}, "'$ref' cannot be"),
        (nested(65), "nests deeper than 64"),
    ],
)
def test_a_schema_that_nothing_would_hold_says_why(schema: Any, words: str) -> None:
    assert words in str(problem(schema))


def test_properties_may_have_the_names_of_keywords() -> None:
    schema = {"type": "object", "properties": {"pattern": {"type": "string"}, "type": {"type": "integer"}}}
    assert problem(schema) is None
    assert fits(schema, {"pattern": "a", "type": 1})
    assert not fits(schema, {"pattern": 1})


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"$defs": {str(at): {"anyOf": [{"$ref": f"#/$defs/{at + 1}"}] * 2} for at in range(60)} | {"60": False}}
        | {"$ref": "#/$defs/0"},
    ],
)
def test_schemas_without_end_are_looked_at_for_a_moment_and_fit_nothing(schema: dict[str, Any]) -> None:
    began = time.monotonic()
    assert problem(schema) is None
    assert not fits(schema, {})
    assert time.monotonic() - began < 20, "not for ever"


def test_a_call_that_does_not_fit_is_no_call() -> None:
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "weather", "parameters": city}
    good, bad = (
        f'<tool_call>{{"name": "weather", "arguments": {{"city": {value}}}}}</tool_call>' for value in ('"a"', "7")
    )
    loose, strict = (
        offered([{"type": "function", "function": {**function, "strict": held}}]) for held in (False, True)
    )
    assert [len(parse(text, loose)[1]) for text in (good, bad)] == [1, 1]
    assert [len(parse(text, strict)[1]) for text in (good, bad)] == [1, 0]
    assert parse(bad, strict)[0] == bad
    assert parse(good.replace('"weather"', '["weather"]'), strict)[1] == []
    (call,) = parse(good + bad, strict)[1]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "a"}'}
