"""A request, checked: what the engine will be asked, and what will be recorded of it.

Every parameter has one of three fates, and none is dropped in silence: it goes to the engine (``PASSED``), it is
the gateway's own business or has no effect on an answer (``KEPT``), or the request is refused with 400.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson
from everloop.config import PolicyConfig
from everloop.ids import OBJECT, RESPONSE
from everloop.serving.base import Route

from services.gateway.checks import Check, any_list, bad, flag, kind, number, shown, stops, table, text, tools, whole
from services.gateway.refusals import Refused

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
PARTS = frozenset({"text", "refusal", "image_url", "input_audio", "audio_url", "video_url", "file"})
DEEPEST = 64  # levels of nesting
MOST_CHOICES = 16
WHOLE = 2**63 - 1


@dataclass(slots=True)
class Ask:
    """One request to a policy.

    ``body`` is what the engine gets, but for ``model`` and the capture's own fields; ``sampling`` are the fields
    of ``everloop.event.Sampling`` as the engine will use them. ``echo`` is what an answer of ``/v1/responses`` repeats
    of its request; None: it was asked in another form.
    """

    route: Route
    model: str
    policy: str
    pin: str | None
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    body: dict[str, Any]
    sampling: dict[str, Any]
    stream: bool
    wants_usage: bool
    wants_logprobs: bool
    user: str | None
    echo: dict[str, Any] | None = None

    @property
    def prefix(self) -> str:
        """Of the answer's id."""
        return RESPONSE if self.echo is None else OBJECT


# What goes on to the engine, with the check that each value must pass.
PASSED: dict[str, Check] = {
    "temperature": number(0, 2),
    "top_p": number(1e-6, 1),
    "top_k": whole(-1, 1_000_000),
    "min_p": number(0, 1),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": number(1e-6, 10),
    "seed": whole(-WHOLE, WHOLE),
    "n": whole(1, MOST_CHOICES),
    "max_tokens": whole(1, 10_000_000),
    "max_completion_tokens": whole(1, 10_000_000),
    "min_tokens": whole(0, 10_000_000),
    "stop": stops,
    "stop_token_ids": any_list,
    "ignore_eos": flag,
    "tools": tools,
    "tool_choice": kind((str, dict), "'none', 'auto', 'required' or an object"),
    "parallel_tool_calls": flag,
    "response_format": table,
    "structured_outputs": table,
    "guided_json": kind((dict, str), "a JSON schema"),
    "guided_regex": text,
    "guided_choice": any_list,
    "guided_grammar": text,
    "logit_bias": table,
    "reasoning_effort": text,
    "verbosity": text,
    "chat_template_kwargs": table,
    "suffix": text,
}
# What the gateway uses itself, or what changes no answer.
KEPT: dict[str, Check] = {
    "model": text,
    "messages": any_list,
    "prompt": kind((str, list), "a text"),
    "stream": flag,
    "stream_options": table,
    "logprobs": kind((bool, int), "true, false or a number"),
    "top_logprobs": whole(0, 20),
    "user": text,
    "echo": flag,
    "best_of": whole(1, MOST_CHOICES),
    "store": flag,
    "metadata": table,
    "service_tier": text,
    "safety_identifier": text,
    "prompt_cache_key": text,
    "prompt_cache_retention": text,
}
CHECKS = {**PASSED, **KEPT}
# What each route does not have, of what the other has.
FOREIGN: dict[Route, frozenset[str]] = {
    "chat/completions": frozenset(("prompt", "suffix", "echo", "best_of")),
    "completions": frozenset(("messages", "tools", "tool_choice", "parallel_tool_calls", "max_completion_tokens")),
}
CONSTRAINS = frozenset(
    (
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "logit_bias",
        "min_tokens",
        "ignore_eos",
    )
)


def parse(raw: bytes) -> dict[str, Any]:
    """A body's JSON object. Raises Refused (400) where it is not one, or nests too deep."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise bad(f"the body is not JSON: {error}. Send a JSON object, in UTF-8", code="invalid_json") from None
    if not isinstance(body, dict):
        raise bad(f"the body must be a JSON object, not {shown(body)}", code="invalid_json")
    if raw.count(b"{") + raw.count(b"[") > DEEPEST and _deeper(body, DEEPEST):
        raise bad(f"the body nests deeper than {DEEPEST} levels; send a flatter one", code="invalid_json")
    return body


def read(route: Route, body: dict[str, Any], policies: dict[str, PolicyConfig]) -> Ask:
    """The request in ``body``. Raises Refused: 400 for what is not sound, 404 for a model that is not there."""
    present = {name: value for name, value in body.items() if value is not None}
    for name, value in present.items():
        check = CHECKS.get(name)
        if check is None or name in FOREIGN[route]:
            raise unknown(name, CHECKS.keys() - FOREIGN[route])
        check(name, value)
    model = present.get("model")
    if not model:
        raise bad("'model' is missing: name one of your policies (see GET /v1/models)", "model")
    policy, _, pin = model.partition("@")
    config = policies.get(policy)
    if config is None or model.endswith("@"):
        known = ", ".join(policies) or "none"
        raise Refused(404, f"there is no model {model!r}; you have: {known}", "model_not_found", "model")
    messages = _messages(present) if route == "chat/completions" else _prompt(present)
    return Ask(
        route=route,
        model=model,
        policy=policy,
        pin=pin or None,
        messages=messages,
        tools=present.get("tools", []),
        body=_for_engine(route, present, config),
        sampling=_sampling(present, config),
        stream=present.get("stream", False),
        wants_usage=bool(present.get("stream_options", {}).get("include_usage", False)),
        wants_logprobs=_wants_logprobs(present),
        user=present.get("user"),
    )


def explore(ask: Ask) -> None:
    """Sample this call from the model's own distribution: temperature 1, nothing truncated or penalised.

    Constrained requests stay as they are: their support is not known at any temperature.
    """
    if ask.sampling["constrained"]:
        return
    for name in ("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty"):
        ask.body.pop(name, None)
    ask.body["temperature"] = 1.0
    ask.sampling |= {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
    }


def unknown(name: str, known: Iterable[str]) -> Refused:
    near = difflib.get_close_matches(name[:64], sorted(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "leave it out"
    return bad(f"unknown parameter {name[:64]!r}: it would have no effect here; {hint}", name[:64], "unknown_parameter")


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = body.get("messages", [])
    if not messages:
        raise bad("'messages' is missing or empty: send at least one message", "messages")
    for at, message in enumerate(messages):
        if not isinstance(message, dict):
            raise bad(f"messages[{at}] must be an object with 'role' and 'content'", "messages")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise bad(f"messages[{at}] has role {shown(role)}; roles are: {', '.join(sorted(ROLES))}", "messages")
        if isinstance(content, list):
            _parts(at, content)
        elif not (isinstance(content, str) or (content is None and role == "assistant")):
            raise bad(f"messages[{at}].content must be a text or a list of parts, not {shown(content)}", "messages")
        _optional(at, message)
    return messages


def _optional(at: int, message: dict[str, Any]) -> None:
    for name in ("name", "tool_call_id"):
        if not isinstance(message.get(name, ""), str | None):
            raise bad(f"messages[{at}].{name} must be a text", "messages")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise bad(f"messages[{at}].tool_calls must be a list of objects", "messages")
    if message["role"] == "tool" and not message.get("tool_call_id"):
        raise bad(f"messages[{at}] is a tool's result: 'tool_call_id' must name the call it answers", "messages")


def _parts(at: int, parts: list[Any]) -> None:
    """Content parts. What is not text comes inside the request as a data: URL, so that no engine fetches anything."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise bad(f"messages[{at}].content: every part must be an object with a 'type'", "messages")
        if part["type"] not in PARTS:
            raise bad(
                f"messages[{at}].content: parts may be {', '.join(sorted(PARTS))}, not {part['type']!r}", "messages"
            )
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise bad(f"messages[{at}].content: a text part needs 'text'", "messages")
        if part["type"] == "image_url" and not isinstance(_address(part.get("image_url")), str):
            raise bad(f"messages[{at}].content: an image_url part needs 'image_url': {{'url': 'data:…'}}", "messages")
        for name, inner in part.items():
            address = _address(inner) if isinstance(inner, dict) or name.endswith("url") else None
            if isinstance(address, str) and not address.startswith("data:"):
                raise bad(
                    f"messages[{at}].content: {part['type']} must be a data: URL. The gateway fetches nothing from "
                    "the network; send the bytes themselves as data:<type>;base64,…",
                    "messages",
                )


def _address(inner: Any) -> Any:
    return inner.get("url") if isinstance(inner, dict) else inner


def _prompt(body: dict[str, Any]) -> list[dict[str, Any]]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise bad("'prompt' must be one text: send one request a prompt, and no token ids", "prompt")
    if body.get("echo"):
        raise bad("'echo' is not done here: the prompt is yours already", "echo")
    if body.get("best_of", 1) > 1:
        raise bad("'best_of' is not done here; use 'n' and choose yourself", "best_of")
    return [{"role": "user", "content": prompt}]


def _for_engine(route: Route, body: dict[str, Any], config: PolicyConfig) -> dict[str, Any]:
    asked = {name: value for name, value in body.items() if name in PASSED}
    if route == "chat/completions":
        asked["messages"] = body["messages"]
        if body.get("logprobs"):
            asked |= {"logprobs": True, "top_logprobs": body.get("top_logprobs", 0)}
    else:
        asked["prompt"] = body["prompt"] if isinstance(body["prompt"], str) else body["prompt"][0]
        if _wants_logprobs(body):
            asked["logprobs"] = body["logprobs"]
    most = asked.pop("max_completion_tokens", None)
    asked["max_tokens"] = most or asked.get("max_tokens") or config.max_tokens
    if "temperature" not in asked:
        asked["temperature"] = 1.0 if config.temperature is None else config.temperature
    return asked


def _wants_logprobs(body: dict[str, Any]) -> bool:
    """Chat says true; the older route says how many alternatives, and 0 is a wish too."""
    value = body.get("logprobs")
    return value is not None and value is not False


def _sampling(body: dict[str, Any], config: PolicyConfig) -> dict[str, Any]:
    default = 1.0 if config.temperature is None else config.temperature
    stop = body.get("stop", [])
    return {
        "temperature": float(body.get("temperature", default)),
        "top_p": float(body.get("top_p", 1.0)),
        "top_k": max(0, body.get("top_k", 0)),
        "min_p": float(body.get("min_p", 0.0)),
        "frequency_penalty": float(body.get("frequency_penalty", 0.0)),
        "presence_penalty": float(body.get("presence_penalty", 0.0)),
        "max_tokens": body.get("max_completion_tokens") or body.get("max_tokens") or config.max_tokens,
        "seed": body.get("seed"),
        "stop": [stop] if isinstance(stop, str) else stop,
        "constrained": _constrained(body),
    }


def _constrained(body: dict[str, Any]) -> bool:
    """Whether something bends the distribution in a way that the sampling fields do not say."""
    choice = body.get("tool_choice")
    return (
        any(body[name] for name in CONSTRAINS & body.keys())
        or isinstance(choice, dict)
        or choice == "required"
        or body.get("response_format", {}).get("type", "text") != "text"
        or body.get("repetition_penalty", 1) != 1
    )


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    if levels == 0:
        return True
    return any(_deeper(inner, levels - 1) for inner in (value.values() if isinstance(value, dict) else value))
