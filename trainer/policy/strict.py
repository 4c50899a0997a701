"""What a tool that is 'strict' promises: a call of it has arguments that fit its schema.

Nothing constrains what is sampled. A call whose arguments do not fit is no call: it stays words, and no agent gets
it. Checked is the part of JSON Schema in which strict tools are written; a schema that says more than that
(:func:`problem`) is refused with its request, for nothing would hold it. Work is bounded, whatever refers to what.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

DEEPEST = 64  # levels of schemas within schemas, references followed
MOST_STEPS = 10_000
ANNOTATIONS = frozenset(("title", "description", "default", "examples", "format", "$schema", "$id"))
NAMED = ("properties", "$defs", "definitions")  # schemas by name
TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "number": lambda value: _number(value),
    "integer": lambda value: _number(value) and float(value).is_integer(),
}
# What the value of each keyword must be.
SHAPES: dict[str, Callable[[Any], bool]] = {
    "type": lambda said: _types(said) != [] and all(isinstance(one, str) and one in TYPES for one in _types(said)),
    "enum": lambda said: isinstance(said, list),
    "const": lambda said: True,
    "anyOf": lambda said: isinstance(said, list),
    "$ref": lambda said: isinstance(said, str),
    "required": lambda said: isinstance(said, list) and all(isinstance(name, str) for name in said),
    "items": lambda said: True,
    "additionalProperties": lambda said: True,
    **dict.fromkeys(NAMED, lambda said: isinstance(said, dict)),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), lambda said: _number(said)),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), lambda said: _number(said)),
}


def problem(root: Any) -> str | None:
    """Why a schema cannot be held here; None: it can."""
    return _problem(root, root, 0)


def fits(root: Any, value: Any) -> bool:
    """Whether a value is what a schema without :func:`problem` asks for. One that takes too many steps does not."""
    return _Look(root).fits(root, value, 0)


def _problem(schema: Any, root: Any, depth: int) -> str | None:
    if depth > DEEPEST:
        return f"it nests deeper than {DEEPEST} levels"
    if isinstance(schema, bool):
        return None
    if not isinstance(schema, dict):
        return f"a schema must be an object, not {str(schema)[:40]!r}"
    for name, said in schema.items():
        if name in ANNOTATIONS:
            continue
        if name not in SHAPES:
            return f"{name[:64]!r} is not checked here"
        if not SHAPES[name](said):
            return f"{name!r} cannot be {str(said)[:40]!r}"
    if "$ref" in schema and _referred(root, schema["$ref"]) is None:
        return f"{schema['$ref'][:64]!r} refers to nothing in it"
    return next((why for inner in _inner(schema) if (why := _problem(inner, root, depth + 1))), None)


def _inner(schema: dict[str, Any]) -> Iterator[Any]:
    for name in NAMED:
        yield from schema.get(name, {}).values()
    yield from schema.get("anyOf", ())
    yield from (schema[name] for name in ("items", "additionalProperties") if name in schema)


def _referred(root: Any, reference: str) -> Any:
    """The schema that a reference within the same document names; None: there is none."""
    start, *path = reference.split("/")
    found = root if start == "#" else None
    for part in path:
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found if isinstance(found, dict | bool) else None


class _Look:
    """One look at one value."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._left = MOST_STEPS

    def fits(self, schema: Any, value: Any, depth: int) -> bool:
        self._left -= 1
        if self._left < 0 or depth > DEEPEST:
            return False
        if isinstance(schema, bool):
            return schema
        return (
            self._is(schema, value)
            and ("$ref" not in schema or self.fits(_referred(self._root, schema["$ref"]), value, depth + 1))
            and ("anyOf" not in schema or any(self.fits(one, value, depth + 1) for one in schema["anyOf"]))
            and all(self.fits(inner, part, depth + 1) for inner, part in _parts(schema, value))
        )

    def _is(self, schema: dict[str, Any], value: Any) -> bool:
        """What can be said of the value without looking into it."""
        if "type" in schema and not any(TYPES[one](value) for one in _types(schema["type"])):
            return False
        if "enum" in schema and not any(_same(one, value) for one in schema["enum"]):
            return False
        if "const" in schema and not _same(schema["const"], value):
            return False
        if isinstance(value, dict):
            return all(name in value for name in schema.get("required", ()))
        if isinstance(value, str):
            return bool(schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)))
        if isinstance(value, list):
            return bool(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)))
        return not _number(value) or _within(schema, value)


def _parts(schema: dict[str, Any], value: Any) -> Iterator[tuple[Any, Any]]:
    """(schema, part) of each part of a value that the schema says something of."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name, part in value.items():
            yield known.get(name, schema.get("additionalProperties", True)), part
    elif isinstance(value, list) and "items" in schema:
        yield from ((schema["items"], part) for part in value)


def _within(schema: dict[str, Any], value: float) -> bool:
    return bool(
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and value > schema.get("exclusiveMinimum", value - 1)
        and value < schema.get("exclusiveMaximum", value + 1)
    )


def _types(said: Any) -> list[Any]:
    return said if isinstance(said, list) else [said]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON: 1 is not true."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
