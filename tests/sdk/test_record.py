"""Episodes: what reaches the gateway when an agent runs inside one, sync and async."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import everloop
import openai
import pytest
from everloop.capture import open_episode
from everloop.capture.open_episode import OpenEpisode

ASK = {"model": "desk", "messages": [{"role": "user", "content": "Where is my card?"}]}


@pytest.fixture
def client(gateway: Any) -> openai.OpenAI:
    return everloop.wrap(openai.OpenAI(base_url=gateway.url + "/v1", api_key="ek_test", max_retries=2))


def test_calls_in_one_block_are_one_episode(gateway: Any, client: openai.OpenAI) -> None:
    with everloop.record("ticket-7", subject="ann", policy="desk") as episode:
        client.chat.completions.create(**ASK)
        episode.tool("route", {"topic": "card_arrival"}, {"queue": 3})
        client.chat.completions.create(**ASK)
    assert everloop.flush()
    first, second = (call.headers for call in gateway.calls())
    assert first["x-everloop-episode"] == second["x-everloop-episode"] == "ticket-7"
    assert (first["x-everloop-subject"], first["x-everloop-seq"], second["x-everloop-seq"]) == ("ann", "0", "2")
    assert first["idempotency-key"] != second["idempotency-key"]
    tool, end = gateway.items("events")
    assert (tool["seq"], tool["episode"], tool["subject"], tool["policy"]) == (1, "ticket-7", "ann", "desk")
    assert tool["payload"]["arguments"] == '{"topic": "card_arrival"}'
    assert tool["payload"]["call"].startswith("call_")
    assert end["payload"] == {"kind": "end", "events": 3}


def test_outside_a_block_nothing_is_added(gateway: Any, client: openai.OpenAI) -> None:
    client.chat.completions.create(**ASK)
    assert not [name for name in gateway.calls()[0].headers if name.startswith("x-everloop")]


def test_capture_off_is_one_option(gateway: Any, client: openai.OpenAI) -> None:
    with everloop.record(capture=False) as episode:
        client.chat.completions.create(**ASK)
        episode.thumb(True)
        episode.tool("route")
    assert everloop.flush()
    headers = gateway.calls()[0].headers
    assert headers["x-everloop-capture"] == "off"
    assert "x-everloop-episode" not in headers
    assert not gateway.items("events")
    assert not gateway.items("feedback")


def test_every_kind_of_feedback_names_its_target(gateway: Any, client: openai.OpenAI) -> None:
    with everloop.record("e", policy="desk") as episode:
        answer = client.chat.completions.create(**ASK)
        episode.thumb(True)
        episode.thumb(-1, call=answer, rater="bob")
        episode.rate(0.5, call=answer.id)
        episode.correct("lost_card")
        episode.prefer("a", over="b")
        episode.outcome(1.0, name="solved")
        episode.comment("fine")
        episode.implicit("kept")
    assert everloop.flush()
    thumb, other, rating, correction, preference, outcome, comment, implicit = gateway.items("feedback")
    assert (thumb["episode"], thumb["policy"], thumb["kind"], thumb["value"]) == ("e", "desk", "thumb", 1.0)
    assert "call" not in thumb
    assert (other["response_id"], other["rater"], other["value"]) == (answer.id, "bob", -1.0)
    assert (rating["response_id"], "episode" in rating) == (answer.id, False)
    assert (correction["text"], correction["call"][:5]) == ("lost_card", "call_")
    assert (preference["chosen"], preference["rejected"]) == ("a", "b")
    assert (outcome["value"], outcome["name"]) == (1.0, "solved")
    assert (comment["text"], implicit["name"], implicit["value"]) == ("fine", "kept", 1.0)
    assert len({item["id"] for item in gateway.items("feedback")}) == 8


def test_three_lines_by_response_id(gateway: Any) -> None:
    everloop.give_feedback(response_id="chatcmpl-x", thumb=1, correction="lost_card")
    everloop.give_feedback(episode="e", outcome=0.5, name="paid")
    assert everloop.flush()
    thumb, correction, outcome = gateway.items("feedback")
    assert (thumb["response_id"], thumb["value"], correction["text"]) == ("chatcmpl-x", 1.0, "lost_card")
    assert (outcome["episode"], outcome["name"]) == ("e", "paid")


def test_a_decorated_function_is_an_episode_a_call(gateway: Any, client: openai.OpenAI) -> None:
    @everloop.record(policy="desk")
    def answer() -> str:
        client.chat.completions.create(**ASK)
        inside = everloop.current()
        assert inside is not None
        return inside.name

    names = {answer(), answer()}
    assert len(names) == 2
    assert {call.headers["x-everloop-episode"] for call in gateway.calls()} == names
    assert everloop.current() is None


def test_a_decorator_refuses_what_it_cannot_do() -> None:
    with pytest.raises(TypeError, match="episode name"):
        everloop.record("one")(lambda: None)

    def stream() -> Any:
        yield 1

    with pytest.raises(TypeError, match="generator"):
        everloop.record()(stream)


async def test_async_tasks_have_their_own_episodes(gateway: Any) -> None:
    client = everloop.wrap(openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="ek_test"))

    @everloop.record()
    async def decorated() -> str:
        await client.chat.completions.create(**ASK)
        inside = everloop.current()
        assert inside is not None
        return inside.name

    async def block(name: str) -> str:
        async with everloop.record(name):
            await client.chat.completions.create(**ASK)
            await client.chat.completions.create(**ASK)
        return name

    names = await asyncio.gather(block("a"), block("b"), decorated())
    seqs: dict[str, list[str]] = {}
    for call in gateway.calls():
        seqs.setdefault(call.headers["x-everloop-episode"], []).append(call.headers["x-everloop-seq"])
    assert {name: sorted(seq) for name, seq in seqs.items()} == {"a": ["0", "1"], "b": ["0", "1"], names[2]: ["0"]}


def test_blocks_nest_and_an_error_passes_through(gateway: Any) -> None:
    with everloop.record("outer") as outer:
        with pytest.raises(KeyError), everloop.record("inner"):
            raise KeyError("the agent's own")
        assert everloop.current() is outer
    assert everloop.flush()
    assert [event["episode"] for event in gateway.items("events")] == ["inner", "outer"]


def test_a_retried_call_keeps_its_number_and_key(gateway: Any, client: openai.OpenAI) -> None:
    first: list[int] = []

    def busy_once(got: Any) -> Any:
        if got.path == "/v1/chat/completions" and not first:
            first.append(1)
            return gateway.refusal(503, Retry_After_Ms="1")
        return None

    gateway.reply = busy_once
    with everloop.record():
        client.chat.completions.create(**ASK)
    assert everloop.flush()
    one, two = (call.headers for call in gateway.calls())
    assert (one["x-everloop-seq"], one["idempotency-key"]) == (two["x-everloop-seq"], two["idempotency-key"])
    assert gateway.payloads("end")[0]["events"] == 1


def test_nobody_waits_for_a_call_that_failed(gateway: Any, client: openai.OpenAI) -> None:
    gateway.reply = lambda got: gateway.refusal(400) if "completions" in got.path else None
    with everloop.record() as episode:
        episode.tool("look_up")
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**ASK)
    assert everloop.flush()
    assert gateway.payloads("end")[0]["events"] == 1


def test_a_part_of_an_episode_is_neither_numbered_nor_ended(gateway: Any, client: openai.OpenAI) -> None:
    with everloop.record("chat-9", whole=False) as episode:
        client.chat.completions.create(**ASK)
        episode.tool("look_up")
    assert everloop.flush()
    assert "x-everloop-seq" not in gateway.calls()[0].headers
    assert [("seq" in event, event["payload"]["kind"]) for event in gateway.items("events")] == [(False, "tool")]


def test_another_provider_learns_nothing(gateway: Any) -> None:
    everloop.configure("http://127.0.0.1:9", "ek_test")
    other = everloop.wrap(openai.OpenAI(base_url=gateway.url + "/v1", api_key="sk_other"))
    with everloop.record(subject="ann"):
        other.chat.completions.create(**ASK)
    assert not [name for name in gateway.calls()[0].headers if name.startswith("x-everloop")]


def test_a_wrapped_client_with_our_key_sets_the_sdk_up(gateway: Any) -> None:
    everloop.configure(None, None)
    client = everloop.wrap(openai.OpenAI(base_url=gateway.url + "/v1/", api_key="ek_other"))
    with everloop.record() as episode:
        client.chat.completions.create(**ASK)
        episode.thumb(True)
    assert everloop.flush()
    assert gateway.items("feedback")[0]["kind"] == "thumb"
    assert gateway.got[-1].headers["authorization"] == "Bearer ek_other"


def test_a_client_is_wrapped_once(gateway: Any, client: openai.OpenAI) -> None:
    everloop.wrap(client)
    with everloop.record():
        client.with_options(timeout=5).chat.completions.create(**ASK)
    assert gateway.calls()[0].headers["x-everloop-seq"] == "0"
    with pytest.raises(TypeError, match="openai client"):
        everloop.wrap(object())


def test_headers_for_a_client_that_is_not_wrapped(gateway: Any) -> None:
    plain = openai.OpenAI(base_url=gateway.url + "/v1", api_key="ek_test")
    with everloop.record("e") as episode:
        plain.chat.completions.create(**ASK, extra_headers=episode.headers())
    assert gateway.calls()[0].headers["x-everloop-episode"] == "e"


def test_threads_share_an_episode_by_its_methods(gateway: Any) -> None:
    with everloop.record("e") as episode:
        threads = [threading.Thread(target=lambda: [episode.tool("t") for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert everloop.flush()
    assert sorted(event["seq"] for event in gateway.items("events") if "seq" in event) == list(range(200))
    assert gateway.payloads("end")[0]["events"] == 200


def test_a_call_made_elsewhere_is_recorded_with_the_clients_own_objects(gateway: Any, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASK)
    with everloop.record("replayed", policy="desk") as episode:
        call = episode.call(ASK["messages"], answer.choices[0].message, model="gpt", latency=0.5)
        episode.thumb(True, call=call)
    assert everloop.flush()
    payload = gateway.payloads("call")[0]
    assert payload["id"] == call == gateway.items("feedback")[0]["call"]
    assert payload["output"] == {"role": "assistant", "content": "card_arrival"}


def test_a_feedback_token_is_had_or_is_none(gateway: Any) -> None:
    with everloop.record("e") as episode:
        assert episode.feedback_token(60) == "ft_x"
        assert gateway.got[-1].body == {"episode": "e", "ttl": 60}
        gateway.close()
        assert episode.feedback_token(60) is None
    assert everloop.stats().dropped == {"no feedback token": 1}


def test_threads_that_take_numbers_at_once_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thread is held in the middle of its step until the second one is through, or cannot get in."""
    held, through = threading.Event(), threading.Event()

    def slow(*values: int) -> int:
        result = max(*values)
        if not held.is_set():
            held.set()
            through.wait(1)
        return result

    monkeypatch.setattr(open_episode, "max", slow, raising=False)
    episode = OpenEpisode(None, "run-1", None, None, True, True)  # nothing is sent
    first = threading.Thread(target=episode.headers)
    first.start()
    held.wait(0.2)
    episode.headers()
    through.set()
    first.join()
    assert episode._given == 2
    assert episode.headers()["X-Everloop-Seq"] == "2"
