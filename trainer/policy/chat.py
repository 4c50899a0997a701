"""Conversations as a model's own template writes them. What the template cannot honour is refused, never dropped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from everloop.errors import ServingError
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from trainer.policy.tools import as_plain


def refused(message: str, code: str = "unsupported_parameter") -> ServingError:
    """The error for a request that the engine understands and will not serve."""
    return ServingError(message, status=400, code=code)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> str:
    """The prompt's text, up to where the assistant's answer begins. Raises ServingError 400.

    Tools go to the template where it knows of them (it may refuse), else into the system message.
    """
    if not messages:
        raise refused("messages is empty: send at least one message", "invalid_request_error")
    if not tokenizer.chat_template:
        raise refused("this model has no chat template: use the route completions")
    plain = [_plain(tokenizer, message) for message in messages]
    native = knows_tools(tokenizer)
    if not native:
        plain = as_plain(plain, tools)
    given = list(tools) if native and tools else None
    try:
        return str(tokenizer.apply_chat_template(plain, tools=given, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError) as error:
        raise refused(f"this model's chat template refused the request: {error}") from None


def knows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model's own template says something about tools."""
    return "tools" in str(tokenizer.chat_template)


def end_id(tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]) -> int:
    """The token that ends an assistant's turn: the one that the template itself writes after an answer."""
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(stop_ids)
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = tokenizer(tokenizer.apply_chat_template(turn, tokenize=False), add_special_tokens=False)["input_ids"]
    return next((i for i in reversed(ids) if i in stop_ids), min(stop_ids))


def _plain(tokenizer: PreTrainedTokenizerBase, message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant", "tool"):
        raise refused(f"role {role!r}: a message is of system, developer, user, assistant or tool")
    plain = {**message, "role": role, "content": _text(tokenizer, message.get("content"))}
    if message.get("tool_calls") or role == "tool":
        _text(tokenizer, json.dumps(message.get("tool_calls") or [], ensure_ascii=False))
    return plain


def _text(tokenizer: PreTrainedTokenizerBase, content: Any) -> str:
    """The words of a content, which may be text or parts. Control tokens in it are refused: they forge turns."""
    if isinstance(content, list):
        other = next((p.get("type") for p in content if p.get("type") not in ("text", "input_text")), None)
        if other is not None:
            raise refused(f"content part {other!r}: this model reads text alone")
        content = "".join(str(part.get("text", "")) for part in content)
    text = "" if content is None else str(content)
    found = next((t for t in tokenizer.all_special_tokens if t in text), None)
    if found is not None:
        raise refused(f"a message holds the control token {found!r}: take it out", "invalid_request_error")
    return text
