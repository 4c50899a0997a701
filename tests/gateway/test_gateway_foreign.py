"""What a provider is sent, and what is kept, mended or refused of what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from everloop.errors import ServingError

from services.gateway import foreign

CHAT = "chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def test_what_is_sent_is_openais_alone() -> None:
    spoken = {"role": "assistant", "content": "well", "reasoning_content": "hm", "refusal": None}
    body = {
        "model": "ours",
        "messages": [*MESSAGES, spoken],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_k": -1,
        "min_p": 0,
        "repetition_penalty": 1.0,
        "chat_template_kwargs": {},
        "return_token_ids": True,
    }
    assert foreign.asked(CHAT, body, "theirs") == {
        "model": "theirs",
        "messages": [*MESSAGES, {"role": "assistant", "content": "well", "refusal": None}],
        "max_completion_tokens": 9,
        "temperature": 0.5,
    }
    older = foreign.asked("completions", {"prompt": "hi", "max_tokens": 9, "logprobs": 0}, "theirs")
    assert older == {"model": "theirs", "prompt": "hi", "max_tokens": 9, "logprobs": 0}


@pytest.mark.parametrize(
    "more",
    [
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.2},
        {"structured_outputs": {"regex": "a"}},
        {"guided_json": {"type": "object"}},
        {"chat_template_kwargs": {"thinking": True}},
        {"min_tokens": 3},
        {"ignore_eos": True},
        {"stop_token_ids": [2]},
        {"suffix": "x"},
    ],
)
def test_what_would_change_the_answer_and_is_not_heeded_is_refused_by_name(more: dict[str, Any]) -> None:
    with pytest.raises(ServingError, match=f"'{next(iter(more))}'") as refused:
        foreign.asked(CHAT, {"messages": MESSAGES, **more}, "theirs")
    assert refused.value.status == 400


def whole(choice: dict[str, Any], **more: Any) -> dict[str, Any]:
    return foreign.whole(CHAT, json.dumps({"choices": [choice], **more}).encode())


def test_a_bare_answer_becomes_a_whole_one() -> None:
    answer = whole({"message": {"content": "hello", "annotations": []}, "token_ids": [1]}, vendor={"x": 1})
    assert answer.pop("created") > 0
    message = {"role": "assistant", "content": "hello"}
    assert answer == {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": None,
    }


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        *(("stop", "stop"), ("length", "length"), ("content_filter", "content_filter"), ("max_tokens", "length")),
        *(("function_call", "stop"), ("eos", "stop"), (None, "stop")),
    ],
)
def test_reasons_to_end_are_those_that_clients_know(given: str | None, shown: str) -> None:
    assert whole({"message": {"content": "x"}, "finish_reason": given})["choices"][0]["finish_reason"] == shown


def test_tool_calls_get_what_they_lack() -> None:
    calls = [{"function": {"name": "find", "arguments": {"id": 7}}}, {"id": "c2", "function": {"name": "go"}}]
    (choice,) = whole({"message": {"content": None, "tool_calls": calls}, "finish_reason": "function_call"})["choices"]
    first, second = choice["message"]["tool_calls"]
    assert first.pop("id").startswith("call_")
    assert first == {"type": "function", "function": {"name": "find", "arguments": '{"id":7}'}}
    assert second == {"id": "c2", "type": "function", "function": {"name": "go", "arguments": ""}}
    assert choice["finish_reason"] == "tool_calls"


def test_usage_is_kept_where_it_is_counted() -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 1}}
    counted = {"prompt_tokens": 3, "completion_tokens": 2, **details}
    assert foreign.usage({**counted, "cost": 0.1}) == {**counted, "total_tokens": 5}
    for garbage in (None, {}, {"prompt_tokens": "3", "completion_tokens": 2}, {"prompt_tokens": -1}, [1]):
        assert foreign.usage(garbage) is None


@pytest.mark.parametrize(
    "raw",
    [
        b"<html>",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [1]}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": "hello"}]}',
        b'{"choices": [{"message": {"content": ["hello"]}}]}',
        b'{"choices": [{"index": -1, "message": {"content": "x"}}]}',
        b'{"choices": [{"message": {"tool_calls": {}, "content": null}}]}'.replace(b"{},", b'{"a": 1},'),
        b'{"choices": [{"message": {"tool_calls": [{"function": {"arguments": ""}}]}}]}',
        json.dumps({"choices": [{"message": {"content": "x"}}] * 17}).encode(),
    ],
)
def test_what_is_no_answer_is_refused(raw: bytes) -> None:
    with pytest.raises(ServingError) as refused:
        foreign.whole(CHAT, raw)
    assert (refused.value.status, refused.value.code) == (502, "upstream_garbled")


def test_an_error_under_200_is_an_error() -> None:
    with pytest.raises(ServingError, match="out of credit"):
        foreign.whole(CHAT, b'{"error": {"message": "out of credit"}}')


def deltas(*choices: dict[str, Any]) -> list[dict[str, Any]]:
    chunks = foreign.Chunks(CHAT)
    return [chunks.fit(json.dumps({"choices": [choice]}).encode())["choices"][0] for choice in choices]


def called(**part: Any) -> dict[str, Any]:
    return {"delta": {"tool_calls": [part]}}


def test_deltas_of_tool_calls_get_the_index_that_they_belong_to() -> None:
    shown = deltas(
        called(id="a", function={"name": "find", "arguments": '{"x"'}),
        called(function={"arguments": ":1}"}),
        called(id="b", function={"name": "go", "arguments": ""}),
        called(id="a", function={"name": "find", "arguments": " "}),
        called(function={"name": "third", "arguments": "{}"}),
        {"delta": {}, "finish_reason": "function_call"},
    )
    parts = [choice["delta"]["tool_calls"][0] for choice in shown[:-1]]
    assert [part["index"] for part in parts] == [0, 0, 1, 0, 2]
    assert [part["function"].get("name") for part in parts] == ["find", None, "go", None, "third"]
    assert [part.get("id", "")[:5] for part in parts] == ["a", "", "b", "", "call_"]
    assert [choice["delta"].get("role") for choice in shown] == ["assistant", *[None] * 5]
    assert shown[-1]["finish_reason"] == "tool_calls"


def test_a_stream_has_ended_where_each_of_its_answers_has() -> None:
    chunks = foreign.Chunks(CHAT)
    assert not chunks.finished
    ends = [(0, "x", None), (1, "y", "stop"), (0, "", "length")]
    for index, text, ended in ends:
        assert not chunks.finished
        choice = {"index": index, "delta": {"content": text}, "finish_reason": ended}
        chunks.fit(json.dumps({"choices": [choice]}).encode())
    assert chunks.finished


@pytest.mark.parametrize(
    "choice", [{"delta": "x"}, {"delta": {"content": 5}}, {"index": 99, "delta": {}}, called(index=500), called(id=5)]
)
def test_a_chunk_that_is_none_is_refused(choice: dict[str, Any]) -> None:
    with pytest.raises(ServingError, match="no completion"):
        deltas(choice)
