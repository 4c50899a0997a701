"""Replies: what an answer's tokens become on the wire."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from everloop.event import Sampling

from trainer.policy.base import Policy
from trainer.rollout import request
from trainer.rollout.reply import Reply
from trainer.rollout.running import Answer

pytestmark = pytest.mark.models
ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def whole(policy: Policy, text: str, **changes: object) -> dict:
    asked = replace(request.read("chat/completions", {**ASK, **changes}, policy), tools={"f": True})
    answer = Answer(asked.prompt, Sampling(), 99, policy.stop_ids, random.Random(0), finish="stop")
    answer.ids = policy.encode(text)
    answer.logprobs = [-1.0] * len(answer.ids)
    return Reply(asked, policy).whole([answer])["choices"][0]


def test_the_bytes_of_tokens_are_those_of_the_text_also_within_a_character(policy: Policy) -> None:
    content = whole(policy, "a 🐌 ü", logprobs=True)["logprobs"]["content"]
    assert any("\ufffd" in token["token"] for token in content)
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "a 🐌 ü"


@pytest.mark.parametrize(("asked", "calls"), [({}, 2), ({"parallel_tool_calls": False}, 1)])
def test_who_asks_for_no_parallel_tool_calls_gets_the_first(policy: Policy, asked: dict, calls: int) -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 2
    assert len(whole(policy, text, **asked)["message"]["tool_calls"]) == calls
