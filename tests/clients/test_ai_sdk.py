"""Vercel's AI SDK, by its provider for OpenAI (on chat, and on responses) and by the one for what is compatible:
scenarios of ``js/ai_sdk.mjs``, each asked once, looked at here."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import Front
from tests.clients.node import Node
from tests.clients.scripted import Scripted
from tests.conftest import until

pytestmark = [pytest.mark.models, pytest.mark.processes]
Seen = dict[str, Any]


@pytest.fixture(scope="module", params=["openai", "responses", "compatible"])
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def seen(provider: str, node: Node, real: Front, told: Front, lossy: str) -> Seen:
    before = real.cancelled()
    urls = {"real": real.url, "real_key": real.key, "told": told.url, "told_key": told.key, "lossy": lossy}
    found = node.run("ai_sdk.mjs", provider=provider, **urls)
    until(lambda: real.cancelled() == before + 1)
    return found


def test_a_stream_says_what_a_whole_answer_says_and_how_much_it_was(seen: Seen) -> None:
    whole, stream = seen["whole"], seen["stream"]
    assert stream["text"] == whole["text"] != ""
    assert stream["parts"] > 1
    assert stream["finish"] == whole["finish"] == "length"
    assert stream["usage"] == whole["usage"] == {"input": whole["usage"]["input"], "output": 20}
    assert stream["warnings"] == whole["warnings"] == []
    assert seen["system"]["usage"]["input"] > whole["usage"]["input"] > 0


def test_seed_and_stop_hold(seen: Seen, provider: str) -> None:
    drawn = seen["drawn"]["text"]
    if provider == "responses":
        assert set(seen["stopped"]["warnings"]) == {"seed", "stopSequences"}, "it says that it leaves them out"
        return
    assert drawn == seen["drawn again"]["text"] != seen["whole"]["text"]
    assert seen["stopped"]["text"] == drawn.split("a")[0]


def test_log_probabilities_come_where_the_provider_knows_them(seen: Seen, provider: str) -> None:
    if provider != "compatible":
        assert len(seen["logprobs"]) == 20
        assert all(token["logprob"] <= 0 for token in seen["logprobs"])
    else:
        assert "logprobs" not in seen


def test_an_episode_by_header_and_feedback_by_response_id(seen: Seen, provider: str, real: Front) -> None:
    calls = real.events(f"{provider}-visit")
    assert [event.payload.id for event in calls] == [real.call(seen[name]["id"]) for name in ("whole", "stream")]
    real.rate(seen["stream"]["id"])
    (thumb,) = real.events(f"{provider}-visit", "feedback")
    assert thumb.payload.feedback.call == calls[1].payload.id


@pytest.mark.parametrize(
    ("name", "kind", "status", "words"),
    [
        ("bad key", "APICallError", 401, "this API key is not known here"),
        ("no such model", "APICallError", 404, "you have: assistant"),
        ("bad value", "APICallError", 400, "'temperature' must be a number"),
        ("busy", "APICallError", 429, "Try again after 1 s"),
        ("fails", "APICallError", 502, "the engine failed"),
        ("breaks", "StreamProviderError", None, "closed the connection in the middle"),
    ],
)
def test_errors_are_the_clients_own(seen: Seen, name: str, kind: str, status: int | None, words: str) -> None:
    error = seen[name]["error"]
    assert error["kind"] == kind
    assert error["status"] == status or status is None
    assert words in error["message"]
    assert error["retryAfter"] == ("1" if status == 429 else None)


def test_a_client_that_leaves_stops_the_engine(seen: Seen) -> None:
    """``seen`` waited until the engine had counted it."""
    assert 0 < seen["left a stream"] < 240


def test_an_agents_loop_with_two_tools_at_once(seen: Seen) -> None:
    for name in ("tools", "tools, streamed"):
        assert seen[name]["looked"] == ["Bern", "Basel"]
        assert seen[name]["text"] == "The results: sun in Bern; sun in Basel"
        assert seen[name]["finish"] == "stop"


def test_it_waits_as_long_as_it_is_told_and_that_is_one_turn(
    seen: Seen, provider: str, told: Front, scripted: Scripted
) -> None:
    assert seen["busy once"]["text"] == "the card is on its way"
    assert len(scripted.asks(f"be busy once, {provider}")) == 2
    assert len(told.events(f"{provider}-busy")) == 1


def test_a_conversation_goes_on(seen: Seen, provider: str) -> None:
    """On responses this client sends no words that it believes to be kept, unless it is told that they are not."""
    assert seen["next turn"]["text"] == "the card is on its way"
    if provider == "responses":
        assert "'store': false" in seen["next turn, stored"]["error"]["message"]
    else:
        assert seen["next turn, stored"]["text"] == seen["next turn"]["text"]


@pytest.mark.parametrize("name", ["lost", "lost-stream"])
def test_with_a_key_of_its_own_a_lost_answer_is_given_again_and_recorded_once(
    seen: Seen, provider: str, told: Front, scripted: Scripted, name: str
) -> None:
    """This client says nothing of its retries: the key in its headers does."""
    (event,) = told.events(f"{provider}-{name}")
    assert told.call(seen[name]["id"]) == event.payload.id
    assert len(scripted.asks(f"{provider}, {name}.")) == 1


@pytest.mark.vllm
def test_an_answer_held_to_a_schema(provider: str, node: Node, constrained: Front) -> None:
    """Whole and streamed, of a model that would say anything."""
    urls = {"constrained": constrained.url, "constrained_key": constrained.key}
    seen = node.run("ai_sdk.mjs", provider=provider, **urls)
    for name in ("parsed", "parsed stream"):
        assert seen[name]["topic"] in ("card", "account")
        assert isinstance(seen[name]["urgent"], bool)
