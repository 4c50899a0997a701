"""The official client in JavaScript: scenarios of ``js/openai.mjs``, each asked once, looked at here."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import Front
from tests.clients.node import Node
from tests.clients.scripted import Scripted
from tests.conftest import until

pytestmark = [pytest.mark.models, pytest.mark.processes]
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def seen(node: Node, real: Front, told: Front, lossy: str) -> Seen:
    before = real.cancelled()
    found = node.run("openai.mjs", real=real.url, real_key=real.key, told=told.url, told_key=told.key, lossy=lossy)
    found["cancelled"] = until(lambda: real.cancelled() - before)
    return found


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def test_a_stream_says_what_a_whole_answer_says_and_how_much_it_was(seen: Seen) -> None:
    whole, stream = seen["whole"], seen["stream"]
    assert [stream["text"]] == texts(whole) != [""]
    assert stream["finish"] == whole["choices"][0]["finish_reason"] == "length"
    assert stream["usage"] == [whole["usage"]]
    shown = whole["choices"][0]["logprobs"]["content"]
    assert len(shown) == whole["usage"]["completion_tokens"] == 20
    assert all(token["logprob"] <= 0 and len(token["top_logprobs"]) == 2 for token in shown)
    assert seen["models"] == ["assistant"]


def test_seed_n_and_stop_hold(seen: Seen) -> None:
    drawn = texts(seen["drawn"])
    assert drawn == texts(seen["drawn again"])
    assert len(set(drawn)) > 1
    assert any("a" in text for text in drawn)
    assert texts(seen["stopped"]) == [text.split("a")[0] for text in drawn]


def test_an_episode_by_header_and_feedback_by_response_id(seen: Seen, real: Front) -> None:
    calls = real.events("openai-js-visit")
    assert [event.payload.id for event in calls] == [real.call(seen[name]["id"]) for name in ("whole", "stream")]
    real.rate(seen["stream"]["id"])
    (thumb,) = real.events("openai-js-visit", "feedback")
    assert thumb.payload.feedback.call == calls[1].payload.id


@pytest.mark.parametrize(
    ("name", "kind", "status", "words"),
    [
        ("bad key", "AuthenticationError", 401, "this API key is not known here"),
        ("no such model", "NotFoundError", 404, "you have: assistant"),
        ("bad value", "BadRequestError", 400, "'temperature' must be a number"),
        ("busy", "RateLimitError", 429, "Try again after 1 s"),
        ("fails", "InternalServerError", 502, "the engine failed"),
        ("breaks", "APIError", None, "closed the connection in the middle"),
        ("response breaks", "APIError", None, "closed the connection in the middle"),
        ("helper breaks", "APIError", None, "closed the connection in the middle"),
        ("left a whole answer", "APIUserAbortError", None, "aborted"),
    ],
)
def test_errors_are_the_clients_own(seen: Seen, name: str, kind: str, status: int | None, words: str) -> None:
    error = seen[name]["error"]
    assert (error["kind"], error["status"]) == (kind, status)
    assert words in error["message"]
    assert error["retryAfter"] == ("1" if status == 429 else None)


def test_a_client_that_leaves_stops_the_engine(seen: Seen, real: Front) -> None:
    assert seen["left a stream"] is None
    until(lambda: seen["cancelled"] == 2)


def test_an_agents_loop_with_two_tools_at_once(seen: Seen) -> None:
    (call,) = seen["one tool"]["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
    assert seen["one tool"]["choices"][0]["finish_reason"] == "tool_calls"
    ran = {"looked": ["Bern", "Basel"], "text": "The results: sun in Bern; sun in Basel"}
    assert seen["tools"] == seen["tools, streamed"] == ran


def test_responses_are_the_same_calls(seen: Seen, real: Front) -> None:
    whole, stream = seen["response"], seen["response, streamed"]
    assert stream["text"] == whole["text"] == seen["stream"]["text"]
    assert stream["usage"] == whole["usage"]
    assert stream["status"] == whole["status"] == "incomplete"
    calls = real.events("openai-js-response")
    assert [event.payload.id for event in calls] == [real.call(answer["id"]) for answer in (whole, stream)]
    assert seen["response, tools"]["text"] == "The results: sun in Bern; sun in Basel"


def test_it_waits_as_long_as_it_is_told_and_that_is_one_turn(seen: Seen, told: Front, scripted: Scripted) -> None:
    assert texts(seen["busy once"]) == ["the card is on its way"]
    assert len(scripted.asks("be busy once, openai-js")) == 2
    assert len(told.events("openai-js-busy")) == 1


@pytest.mark.parametrize("name", ["lost", "lost-stream"])
def test_an_answer_that_was_lost_on_its_way_is_given_again_and_recorded_once(
    seen: Seen, told: Front, scripted: Scripted, name: str
) -> None:
    (event,) = told.events(f"openai-js-{name}")
    assert told.call(seen[name]["id"]) == event.payload.id
    assert len(scripted.asks(f"openai-js, {name}.")) == 1


@pytest.mark.vllm
def test_an_answer_held_to_a_schema(node: Node, constrained: Front) -> None:
    """Whole and streamed, of a model that would say anything."""
    seen = node.run("openai.mjs", constrained=constrained.url, constrained_key=constrained.key)
    for name in ("parsed", "parsed stream"):
        assert seen[name]["topic"] in ("card", "account")
        assert isinstance(seen[name]["urgent"], bool)
