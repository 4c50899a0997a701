"""A chat answer as a Response, the object that ``/v1/responses`` gives. Pure.

Its items have ids that are made of the response's, so an answer that is told twice has the same ones.
"""

from __future__ import annotations

from typing import Any

from services.gateway.ask import Ask

INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
Item = dict[str, Any]


def from_chat(ask: Ask, body: dict[str, Any]) -> dict[str, Any]:
    """The Response that says what a chat completion says. ``body`` has the agent's id and model name already."""
    (choice,) = body["choices"]
    status = "incomplete" if choice.get("finish_reason") in INCOMPLETE else "completed"
    output = items(body["id"], choice["message"], (choice.get("logprobs") or {}).get("content"), status)
    made = response(ask, body["id"], body.get("created", 0), status, output)
    return ended(made, choice.get("finish_reason"), body.get("usage"))


def response(ask: Ask, id: str, created: int, status: str, output: list[Item]) -> dict[str, Any]:
    """A Response. What the request asked for is in it as it was used. Nothing of it can be fetched: ``store`` is false.

    ``created`` is in seconds since 1970.
    """
    echo = ask.echo or {}
    return {
        "id": id,
        "object": "response",
        "created_at": created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": echo.get("instructions"),
        "max_output_tokens": echo.get("max_output_tokens"),
        "max_tool_calls": None,
        "metadata": echo.get("metadata", {}),
        "model": ask.model,
        "output": output,
        "parallel_tool_calls": echo.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "prompt_cache_key": echo.get("prompt_cache_key"),
        "reasoning": {"effort": echo.get("reasoning", {}).get("effort"), "summary": None},
        "safety_identifier": echo.get("safety_identifier"),
        "service_tier": echo.get("service_tier", "default"),
        "store": False,
        "temperature": ask.sampling["temperature"],
        "text": {"format": {"type": "text"}, **echo.get("text", {})},
        "tool_choice": echo.get("tool_choice", "auto"),
        "tools": echo.get("tools", []),
        "top_logprobs": echo.get("top_logprobs", 0),
        "top_p": ask.sampling["top_p"],
        "truncation": "disabled",
        "usage": None,
        "user": echo.get("user"),
    }


def ended(made: dict[str, Any], finish: str | None, usage: dict[str, Any] | None) -> dict[str, Any]:
    """A Response as it is once its answer has ended."""
    reason = INCOMPLETE.get(finish or "")
    details = None if reason is None else {"reason": reason}
    return {**made, "incomplete_details": details, "usage": used(usage)}


def items(id: str, message: dict[str, Any], logprobs: list[dict[str, Any]] | None, status: str) -> list[Item]:
    """The output items of a chat message: what was thought, what was said, what is to be called."""
    found: list[Item] = []
    if thought := reasoning_of(message):
        found.append(reasoning(id, status, thought))
    calls = message.get("tool_calls") or []
    if message.get("content") or message.get("refusal") or not calls:
        parts = [refusal(message["refusal"])] if message.get("refusal") else []
        if message.get("content") or not parts:
            parts.insert(0, text(message.get("content") or "", logprobs))
        found.append(said(id, status, parts))
    for at, call in enumerate(calls):
        function = call.get("function") or {}
        found.append(called(id, at, status, call.get("id"), function.get("name", ""), function.get("arguments", "")))
    return found


def reasoning_of(said: dict[str, Any]) -> str | None:
    """What an engine shows of a model's thoughts in a message or delta, by either of the names in use."""
    return said.get("reasoning") or said.get("reasoning_content")


def reasoning(id: str, status: str, thought: str) -> Item:
    content = [{"type": "reasoning_text", "text": thought}] if thought else []
    return {"id": item_id(id, "rs"), "type": "reasoning", "status": status, "summary": [], "content": content}


def said(id: str, status: str, parts: list[dict[str, Any]]) -> Item:
    return {"id": item_id(id, "msg"), "type": "message", "status": status, "role": "assistant", "content": parts}


def called(id: str, at: int, status: str, call: str | None, name: str, arguments: str) -> Item:
    """``at`` counts the calls of one answer; ``call`` is the engine's id of it, where it gives one."""
    own = f"{item_id(id, 'fc')}_{at}"
    fields = {"call_id": call or own, "name": name, "arguments": arguments}
    return {"id": own, "type": "function_call", "status": status, **fields}


def text(words: str, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    tokens = [_token(token) for token in logprobs or ()]
    return {"type": "output_text", "text": words, "annotations": [], "logprobs": tokens}


def refusal(words: str) -> dict[str, Any]:
    return {"type": "refusal", "refusal": words}


def item_id(id: str, kind: str) -> str:
    return f"{kind}_{id.partition('_')[2]}"


def used(usage: dict[str, Any] | None) -> dict[str, Any] | None:
    """Chat's usage in the words of a Response; None: the engine did not count."""
    if usage is None:
        return None
    prompt = usage.get("prompt_tokens_details") or {}
    completion = usage.get("completion_tokens_details") or {}
    return {
        "input_tokens": usage.get("prompt_tokens", 0),
        "input_tokens_details": {"cached_tokens": prompt.get("cached_tokens") or 0, "cache_write_tokens": 0},
        "output_tokens": usage.get("completion_tokens", 0),
        "output_tokens_details": {"reasoning_tokens": completion.get("reasoning_tokens") or 0},
        "total_tokens": usage.get("total_tokens", 0),
    }


def _token(token: dict[str, Any]) -> dict[str, Any]:
    """A token's log-probability with the bytes that clients expect of it."""
    raw = token.get("bytes")
    made = {"token": token["token"], "logprob": token["logprob"]}
    made["bytes"] = list(token["token"].encode()) if raw is None else raw
    if "top_logprobs" in token:
        made["top_logprobs"] = [_token(other) for other in token["top_logprobs"] or ()]
    return made
