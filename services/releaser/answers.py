"""What is wrong with an answer, seen from its fields alone: nothing in it, a tool call that no agent can carry out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def text_of(output: dict[str, Any]) -> str:
    """The words of an answer (fields of a message)."""
    content = output.get("content")
    return content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content or ())


def is_empty(output: dict[str, Any]) -> bool:
    """Whether an answer has neither words nor tool calls."""
    return not text_of(output).strip() and not output.get("tool_calls")


def length(output: dict[str, Any]) -> int:
    """Characters of an answer, the arguments of its tool calls included."""
    called = sum(
        len(str((call.get("function") or {}).get("arguments") or "")) for call in output.get("tool_calls") or ()
    )
    return len(text_of(output)) + called


def is_broken(output: dict[str, Any], tools: Iterable[dict[str, Any]]) -> bool:
    """Whether one of an answer's tool calls names no tool that was offered, or has arguments that are no JSON object.

    So has one that was begun in the words and never became a call.
    """
    offered = {(tool.get("function") or {}).get("name") for tool in tools}
    asked = [call.get("function") or {} for call in output.get("tool_calls") or ()]
    if not asked:
        return bool(offered) and "<tool_call>" in text_of(output)
    return any(one.get("name") not in offered or not _is_object(one.get("arguments")) for one in asked)


def _is_object(arguments: Any) -> bool:
    try:
        return isinstance(json.loads(arguments or "{}"), dict)
    except (TypeError, ValueError):
        return False
