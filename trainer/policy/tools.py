"""Tools for models whose chat template has none: written into the system message, and read back from the answer.

The form is the one that Hermes and Qwen made common: the tools as JSON in the system message, a call as
``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, a result as ``<tool_response>…</tool_response>`` in a
message of the user. A model that was never taught it may well ignore it; the request is honoured either way, for
the model has been told.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.policy.strict import fits, problem

BEGIN, END = "<tool_call>", "</tool_call>"
_CALL = re.compile(re.escape(BEGIN) + r"\s*(\{.*?\})\s*(?:" + re.escape(END) + r"|\Z)", re.DOTALL)
PROMPT = (
    "You may call functions to help the user. These are their signatures, one JSON object a line:\n"
    "<tools>\n{tools}\n</tools>\n"
    "To call one, answer with its name and arguments as JSON, and nothing else:\n"
    '<tool_call>\n{{"name": "<name>", "arguments": {{}}}}\n</tool_call>'
)


def as_plain(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation in system, user and assistant messages with text alone."""
    plain = [_message(message) for message in messages]
    if not tools:
        return plain
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    told = PROMPT.format(tools=listed)
    if plain and plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    return {"role": message["role"], "content": written(content, message.get("tool_calls") or ())}


def written(content: str, calls: Sequence[dict[str, Any]]) -> str:
    """An answer's words and tool calls as one text, from which :func:`parse` reads them back."""
    marked = "\n".join(_written(call) for call in calls)
    return f"{content}\n{marked}".strip() if marked else content


def _written(call: dict[str, Any]) -> str:
    function = call.get("function") or {}
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except ValueError:
        arguments = function.get("arguments")
    body = {"name": function.get("name"), "arguments": arguments}
    return f"{BEGIN}\n{json.dumps(body, ensure_ascii=False)}\n{END}"


def offered(tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tools in OpenAI's form as (name: schema that arguments of a call fit): a strict one's own, else whatever."""
    functions = [tool.get("function") or {} for tool in tools]
    held = [function.get("parameters") or {} if function.get("strict") else True for function in functions]
    return {
        str(function.get("name", "")): True if problem(schema) else schema
        for function, schema in zip(functions, held, strict=True)
    }


def parse(text: str, known: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """(words before the first call, calls in OpenAI's form) of an answer. ``known``: tools as :func:`offered` says.

    No calls where none can be read, or none fits its schema.
    """
    calls = []
    for found in _CALL.finditer(text):
        try:
            body = json.loads(found[1])
            name, arguments = body["name"], body.get("arguments", {})
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(name, str) and name in known and fits(known[name], arguments):
            function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
            calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
    if not calls:
        return text, []
    return text[: text.index(BEGIN)].rstrip(), calls
