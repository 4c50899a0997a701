"""What a parameter's value must be: for the request that has it, and for the description of the API."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from services.gateway.refusals import Refused

MOST_STOPS = 16
JSON_TYPES = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}


def bad(message: str, param: str | None = None, code: str | None = "invalid_value") -> Refused:
    return Refused(400, message, code, param)


class Check(NamedTuple):
    """What a parameter's value must be. ``schema`` says the same in JSON Schema, for the description of the API."""

    fits: Callable[[Any], bool]
    words: str
    schema: dict[str, Any]

    def __call__(self, name: str, value: Any) -> None:
        """Raises Refused (400) where ``value`` is not so."""
        if not self.fits(value):
            inside = isinstance(value, list) and "array" in self.schema["type"]  # it is what is in it that does not fit
            raise bad(f"'{name}' must be {self.words}" + ("" if inside else f", not {shown(value)}"), name)


def number(low: float, high: float) -> Check:
    def fits(value: Any) -> bool:
        return not isinstance(value, bool) and isinstance(value, int | float) and low <= value <= high

    schema = {"type": "number", "minimum": low, "maximum": high}
    return Check(fits, f"a number from {low:g} to {high:g}", schema)


def whole(low: int, high: int) -> Check:
    def fits(value: Any) -> bool:
        return not isinstance(value, bool) and isinstance(value, int) and low <= value <= high

    schema = {"type": "integer", "minimum": low, "maximum": high}
    return Check(fits, f"a whole number from {low} to {high}", schema)


def kind(kinds: type | tuple[type, ...], words: str) -> Check:
    """A value of one of these types, said in ``words``."""
    each = kinds if isinstance(kinds, tuple) else (kinds,)
    return Check(lambda value: isinstance(value, kinds), words, {"type": [JSON_TYPES[kind] for kind in each]})


def shown(value: Any) -> str:
    """A value as an error message may show it: short, whatever was sent."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _are_stops(value: Any) -> bool:
    stops = [value] if isinstance(value, str) else value
    return isinstance(stops, list) and len(stops) <= MOST_STOPS and all(isinstance(s, str) and s for s in stops)


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


flag = kind(bool, "true or false")
text = kind(str, "a text")
table = kind(dict, "an object")
any_list = kind(list, "a list")
stops = Check(
    _are_stops,
    f"a text or a list of at most {MOST_STOPS} texts, none of them empty",
    {
        "type": ["string", "array"],
        "minLength": 1,
        "items": {"type": "string", "minLength": 1},
        "maxItems": MOST_STOPS,
    },
)
tools = Check(
    lambda value: isinstance(value, list) and all(map(_is_tool, value)),
    "a list of {'type': 'function', 'function': {'name': …}}",
    {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["function"],
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            },
        },
    },
)
