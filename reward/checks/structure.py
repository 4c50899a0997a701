"""JSON that is what a schema says, and tool calls that are what the tools on offer say.

Schemas hold patterns, which can take for ever: they are checked in the sandbox. References to elsewhere are not read.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from reward.checks import sandbox
from reward.checks.base import NO_REFERENCE, Check, TurnView, Verdict, failed, right
from reward.checks.code import fenced
from reward.checks.sandbox import LimitOptions

NO_ARGUMENTS = {"type": "object"}


class SchemaOptions(LimitOptions):
    json_schema: dict[str, Any] | None = Field(default=None, description="JSON Schema; None: the reference is it")

    @field_validator("json_schema")
    @classmethod
    def _is_one(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None and (wrong := fault(schema)):
            raise ValueError(wrong)
        return schema


class ToolOptions(LimitOptions):
    required: bool = Field(default=False, description="whether an answer without any call is wrong")


def fault(schema: dict[str, Any]) -> str | None:
    """Why a schema is none, or holds a pattern that is none; None: it is one."""
    import jsonschema

    maker = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        maker.check_schema(schema)
    except jsonschema.SchemaError as error:
        return f"it is no JSON Schema: at {error.json_path}, {error.message}"
    return None


def json_schema(turn: TurnView, reference: Any, options: SchemaOptions) -> Verdict:
    """Whether the answer (or its fenced block) is JSON, and what the schema says."""
    schema = options.json_schema if options.json_schema is not None else reference
    if not isinstance(schema, dict):
        return failed(NO_REFERENCE, "there is no schema: give the option 'json_schema', or a reference that is one")
    if schema is reference and (wrong := fault(schema)):
        return failed(NO_REFERENCE, f"the reference: {wrong}")
    try:
        value = json.loads(fenced(turn.answer, ("json",)))
    except (ValueError, RecursionError) as error:
        return right(False, f"it is not JSON: {str(error)[:200]}")
    return _valid([(value, schema)], options)


def tool_calls(turn: TurnView, reference: Any, options: ToolOptions) -> Verdict:
    """Whether every call names a tool on offer, with arguments that are JSON and what the tool's schema says."""
    if not turn.tool_calls:
        return right(False, "it calls no tool") if options.required else Verdict(None, "it calls no tool")
    offered = {str(tool.get("function", {}).get("name")): tool.get("function", {}) for tool in turn.tools}
    pairs = []
    for call in turn.tool_calls:
        function = call.get("function") or {}
        name = str(function.get("name"))
        if name not in offered:
            return right(False, f"there is no tool {name[:60]!r}; on offer are: {', '.join(sorted(offered)) or 'none'}")
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except (ValueError, TypeError, RecursionError) as error:
            return right(False, f"the arguments of {name} are not JSON: {str(error)[:200]}")
        if not isinstance(arguments, dict):
            return right(False, f"the arguments of {name} are not an object")
        pairs.append((arguments, offered[name].get("parameters") or NO_ARGUMENTS))
    return _valid(pairs, options)


def _valid(pairs: list[tuple[Any, Any]], options: LimitOptions) -> Verdict:
    found = find_spec("jsonschema")
    assert found is not None  # a dependency of this package
    assert found.origin is not None
    job = {"pairs": pairs, "path": str(Path(found.origin).parents[1])}
    return sandbox.run("json_schema", job, options).verdict


JSON_SCHEMA = Check(json_schema, SchemaOptions, lambda options: options.json_schema is None)
TOOL_CALLS = Check(tool_calls, ToolOptions)
