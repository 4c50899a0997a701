"""A policy with a provider: who answers when, what is recorded of it, and what never goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from everloop.errors import AdapterRefused, Overloaded, ServingError
from everloop.event import Event

from services.gateway.app import Gateway
from services.gateway.keys import Keys
from tests.provider import KEY, MODEL, StrictProvider, streamed

A, B = "aaaa1111", "bbbb2222"
Started = Callable[..., Awaitable[Any]]


def away() -> ServingError:
    return ServingError("no engine answers", status=503, code="engine_unavailable")


@pytest.fixture
def beside(start: Started, other: StrictProvider) -> Started:
    """Start a gateway whose policy 'assistant' has the provider in a role; more of the policy as keyword arguments."""

    async def started(role: str, provider: dict[str, Any] | None = None, **policy: Any) -> Any:
        its = {"base": "tiny", "provider": other.config(role, **provider or {}), **policy}
        return await start(tenants={"bank": {"policies": {"assistant": its, "writer": {"base": "tiny"}}}})

    return started


async def served(bench: Any, text: str = "hi", **more: Any) -> str:
    status, said, headers = await bench.chat(text, **more)
    assert status == 200, said
    return str(headers["X-Everloop-Policy-Version"])


def calls(bench: Any) -> list[Any]:
    return [event.payload for event in bench.events()]


def count(gateway: Gateway, name: str, **labels: str) -> float:
    metrics = gateway.metrics
    found = {"provider": metrics.provider_calls, "other": metrics.fallbacks}[name].labels(**labels)
    return float(found._value.get())


async def test_an_incumbent_answers_before_the_first_route_and_is_recorded_without_tokens(
    beside: Started, other: StrictProvider
) -> None:
    bench = await beside("incumbent")
    status, said, headers = await bench.chat("Where is my card?", temperature=0.7, seed=3, user="ann")
    assert (status, said["choices"][0]["message"]["content"]) == (200, other.says)
    assert (headers["X-Everloop-Policy-Version"], headers["X-Everloop-Arm"]) == ("provider", "live")
    assert said["model"] == "assistant"
    assert said["usage"]["completion_tokens"] == 6
    (call,) = calls(bench)
    assert (call.policy_version, call.model, call.tokens, call.instead_of) == ("provider", MODEL, None, None)
    assert (call.arm, call.sampling.temperature, call.error) == ("live", 0.7, None)
    assert bench.engine.asked == []
    (asked,) = other.asked
    assert asked == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Where is my card?"}],
        "max_completion_tokens": 256,
        "temperature": 0.7,
        "seed": 3,
    }
    assert other.refused == []
    assert count(bench.gateway, "provider", role="incumbent") == 1
    assert count(bench.gateway, "other", arm="live") == 0
    assert await served(bench, model="writer") == "base", "another policy is as it was"
    status, _, _ = await bench.post("/v1/feedback", {"response_id": said["id"], "kind": "thumb", "value": 1})
    assert status == 202


async def test_streams_and_tools_come_as_openais_clients_need_them(beside: Started, other: StrictProvider) -> None:
    """The provider leaves out what some leave out: index, id, role, [DONE]."""
    bench = await beside("incumbent")
    client = bench.client()
    asked: Any = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
    stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == other.says
    assert chunks[-1].usage.completion_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1

    async def calling(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        parts = [{"function": {"name": "find", "arguments": '{"id"'}}, {"function": {"arguments": ": 7}"}}]
        choices = [{"delta": {"tool_calls": [part]}} for part in parts]
        return await streamed(request, [{"choices": [c]} for c in (*choices, {"finish_reason": "function_call"})])

    other.answer = calling
    tools: Any = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    async with client.chat.completions.stream(**asked, tools=tools) as events:
        answer = (await events.get_final_completion()).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("find", '{"id": 7}')
    recorded = calls(bench)[-1]
    assert recorded.output.tool_calls[0]["id"] == call.id
    assert recorded.finish_reason == "tool_calls"


async def test_a_stream_that_breaks_ends_with_an_error_event(beside: Started, other: StrictProvider, soon: Any) -> None:
    async def breaking(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await streamed(request, [{"choices": [{"delta": {"content": "half"}}]}], cut=True)

    bench = await beside("incumbent")
    other.answer = breaking
    stream = await bench.client().chat.completions.create(
        model="assistant", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    with pytest.raises(openai.APIError, match="broke"):
        [chunk async for chunk in stream]
    await soon(lambda: calls(bench))
    call = calls(bench)[-1]
    assert (call.output.content, call.error_code, call.policy_version) == ("half", "upstream_broken", "provider")


async def test_log_probabilities_go_through_where_they_are_asked_for(beside: Started, other: StrictProvider) -> None:
    bench = await beside("incumbent")
    await bench.chat(logprobs=True, top_logprobs=2)
    await bench.chat("again")
    assert [(body.get("logprobs"), body.get("top_logprobs")) for body in other.asked] == [(True, 2), (None, None)]
    assert {call.tokens for call in calls(bench)} == {None}


async def test_an_adapter_takes_over_and_a_rollback_goes_back(beside: Started, other: StrictProvider) -> None:
    bench = await beside("incumbent")
    bench.engine.held |= {A, B}
    begun = {"X_Everloop_Episode": "begun with the provider"}
    assert await served(bench, **begun) == "provider"
    bench.route(1, live="base", canary=A, share=0.5, release="r1", uris={A: ""})
    arms = {await served(bench, X_Everloop_Subject=f"user-{at}") for at in range(20)}
    assert arms == {A, "provider"}
    assert {call.policy_version for call in calls(bench) if call.arm == "control"} == {"provider"}
    bench.route(2, live=A, uris={A: ""})
    assert await served(bench, X_Everloop_Episode="a new one") == A
    assert await served(bench, **begun) == "provider", "its episode goes on as it began"
    bench.route(3, live="base", uris={})
    assert await served(bench, X_Everloop_Episode="a new one") == "provider"
    assert await served(bench, X_Everloop_Capture="off") == "provider"
    bench.route(4, live=A, uris={A: ""})
    bench.engine.held.discard(A)
    assert await served(bench, X_Everloop_Episode="a third") == "provider", "the engine does not hold the adapter yet"
    last = calls(bench)[-1]
    assert (last.policy_version, last.instead_of) == ("provider", A)


async def test_what_a_provider_cannot_do_is_refused_for_both_arms_of_its_canary(
    beside: Started, other: StrictProvider
) -> None:
    bench = await beside("incumbent")
    bench.engine.held |= {A}
    for at in range(6):
        status, said, _ = await bench.chat(top_k=5, X_Everloop_Subject=f"user-{at}")
        assert (status, said["error"]["code"]) == (400, "unsupported_parameter")
        assert "'top_k'" in said["error"]["message"]
        bench.route(1, live="base", canary=A, share=0.5, release="r1", uris={A: ""})
    assert (other.asked, bench.engine.asked, bench.events()) == ([], [], [])
    bench.route(2, live=A, uris={A: ""})
    assert await served(bench, top_k=5, X_Everloop_Subject="user-1") == A


async def test_it_is_not_explored(beside: Started, other: StrictProvider) -> None:
    bench = await beside("incumbent", explore=1.0)
    await bench.chat(temperature=0.2)
    assert (other.asked[0]["temperature"], calls(bench)[0].sampling.temperature) == (0.2, 0.2)
    bench = await beside("fallback", explore=1.0)
    await bench.chat("one", temperature=0.2)
    bench.engine.error = away()
    await bench.chat("two", temperature=0.2)
    explored, not_explored = calls(bench)[-2:]
    assert (explored.policy_version, explored.sampling.temperature) == ("base", 1.0)
    assert (not_explored.policy_version, not_explored.sampling.temperature) == ("provider", 0.2)
    assert other.asked[-1]["temperature"] == 0.2


@pytest.mark.parametrize(
    "error", [away(), Overloaded("full"), ServingError("late", status=504, code="engine_timeout")], ids=str
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_fallback_answers_where_no_engine_does(beside: Started, stream: bool, error: Exception) -> None:
    bench = await beside("fallback")
    assert await served(bench) == "base"
    bench.engine.error = error
    client = bench.client()
    asked: Any = {"model": "assistant", "messages": [{"role": "user", "content": "and now"}], "stream": stream}
    raw = await client.chat.completions.with_raw_response.create(**asked)
    assert raw.headers["X-Everloop-Policy-Version"] == "provider"
    if stream:
        assert [chunk async for chunk in raw.parse()][-1].choices[0].finish_reason == "stop"
    last = calls(bench)[-1]
    assert (last.policy_version, last.instead_of, last.model, last.tokens) == ("provider", "base", MODEL, None)
    assert (last.error, last.error_code) == (None, None)
    assert count(bench.gateway, "provider", role="fallback") == 1
    assert count(bench.gateway, "other", arm="live") == 1
    bench.engine.error = None
    assert await served(bench, "the engine is back") == "base"


async def test_an_engine_that_hangs_is_waited_for_no_longer_than_its_patience(
    beside: Started, other: StrictProvider, soon: Any
) -> None:
    bench = await beside("fallback", provider={"patience": 0.2})
    bench.engine.resume.clear()
    assert await served(bench) == "provider"
    assert bench.engine.cancelled == 1, "the engine's answer is not made for nobody"
    assert len(other.asked) == 1
    client = bench.client()
    stream = await client.chat.completions.create(
        model="assistant", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    chunks = aiter(stream)
    assert (await anext(chunks)).choices, "it has begun: from here on it is the engine's"
    begun = time.monotonic()
    await soon(lambda: time.monotonic() > begun + 0.3)  # longer than its patience
    bench.engine.resume.set()
    assert [chunk async for chunk in chunks][-1].choices[0].finish_reason == "stop"
    assert len(other.asked) == 1
    assert calls(bench)[-1].policy_version == "base"


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_not_the_engines_absence_stays_its_error(
    beside: Started, other: StrictProvider, stream: bool
) -> None:
    bench = await beside("fallback")
    for error, status in (
        (ServingError("garbled", code="upstream_garbled"), 502),
        (ServingError("not finite", status=500, code="not_finite"), 500),
        (ServingError("too long", status=400, code="context_length_exceeded"), 400),
    ):
        bench.engine.error = error
        got, said, _ = await bench.chat(stream=stream)
        assert (got, said["error"]["code"]) == (status, error.code)
    bench.engine.error = away()
    got, said, _ = await bench.chat(top_k=5, stream=stream)
    assert (got, said["error"]["code"]) == (503, "engine_unavailable"), "the provider could not do it"
    assert other.asked == []
    bench.engine.error = None
    bench.engine.break_after = 2
    if stream:
        opened = await bench.client().chat.completions.create(
            model="assistant", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        with pytest.raises(openai.APIError):
            [chunk async for chunk in opened]
        assert other.asked == [], "never after the first token"


async def test_where_both_fail_the_engines_error_stands_with_the_providers_words(
    beside: Started, other: StrictProvider, soon: Any
) -> None:
    bench = await beside("fallback")
    bench.engine.error = Overloaded("the queue is full", retry_after=3)
    other.key = "sk-another"
    status, said, headers = await bench.chat()
    assert (status, said["error"]["code"], headers["Retry-After"]) == (429, "overloaded", "3")
    assert "the queue is full; in its place, the provider at" in said["error"]["message"]
    assert KEY not in str(said)
    bench.engine.error = away()
    status, said, _ = await bench.chat()
    assert (status, said["error"]["code"]) == (503, "engine_unavailable")
    await soon(lambda: calls(bench))
    last = calls(bench)[-1]
    assert (last.policy_version, last.error_code) == ("base", "engine_unavailable")
    assert bench.gateway.status()["providers"]["bank/assistant"]["trouble"].startswith("the provider at")


async def test_an_incumbent_that_is_away_is_a_clear_503_and_nobody_else_answers(
    beside: Started, other: StrictProvider, soon: Any
) -> None:
    bench = await beside("incumbent")
    other.stop()
    status, said, _ = await bench.chat()
    assert (status, said["error"]["code"]) == (503, "provider_unavailable")
    assert "the provider at 127.0.0.1" in said["error"]["message"]
    assert bench.engine.asked == []
    await soon(lambda: calls(bench))
    (call,) = calls(bench)
    assert (call.policy_version, call.error_code) == ("provider", "provider_unavailable")
    other.start()
    assert await served(bench, "again") == "provider"


async def test_versions_are_pinned_by_who_they_are(beside: Started, other: StrictProvider) -> None:
    bench = await beside("incumbent")
    research = bench.new_key(scope="research")
    assert await served(bench, model="assistant@provider", key=research) == "provider"
    assert await served(bench, model="assistant@base", key=research) == "base"
    status, said, _ = await bench.chat(model="writer@provider", key=research)
    assert (status, said["error"]["code"]) == (404, "model_not_found")
    status, _, _ = await bench.chat(model="assistant@provider")
    assert status == 403
    bench.engine.error = away()
    status, _, _ = await bench.chat(model="assistant@base", key=research)
    assert status == 503, "a pinned version never falls back"


async def test_a_retry_after_a_restart_gets_the_providers_answer_with_no_usage_made_up(
    beside: Started, other: StrictProvider
) -> None:
    first = await beside("incumbent")
    status, said, headers = await first.chat(Idempotency_Key="k1")
    again = await beside("incumbent")
    status, same, told = await again.chat(Idempotency_Key="k1")
    assert (status, same["id"], same["choices"][0]["message"]["content"]) == (200, said["id"], other.says)
    assert told["X-Everloop-Policy-Version"] == headers["X-Everloop-Policy-Version"] == "provider"
    assert same["usage"] is None
    assert len(other.asked) == 1


async def test_leaving_stops_the_provider(beside: Started, other: StrictProvider, soon: Any) -> None:
    came, gone = [], []

    async def endless(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        came.append(1)
        try:
            while True:
                await response.write(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n')
                await asyncio.sleep(0.005)
        finally:
            gone.append(1)

    bench = await beside("incumbent")
    other.answer = endless
    stream = await bench.client().chat.completions.create(
        model="assistant", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    await anext(aiter(stream))
    await stream.close()
    await soon(lambda: gone)
    await soon(lambda: calls(bench))
    assert calls(bench)[0].finish_reason == "cancelled"


async def test_it_holds_no_adapters(beside: Started, tmp_path: Any) -> None:
    bench = await beside("incumbent")
    provider = bench.gateway.providers.of("bank", "assistant")
    assert await provider.adapters() == frozenset()
    with pytest.raises(AdapterRefused):
        await provider.load(A, tmp_path)


async def test_events_made_elsewhere_may_say_that_a_provider_answered(beside: Started) -> None:
    """They are events like any other, and of no arm."""
    bench = await beside("incumbent")
    call = {"kind": "call", "id": "c1", "messages": [{"role": "user", "content": "hi"}], "policy_version": "provider"}
    call |= {"output": {"role": "assistant", "content": "hello"}, "instead_of": "base", "arm": "canary"}
    body = {"events": [{"id": "e1", "episode": "x", "policy": "assistant", "payload": call}]}
    status, _, _ = await bench.post("/v1/events", body)
    assert status == 202
    (event,) = bench.events()
    assert isinstance(event, Event)
    assert (event.payload.policy_version, event.payload.arm) == ("provider", "live")


@pytest.mark.processes
async def test_a_gateway_is_ready_without_any_engine_where_every_policy_has_a_provider(
    process_of: Any, tmp_path: Path, other: StrictProvider
) -> None:
    """And says so. One whose key cannot be read does not start."""
    key = tmp_path / "key"
    key.write_text(KEY)
    table = f'url = "{other.url}"\nmodel = "{MODEL}"\nkey_file = "{key}"\n'
    config = tmp_path / "everloop.toml"
    config.write_text(f"[tenants.default.policies.assistant.provider]\n{table}")
    gateway = process_of(tmp_path, "http://127.0.0.1:9", EVERLOOP_CONFIG=str(config))
    async with aiohttp.ClientSession() as http:
        await gateway.start(http)
        with closing(Keys(tmp_path / "keys.db")) as keys:
            headers = {"Authorization": f"Bearer {keys.create('default')}"}
        body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
        async with http.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as answer:
            assert (answer.status, answer.headers["X-Everloop-Policy-Version"]) == (200, "provider")
        async with http.get(f"{gateway.url}/status") as status:
            said = (await status.json())["gateway"]
        assert "no engine answers" in said["engine_trouble"]
        assert said["ready_without_engine"]
        assert KEY not in str(said)
        assert gateway.end() == 0
        key.unlink()
        with pytest.raises(AssertionError, match="key cannot be read"):
            await gateway.start(http)
