"""A request in OpenAI's form, read into what the engine does; whatever it does not do is refused by name.

Every key has one of three fates: it is done (``DONE``), it changes no answer (``WITHOUT_EFFECT``), or it is refused
with 400 unless its value asks for nothing (``NEUTRAL``).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from everloop.errors import ServingError
from everloop.event import Sampling
from everloop.serving.base import Route

from trainer.policy.base import Policy
from trainer.policy.chat import refused
from trainer.policy.strict import problem
from trainer.policy.tools import offered
from trainer.rollout.running import Answer

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_ALTERNATIVES = 20
DEFAULT_TOKENS = 256  # of an answer, where the request says none
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "seed", "stop")
LENGTH = ("n", "max_tokens", "max_completion_tokens")
SHOWN = ("stream", "stream_options", "logprobs", "top_logprobs", "return_token_ids")
DONE = frozenset(
    ("model", "messages", "prompt", "tools", "tool_choice", "parallel_tool_calls", *SAMPLING, *LENGTH, *SHOWN)
)
ACCOUNTING = ("user", "store", "metadata", "service_tier", "safety_identifier", "request_id")
WITHOUT_EFFECT = frozenset(("prompt_cache_key", "prompt_cache_retention", *ACCOUNTING))
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1, 1.0),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "echo": (False,),
    "best_of": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "stop_token_ids": ([],),
    "chat_template_kwargs": ({},),
}


@dataclass(frozen=True)
class Request:
    """What to sample, ``n`` times, and how to answer. ``alternatives`` is how many likeliest tokens to show.

    ``tools``: those on offer, each with the schema that its calls fit (:func:`trainer.policy.tools.offered`).
    ``most_calls``: tool calls of an answer that are passed on; None: all.
    """

    route: Route
    model: str
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    n: int
    logprobs: bool
    alternatives: int
    token_ids: bool
    tools: dict[str, Any]
    usage_chunk: bool
    most_calls: int | None

    def answers(self, policy: Policy) -> list[Answer]:
        """The answers in the making: each with its own chance, the same for the same seed."""
        seed = self.sampling.seed
        chances = [random.Random(None if seed is None else f"{seed}/{i}") for i in range(self.n)]
        return [
            Answer(self.prompt, self.sampling, self.max_tokens, policy.stop_ids, chance, self.alternatives)
            for chance in chances
        ]


def model_of(body: dict[str, Any]) -> str:
    """The model that a request names. Raises ServingError 400."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise refused("'model' is missing: name a base model or a loaded adapter", "invalid_value")
    return model


def read(route: Route, body: dict[str, Any], policy: Policy) -> Request:
    """Raises ServingError 400: a key that is not done here, a value out of range, a prompt that is too long."""
    body = {name: value for name, value in body.items() if value is not None}
    _check_keys(body)
    tools = _tools(body)
    prompt = _prompt(route, body, policy, tools)
    room = policy.context - len(prompt)
    if room < 1:
        raise ServingError(
            f"the prompt has {len(prompt)} tokens; this model's context length is {policy.context}, answer included",
            status=400,
            code="context_length_exceeded",
        )
    sampling = _sampling(body)
    shown = body.get("logprobs", False)
    alternatives = _whole(body, "top_logprobs", 0, 0, MOST_ALTERNATIVES)
    if route == "completions" and shown is not False:
        alternatives = _whole(body, "logprobs", 0, 0, MOST_ALTERNATIVES)
    return Request(
        route=route,
        model=model_of(body),
        prompt=tuple(prompt),
        sampling=sampling,
        max_tokens=min(room, sampling.max_tokens or DEFAULT_TOKENS),
        n=_whole(body, "n", 1, 1, MOST_CHOICES),
        logprobs=shown is not False,
        alternatives=alternatives if shown is not False else 0,
        token_ids=bool(body.get("return_token_ids")),
        tools=offered(tools),
        usage_chunk=bool(body.get("stream_options", {}).get("include_usage")),
        most_calls=1 if body.get("parallel_tool_calls") is False else None,
    )


def _check_keys(body: dict[str, Any]) -> None:
    for name, value in body.items():
        if name in DONE or name in WITHOUT_EFFECT or value in NEUTRAL.get(name, ()):
            continue
        raise refused(f"{name[:64]!r} is not done by this engine: leave it out")


def _tools(body: dict[str, Any]) -> list[dict[str, Any]]:
    choice = body.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise refused(f"'tool_choice' can be 'auto' or 'none' here, not {choice!r}: answers are not constrained")
    tools = body.get("tools", [])
    whole = isinstance(tools, list) and all(
        isinstance(tool, dict)
        and isinstance(tool.get("function"), dict)
        and isinstance(tool["function"].get("name"), str)
        for tool in tools
    )
    if not whole:
        raise refused("'tools' must be a list of {'type': 'function', 'function': {'name': …}}", "invalid_value")
    for tool in tools:
        _check_strict(tool["function"])
    return [] if choice == "none" else tools


def _check_strict(function: dict[str, Any]) -> None:
    why = problem(function.get("parameters") or {}) if function.get("strict") else None
    if why is not None:
        name = function["name"][:64]
        raise refused(f"tool {name!r} is 'strict', and its schema cannot be held here: {why}. Leave it or 'strict' out")


def _prompt(route: Route, body: dict[str, Any], policy: Policy, tools: list[dict[str, Any]]) -> list[int]:
    if route == "chat/completions":
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise refused("'messages' must be a list of objects with 'role' and 'content'", "invalid_value")
        return policy.encode_chat(messages, tools)
    if tools:
        raise refused("'tools' need the route chat/completions")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
        if any(not 0 <= one < policy.vocabulary for one in prompt):
            raise refused(f"'prompt' holds a token id outside 0 to {policy.vocabulary - 1}", "invalid_value")
        return prompt
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise refused("'prompt' must be one text, or a list of token ids", "invalid_value")
    return policy.encode(prompt)


def _sampling(body: dict[str, Any]) -> Sampling:
    most = body.get("max_completion_tokens", body.get("max_tokens"))
    return Sampling(
        temperature=_number(body, "temperature", 1.0, 0, 2),
        top_p=_number(body, "top_p", 1.0, 1e-6, 1),
        top_k=max(0, _whole(body, "top_k", 0, -1, 1_000_000)),
        min_p=_number(body, "min_p", 0.0, 0, 1),
        frequency_penalty=_number(body, "frequency_penalty", 0.0, -2, 2),
        presence_penalty=_number(body, "presence_penalty", 0.0, -2, 2),
        max_tokens=None if most is None else _whole({"max_tokens": most}, "max_tokens", 1, 1, 10**7),
        seed=_whole(body, "seed", 0, -(2**63), 2**63 - 1) if "seed" in body else None,
        stop=_stops(body),
    )


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise refused(f"'stop' must be a text or at most {MOST_STOPS} texts, none of them empty", "invalid_value")
    return tuple(stops)


def _number(body: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        shown = "a number that is not finite" if isinstance(value, float) and not math.isfinite(value) else repr(value)
        raise refused(f"{name!r} must be a number from {low:g} to {high:g}, not {shown[:60]}", "invalid_value")
    return float(value)


def _whole(body: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise refused(f"{name!r} must be a whole number from {low} to {high}, not {str(value)[:60]}", "invalid_value")
    return value
