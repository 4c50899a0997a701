"""Requests: what is not done is refused by its name, what is done is read exactly."""

from __future__ import annotations

from typing import Any

import pytest
from everloop.errors import ServingError

from trainer.policy.base import Policy
from trainer.rollout import request

pytestmark = pytest.mark.models
ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "find"}}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"temprature": 1}, "temprature"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"name": "x"}]}, "tools"),
        ({"tools": [TOOL]}, "tools"),  # this model's template has none
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": "a"}, "seed"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"messages": "hi"}, "messages"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
            "strict",
        ),
        ({"messages": ["hi"]}, "messages"),
    ],
)
def test_what_is_not_done_is_refused_by_name(policy: Policy, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ServingError) as refused:
        request.read("chat/completions", {**ASK, **changes}, policy)
    assert refused.value.status == 400
    assert word in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True},
        {"repetition_penalty": 1.0, "logit_bias": {}, "response_format": {"type": "text"}, "min_tokens": 0},
        {"temperature": None, "tools": None, "logit_bias": None},
        {"tools": [TOOL], "tool_choice": "none"},
    ],
)
def test_what_asks_for_nothing_changes_nothing(policy: Policy, changes: dict[str, Any]) -> None:
    plain = request.read("chat/completions", ASK, policy)
    assert request.read("chat/completions", {**ASK, **changes}, policy) == plain


def test_values_are_read_as_they_are(policy: Policy) -> None:
    body = {**ASK, "temperature": 0, "top_k": -1, "stop": "x", "seed": 5, "max_completion_tokens": 7, "max_tokens": 9}
    read = request.read("chat/completions", body, policy)
    assert (read.sampling.temperature, read.sampling.top_k, read.sampling.stop, read.sampling.seed) == (0, 0, ("x",), 5)
    assert read.max_tokens == 7


def test_an_answer_never_leaves_the_context(policy: Policy) -> None:
    words = {"role": "user", "content": "x" + " y" * 100}
    prompt = policy.encode_chat([words])
    read = request.read("chat/completions", {**ASK, "messages": [words], "max_tokens": 10_000}, policy)
    assert read.max_tokens == policy.context - len(prompt)
    with pytest.raises(ServingError) as refused:
        request.read("chat/completions", {**ASK, "messages": [{"role": "user", "content": "q " * 400}]}, policy)
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")


def test_bare_prompts_are_text_or_ids(policy: Policy) -> None:
    assert list(request.read("completions", {"model": "m", "prompt": "hi"}, policy).prompt) == policy.encode("hi")
    assert request.read("completions", {"model": "m", "prompt": [5, 6]}, policy).prompt == (5, 6)
    for prompt in ("", ["a", "b"], [policy.vocabulary], 3):
        with pytest.raises(ServingError):
            request.read("completions", {"model": "m", "prompt": prompt}, policy)
