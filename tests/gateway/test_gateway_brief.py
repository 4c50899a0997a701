"""The short way of reading an answer gives what the long way gives, whatever words are in it."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.gateway import brief
from services.gateway.answer import read_whole, show_whole
from services.gateway.sealing import Sampled, tokens
from services.gateway.upstream import _alone

WORDS = st.one_of(
    st.text(max_size=8), st.sampled_from(['"logprob":-9', "}]}", ']}]},"x":"', '"logprobs":{"content":[', "\\"])
)
NUMBERS = st.one_of(st.floats(-100, 0), st.integers(-9, 0), st.sampled_from([-1e-300, -0.0, -9999.0]))
TOOL = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def answer(tokens: list[tuple[str, float]], alternatives: bool, tools: bool) -> dict[str, Any]:
    content: list[dict[str, Any]] = [
        {"token": word, "logprob": number, "bytes": list(word.encode()), "top_logprobs": []} for word, number in tokens
    ]
    if alternatives:
        content = [{**each, "top_logprobs": [{"token": "x", "logprob": -1.0}]} for each in content]
    message = {"role": "assistant", "content": "".join(word for word, _ in tokens), "tool_calls": TOOL if tools else []}
    choice = {"index": 0, "logprobs": {"content": content}, "token_ids": list(range(len(tokens))), "message": message}
    before = dict(sorted(choice.items())) if tools else choice
    return {"choices": [before], "prompt_token_ids": [1], "usage": None}


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.tuples(WORDS, NUMBERS), max_size=6),
    alternatives=st.booleans(),
    tools=st.booleans(),
)
@example(tokens=[("}]}", -1.0), ("a", -2.0)], alternatives=False, tools=True)
def test_both_ways_read_the_same(tokens: list[tuple[str, float]], alternatives: bool, tools: bool) -> None:
    body = answer(tokens, alternatives, tools)
    for raw in (orjson.dumps(body), json.dumps(body).encode()):
        assert recorded(brief.loads(raw)) == recorded(orjson.loads(raw))


def recorded(body: dict[str, Any]) -> list[Any]:
    """What the record and the agent get of an answer."""
    read = read_whole(body)
    show_whole(body, "id", "model", False)
    return [body, *((choice.message, choice.finish_reason, tokens(read.sampled(choice))) for choice in read.choices)]


def test_the_short_way_is_taken_where_it_can_be() -> None:
    body = answer([("a", -0.5), ("b", -0.25)], False, False)
    content = brief.loads(orjson.dumps(body))["choices"][0]["logprobs"]["content"]
    assert orjson.loads(content) == body["choices"][0]["logprobs"]["content"]


def test_only_a_lone_answer_without_alternatives_is_read_so() -> None:
    assert _alone({"n": 1, "logprobs": True})
    assert not _alone({"n": 2})
    assert not _alone({"top_logprobs": 0})


@pytest.mark.parametrize("content", [b"[]", b"[{}]", b"nothing", b'[{"logprob":-1.0}]', b'[{"logprob":-1}},{"b":2}]'])
def test_numbers_that_are_not_there_are_not_made_up(content: bytes) -> None:
    found = tokens(Sampled([1], [7, 8], content, True))
    assert found is not None
    assert (found["logprobs"], found["checked"]) == (b"", False)


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'{"logprobs":{"content":[}]}', b'{"choices":[]}', b"7"])
def test_what_is_no_answer_is_read_as_it_is(raw: bytes) -> None:
    try:
        wanted = orjson.loads(raw)
    except orjson.JSONDecodeError:
        with pytest.raises(orjson.JSONDecodeError):
            brief.loads(raw)
    else:
        assert brief.loads(raw) == wanted
