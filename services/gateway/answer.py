"""The engine's answer: what is kept for the record, and what the agent gets to see of it.

The engine always gives token ids and log-probabilities (vLLM's dialect). They are taken out of what goes to the
agent, but for log-probabilities that it asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from everloop.serving.base import Route

from services.gateway.sealing import Sampled

# vLLM's own additions to an answer: the engine's business, not the agent's.
ENGINE_ONLY = ("prompt_token_ids", "prompt_logprobs", "kv_transfer_params")


@dataclass(slots=True)
class Choice:
    """One of the n answers to a request, whole or as far as it came. Ids and ``logprobs``: see :class:`Sampled`."""

    index: int
    message: dict[str, Any]
    finish_reason: str | None = None
    token_ids: list[int] | bytes = field(default_factory=list)
    logprobs: list[float] | bytes = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """What the engine said. ``prompt`` are the prompt's token ids; empty where the engine gave none."""

    choices: list[Choice]
    prompt: list[int] | bytes = field(default_factory=list)
    usage: dict[str, Any] | None = None
    created: int = 0

    @property
    def counted(self) -> tuple[int, int]:
        """How many tokens there are: (of the prompt, of all choices)."""
        return _count(self.prompt), sum([_count(choice.token_ids) for choice in self.choices])

    def sampled(self, choice: Choice) -> Sampled:
        """What was said of a choice's tokens, and whether the engine counts as many as there are."""
        usage = self.usage
        agreed = usage is None or (usage.get("prompt_tokens"), usage.get("completion_tokens")) == self.counted
        return Sampled(self.prompt, choice.token_ids, choice.logprobs, agreed, choice.raw_logprobs)


def capture_fields(route: Route, body: dict[str, Any]) -> None:
    """Ask the engine for what the record needs: ids, and the log-probability of each sampled token."""
    body["return_token_ids"] = True
    if route == "chat/completions":
        body.setdefault("logprobs", True)
    else:
        body.setdefault("logprobs", 0)


def read_whole(body: dict[str, Any]) -> Answer:
    """The record of a whole answer in either route's form."""
    choices = []
    prompt = body.get("prompt_token_ids") or []
    for at, given in enumerate(body["choices"]):
        message = given.get("message") or {"role": "assistant", "content": given.get("text", "")}
        prompt = prompt or given.get("prompt_token_ids") or []
        choice = Choice(
            index=given.get("index", at),
            message=message,
            finish_reason=given.get("finish_reason"),
            token_ids=given.get("token_ids") or [],
            logprobs=_logprobs(given.get("logprobs")),
            raw_logprobs=given.get("raw_logprobs") or [],
        )
        _called(choice, given)
        choices.append(choice)
    return Answer(choices, prompt, body.get("usage"), body.get("created", 0))


def show_whole(body: dict[str, Any], id: str, model: str, wants_logprobs: bool) -> None:
    """Make the engine's answer the agent's: our id and model name, nothing that was not asked for."""
    body["id"] = id
    body["model"] = model
    for name in ENGINE_ONLY:
        body.pop(name, None)
    for choice in body["choices"]:
        _strip(choice, wants_logprobs)


class Listener:
    """Folds the chunks of a stream into an answer, and makes each fit for the agent.

    ``show`` returns what of a chunk may be sent: the chunk itself, changed in place, or None. Usage is kept back;
    :meth:`usage_chunk` gives it where it was asked for.
    """

    def __init__(self, id: str, model: str, wants_logprobs: bool) -> None:
        self._id = id
        self._model = model
        self._wants_logprobs = wants_logprobs
        self._object = "chat.completion.chunk"
        self.answer = Answer([])
        self._choices: dict[int, Choice] = {}

    def show(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        answer = self.answer
        answer.usage = chunk.pop("usage", None) or answer.usage
        answer.created = chunk.get("created", answer.created)
        answer.prompt = chunk.pop("prompt_token_ids", None) or answer.prompt
        self._object = chunk.get("object", self._object)
        chunk["id"] = self._id
        chunk["model"] = self._model
        for given in chunk.get("choices", ()):
            self._fold(given)
            _strip(given, self._wants_logprobs)
        return chunk if chunk.get("choices") else None

    def usage_chunk(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self._object,
            "created": self.answer.created,
            "model": self._model,
            "choices": [],
            "usage": self.answer.usage,
        }

    @property
    def finished(self) -> bool:
        """Whether every choice that began has ended."""
        return bool(self._choices) and all(choice.finish_reason for choice in self._choices.values())

    def _fold(self, given: dict[str, Any]) -> None:
        index = given.get("index", 0)
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = Choice(index, {"role": "assistant", "content": None})
            self.answer.choices.append(choice)
        elif "delta" in given:  # engines say the role again and again, and clients join what they hear twice
            given["delta"].pop("role", None)
        self.answer.prompt = self.answer.prompt or given.get("prompt_token_ids") or []
        choice.token_ids += given.get("token_ids") or []
        choice.logprobs += _logprobs(given.get("logprobs"))
        choice.raw_logprobs.extend(given.get("raw_logprobs") or ())
        _grow(choice.message, given["delta"] if "delta" in given else {"content": given.get("text")})
        if given.get("finish_reason"):
            choice.finish_reason = given["finish_reason"]
            _called(choice, given)


def _grow(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Join a delta to the message so far. Tool calls without an index get the one they stand at: clients need it."""
    for name, value in delta.items():
        if name == "tool_calls":
            for at, part in enumerate(value or ()):
                _grow_call(message.setdefault("tool_calls", []), part.setdefault("index", at), part)
        elif name != "role" and isinstance(value, str):
            message[name] = (message.get(name) or "") + value


def _grow_call(calls: list[dict[str, Any]], index: int, part: dict[str, Any]) -> None:
    while len(calls) <= min(index, 127):
        calls.append({"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
    call = calls[min(index, 127)]
    call["id"] = part.get("id") or call["id"]
    function = part.get("function") or {}
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


def _called(choice: Choice, given: dict[str, Any]) -> None:
    """An answer that calls tools ends because of them: clients wait for just this word."""
    if choice.message.get("tool_calls") and choice.finish_reason == "stop":
        choice.finish_reason = given["finish_reason"] = "tool_calls"


def _count(ids: list[int] | bytes) -> int:
    return ids.count(b",") + 1 if isinstance(ids, bytes) else len(ids)


def _logprobs(given: dict[str, Any] | None) -> list[float] | bytes:
    """The log-probabilities of the sampled tokens, from either route's form; JSON that was left so stays so."""
    if not given:
        return []
    content = given.get("content")
    if isinstance(content, bytes):
        return content
    if content is not None:
        return [token["logprob"] for token in content]
    return given.get("token_logprobs") or []


def _strip(given: dict[str, Any], wants_logprobs: bool) -> None:
    given.pop("token_ids", None)
    given.pop("prompt_token_ids", None)
    given.pop("raw_logprobs", None)
    if not wants_logprobs:
        given["logprobs"] = None
