"""What goes to a provider and what comes back, in OpenAI's form alone. Pure.

The gateway speaks vLLM's dialect with its engine. A provider knows OpenAI's own parameters: what else changes an answer
is refused by name, what asks for nothing is left out. Its answers may lack things, have others, or be no answers:
what OpenAI's clients need is kept, mended where it can be, and the rest is refused (ServingError).
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import orjson
from everloop.errors import ServingError
from everloop.serving.base import Route

SHAPING = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "n", "stop", "logit_bias")
SENT: dict[Route, frozenset[str]] = {
    "chat/completions": frozenset(
        (
            *("messages", "max_completion_tokens", "logprobs", "top_logprobs", "tools", "tool_choice"),
            *("parallel_tool_calls", "response_format", "reasoning_effort", "verbosity", *SHAPING),
        )
    ),
    "completions": frozenset(("prompt", "max_tokens", "logprobs", "suffix", *SHAPING)),
}
OURS = frozenset(("model", "return_token_ids", "stream", "stream_options"))
MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id", "refusal")
NEUTRAL = {"top_k": -1, "repetition_penalty": 1}  # beside 0, false and what is empty
FINISHES = {"max_tokens": "length", "function_call": "tool_calls"}  # other words for it
FINISHED = frozenset(("stop", "length", "tool_calls", "content_filter"))
MOST_CHOICES = 16
MOST_CALLS = 128
KINDS: dict[Route, tuple[str, str]] = {
    "chat/completions": ("chat.completion", "chat.completion.chunk"),
    "completions": ("text_completion", "text_completion"),
}


def asked(route: Route, body: dict[str, Any], model: str) -> dict[str, Any]:
    """A request in the engine's dialect as a provider takes it. Raises ServingError (400) as :func:`unfit` says.

    Of chat the longest answer is ``max_completion_tokens``: newer models refuse the other name.
    """
    why = unfit(route, body)
    if why is not None:
        raise ServingError(why, status=400, code="unsupported_parameter")
    sent = {name: value for name, value in body.items() if name in SENT[route]} | {"model": model}
    if route == "chat/completions":
        if "max_tokens" in body:
            sent["max_completion_tokens"] = body["max_tokens"]
        sent["messages"] = [{name: one[name] for name in MESSAGE if name in one} for one in body["messages"]]
    return sent


def unfit(route: Route, body: dict[str, Any]) -> str | None:
    """Which parameter a provider would not heed, though it changes the answer; None: there is none."""
    known = SENT[route] | OURS | {"max_tokens"}
    for name, value in body.items():
        if name not in known and value and NEUTRAL.get(name) != value:
            return (
                f"'{name}' is no parameter of OpenAI's, and the provider that answers here knows no other: leave it out"
            )
    return None


def garbled(what: str) -> ServingError:
    return ServingError(f"the provider's answer is no completion: {what}", code="upstream_garbled")


def whole(route: Route, raw: bytes) -> dict[str, Any]:
    """A whole answer. Raises ServingError for what is none."""
    body = parsed(raw)
    given = body.get("choices")
    if not isinstance(given, list) or not 0 < len(given) <= MOST_CHOICES:
        raise garbled("it has no choices")
    choices = [_choice(route, _table(one, "a choice"), at) for at, one in enumerate(given)]
    return {**_head(body, KINDS[route][0]), "choices": choices, "usage": usage(body.get("usage"))}


def parsed(raw: bytes) -> dict[str, Any]:
    """The JSON object that an answer or a chunk is. Raises ServingError where it is none, or an error."""
    try:
        body = _table(orjson.loads(raw), "it")
    except orjson.JSONDecodeError:
        raise garbled("it is not JSON") from None
    if body.get("error"):
        said = body["error"].get("message") if isinstance(body["error"], dict) else body["error"]
        raise ServingError(f"the provider failed: {str(said)[:300]}", code="upstream_error")
    return body


def usage(given: Any) -> dict[str, Any] | None:
    """What was used, where it is counted as OpenAI counts; None: it is not known."""
    if not isinstance(given, dict) or not all(_is_count(given.get(n)) for n in ("prompt_tokens", "completion_tokens")):
        return None
    total = given["prompt_tokens"] + given["completion_tokens"]
    details = ("prompt_tokens_details", "completion_tokens_details")
    kept = {name: given[name] for name in details if isinstance(given.get(name), dict)}
    counts = {name: given[name] for name in ("prompt_tokens", "completion_tokens")}
    return {**counts, "total_tokens": total, **kept}


def finish(given: Any) -> str:
    """Why an answer ended, in a word that OpenAI's clients know."""
    word = FINISHES.get(str(given), str(given))
    return word if word in FINISHED else "stop"


@dataclass
class _Heard:
    """One answer of a stream so far. ``calls``: whether each tool call has its name, by index."""

    calls: list[bool] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    finished: bool = False


class Chunks:
    """A stream's chunks, one after the other, each made fit for OpenAI's clients."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._heard: dict[int, _Heard] = {}

    @property
    def finished(self) -> bool:
        """Whether every answer that began has ended."""
        return bool(self._heard) and all(one.finished for one in self._heard.values())

    def fit(self, raw: bytes) -> dict[str, Any]:
        """Raises ServingError for what is no chunk."""
        body = parsed(raw)
        given = body.get("choices") or []
        if not isinstance(given, list):
            raise garbled("a chunk's choices are no list")
        choices = [self._choice(_table(one, "a choice"), at) for at, one in enumerate(given)]
        return {**_head(body, KINDS[self._route][1]), "choices": choices, "usage": usage(body.get("usage"))}

    def _choice(self, given: dict[str, Any], at: int) -> dict[str, Any]:
        index = _index(given, at)
        first = index not in self._heard
        heard = self._heard.setdefault(index, _Heard())
        shown: dict[str, Any] = {"index": index, "logprobs": _logprobs(given), "finish_reason": None}
        if self._route == "completions":
            shown["text"] = _text(given.get("text"), "text") or ""
        else:
            delta = _table(given.get("delta") or {}, "a delta")
            shown["delta"] = ({"role": "assistant"} if first else {}) | _words(delta)
            parts = _list(delta.get("tool_calls"), "tool_calls")
            if parts:
                shown["delta"]["tool_calls"] = [_part(heard, _table(part, "a tool call")) for part in parts]
        if given.get("finish_reason"):
            heard.finished = True
            shown["finish_reason"] = _ended(given["finish_reason"], bool(heard.calls))
        return shown


def _part(heard: _Heard, given: dict[str, Any]) -> dict[str, Any]:
    """One delta of a tool call: with an index always, with id and name where the call begins."""
    function = _table(given.get("function") or {}, "a tool call's function")
    name, arguments = _text(function.get("name"), "name"), _text(function.get("arguments"), "arguments")
    id = _text(given.get("id"), "id")
    index = given.get("index")
    if not isinstance(index, int) or isinstance(index, bool):
        begins = id not in heard.ids if id else bool(name) or not heard.calls
        index = len(heard.calls) if begins else heard.ids[id] if id else len(heard.calls) - 1
    if not 0 <= index < MOST_CALLS:
        raise garbled(f"a tool call has index {index}")
    part: dict[str, Any] = {"index": index, "function": {"arguments": arguments or ""}}
    if index >= len(heard.calls):
        heard.calls.extend([False] * (index + 1 - len(heard.calls)))
        id = id or _new_id()
        part |= {"id": id, "type": "function"}
    if id:
        heard.ids.setdefault(id, index)
    if name and not heard.calls[index]:
        heard.calls[index] = True
        part["function"]["name"] = name
    return part


def _choice(route: Route, given: dict[str, Any], at: int) -> dict[str, Any]:
    shown: dict[str, Any] = {"index": _index(given, at), "logprobs": _logprobs(given)}
    calls: list[dict[str, Any]] = []
    if route == "completions":
        shown["text"] = _text(given.get("text"), "text") or ""
    else:
        message = _table(given.get("message"), "a message")
        calls = [_call(_table(one, "a tool call")) for one in _list(message.get("tool_calls"), "tool_calls")]
        shown["message"] = {"role": "assistant", "content": None, **_words(message)}
        if calls:
            shown["message"]["tool_calls"] = calls
    return shown | {"finish_reason": _ended(given.get("finish_reason"), bool(calls))}


def _call(given: dict[str, Any]) -> dict[str, Any]:
    function = _table(given.get("function"), "a tool call's function")
    name, arguments = _text(function.get("name"), "name"), function.get("arguments")
    if not name:
        raise garbled("a tool call names no function")
    if isinstance(arguments, dict):
        arguments = orjson.dumps(arguments).decode()
    asked = {"name": name, "arguments": _text(arguments, "arguments") or ""}
    return {"id": _text(given.get("id"), "id") or _new_id(), "type": "function", "function": asked}


def _words(given: dict[str, Any]) -> dict[str, Any]:
    said = {name: _text(given.get(name), name) for name in ("content", "refusal", "reasoning_content")}
    return {name: text for name, text in said.items() if text is not None}


def _head(body: dict[str, Any], kind: str) -> dict[str, Any]:
    created = body.get("created")
    return {"object": kind, "created": int(created) if _is_count(created) else int(time.time())}


def _ended(given: Any, called: bool) -> str:
    word = finish(given)
    return "stop" if word == "tool_calls" and not called else word


def _index(given: dict[str, Any], at: int) -> int:
    index = given.get("index", at)
    if not _is_count(index) or index >= MOST_CHOICES:
        raise garbled("a choice's index is no small number")
    return int(index)


def _logprobs(given: dict[str, Any]) -> dict[str, Any] | None:
    found = given.get("logprobs")
    return found if isinstance(found, dict) else None


def _table(given: Any, what: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise garbled(f"{what} is no object")
    return given


def _list(given: Any, what: str) -> list[Any]:
    if not isinstance(given or [], list):
        raise garbled(f"{what} is no list")
    return given or []


def _text(given: Any, what: str) -> str | None:
    if not isinstance(given, str | None):
        raise garbled(f"{what} is no text")
    return given


def _is_count(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given >= 0


def _new_id() -> str:
    return "call_" + secrets.token_hex(12)
