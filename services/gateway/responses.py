"""A request to ``/v1/responses`` (OpenAI's Responses API), checked and turned into one of chat.

What it asks of a model is a chat call in another form, and from here on it is one: the same episode, record, retries
and canary. What would need a memory of earlier answers, or tools that run here, is refused by name.
"""

from __future__ import annotations

from typing import Any

from everloop.config import PolicyConfig

from services.gateway import ask
from services.gateway.ask import CHECKS, Ask, unknown
from services.gateway.checks import Check, any_list, bad, flag, kind, shown, table, text
from services.gateway.items import messages

LOGPROBS = "message.output_text.logprobs"
INCLUDES = (LOGPROBS, "reasoning.encrypted_content")
CHOICES = ("none", "auto", "required")

# What goes to the engine under its name in chat.
SAME: dict[str, Check] = {
    name: CHECKS[name]
    for name in (
        "model",
        "stream",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "stop",
        "parallel_tool_calls",
        "chat_template_kwargs",
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    )
}
# What has another name or form there.
TURNED: dict[str, Check] = {
    "input": kind((str, list), "a text or a list of items"),
    "instructions": text,
    "max_output_tokens": CHECKS["max_tokens"],
    "top_logprobs": CHECKS["top_logprobs"],
    "include": any_list,
    "tools": any_list,
    "tool_choice": CHECKS["tool_choice"],
    "text": table,
    "reasoning": table,
    "stream_options": table,
    "truncation": text,
    "background": flag,
}
# What is not done here, and what to do instead.
NOT_HERE: dict[str, str] = {
    "previous_response_id": "answers are not kept to be gone on from; send the earlier items in 'input'",
    "conversation": "the gateway keeps no conversations; send the earlier items in 'input'",
    "prompt": "the gateway keeps no prompts; send 'instructions' and 'input'",
    "max_tool_calls": "no tools run here; count the calls of your own functions yourself",
    "context_management": "nothing is compacted here; send the items that the model shall read",
    "moderation": "nothing is moderated here; ask a moderation endpoint of your provider yourself",
}
PARAMETERS = {**SAME, **TURNED}


def read(body: dict[str, Any], policies: dict[str, PolicyConfig]) -> Ask:
    """The request in ``body``. Raises Refused: 400 for what is not sound, 404 for a model that is not there."""
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in NOT_HERE:
            raise bad(f"'{name}' is not done here: {NOT_HERE[name]}", name, "unsupported_parameter")
        if name not in PARAMETERS:
            raise unknown(name, PARAMETERS)
        PARAMETERS[name](name, value)
    _refuse_what_is_not_done(given)
    chat = {name: given[name] for name in SAME if name in given}
    chat["messages"] = messages(given.get("input"), given.get("instructions"))
    if "max_output_tokens" in given:
        chat["max_completion_tokens"] = given["max_output_tokens"]
    if given.get("tools"):
        chat["tools"] = [_tool(tool, f"tools[{at}]") for at, tool in enumerate(given["tools"])]
    if "tool_choice" in given:
        chat["tool_choice"] = _choice(given["tool_choice"])
    chat |= _logprobs(given) | _format(given.get("text", {})) | _reasoning(given.get("reasoning", {}))
    asked = ask.read("chat/completions", chat, policies)
    asked.echo = {name: value for name, value in given.items() if name not in ("input", "stream", "include", "store")}
    return asked


def _refuse_what_is_not_done(given: dict[str, Any]) -> None:
    if given.get("background"):
        raise bad(
            "'background' is not done here: an answer is given to the request that asks for it; use 'stream'",
            "background",
            "unsupported_parameter",
        )
    if given.get("truncation", "disabled") != "disabled":
        raise bad(
            "'truncation' can be 'disabled' alone: the gateway leaves nothing out; send fewer items",
            "truncation",
            "unsupported_parameter",
        )


def _tool(tool: Any, where: str) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise bad(
            f"{where} is of type {shown(kind)}: no tools run here. Give tools of type 'function' and run them yourself",
            "tools",
            "unsupported_tool",
        )
    if not isinstance(tool.get("name"), str) or not tool["name"]:
        raise bad(f"{where}.name is missing: {{'type': 'function', 'name': …, 'parameters': …}}", "tools")
    function = {
        name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name) is not None
    }
    return {"type": "function", "function": function}


def _choice(choice: Any) -> Any:
    if choice in CHOICES:
        return choice
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    words = ", ".join(map(repr, CHOICES))
    raise bad(
        f"'tool_choice' must be {words} or {{'type': 'function', 'name': …}}; no other tools are here", "tool_choice"
    )


def _logprobs(given: dict[str, Any]) -> dict[str, Any]:
    for name in given.get("include", ()):
        if name not in INCLUDES:
            raise bad(f"'include' has {shown(name)}, which no answer here has; known: {', '.join(INCLUDES)}", "include")
    most = given.get("top_logprobs", 0)
    return {"logprobs": True, "top_logprobs": most} if most or LOGPROBS in given.get("include", ()) else {}


def _format(given: dict[str, Any]) -> dict[str, Any]:
    """``text`` as chat's ``response_format`` and ``verbosity``."""
    asked: dict[str, Any] = {}
    for name, value in given.items():
        if name not in ("format", "verbosity"):
            raise bad(f"'text' has 'format' and 'verbosity', not {shown(name)}", "text", "unknown_parameter")
        if name == "verbosity" and value is not None:
            CHECKS["verbosity"]("text.verbosity", value)
            asked["verbosity"] = value
    form = given.get("format") or {"type": "text"}
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_schema":
        inner = {name: form[name] for name in ("name", "description", "schema", "strict") if form.get(name) is not None}
        if not isinstance(inner.get("name"), str) or not isinstance(inner.get("schema"), dict):
            raise bad("'text.format' of type json_schema needs 'name' and 'schema'", "text")
        return asked | {"response_format": {"type": "json_schema", "json_schema": inner}}
    if kind == "json_object":
        return asked | {"response_format": {"type": "json_object"}}
    if kind != "text":
        raise bad(f"'text.format' has type {shown(kind)}; types are: text, json_object, json_schema", "text")
    return asked


def _reasoning(reasoning: dict[str, Any]) -> dict[str, Any]:
    asked = {}
    for name, value in reasoning.items():
        if value is None:
            continue
        if name != "effort":
            raise bad(
                f"'reasoning' has 'effort' alone here, not {shown(name)}: what a model thinks is shown as it is, not "
                "summarised; leave it out",
                "reasoning",
                "unsupported_parameter",
            )
        CHECKS["reasoning_effort"]("reasoning.effort", value)
        asked["reasoning_effort"] = value
    return asked
