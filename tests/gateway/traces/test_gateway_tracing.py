"""The gateway's own spans: what they say, whose children they are, and that nobody waits for a collector."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from everloop.errors import LogError, ServingError
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from services.gateway import tracing
from services.gateway.upstream import HttpServing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
ASK = {"model": "assistant", "messages": [{"role": "user", "content": "Where is my card?"}]}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")  # ms


@pytest.fixture
async def traced(start: Any, collector: Any) -> Any:
    return await start(telemetry={"otlp_endpoint": collector.url})


async def test_a_call_is_a_span_that_says_all_but_its_words(
    traced: Any, collector: Any, attributes_of: Any, soon: Any
) -> None:
    traced.route(1, live="3fa9")
    traced.engine.held.add("3fa9")
    status, answer, headers = await traced.chat(
        max_tokens=9, temperature=0.5, Traceparent=SAMPLED, Tracestate="a=b", X_Everloop_Subject="anna"
    )
    assert status == 200
    await soon(lambda: len(collector.spans) == 3)
    (call,) = collector.named("chat assistant")
    assert (call.trace_id.hex(), call.parent_span_id.hex(), call.trace_state) == (TRACE, PARENT, "a=b")
    said = attributes_of(call)
    assert (
        said.items()
        >= {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "everloop",
            "gen_ai.request.model": "assistant",
            "gen_ai.request.max_tokens": 9,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.response.id": answer["id"],
            "gen_ai.response.model": "tiny",
            "gen_ai.response.finish_reasons": ["stop"],
            "gen_ai.usage.input_tokens": 3,
            "gen_ai.usage.output_tokens": 6,
            "server.address": "127.0.0.1",
            "everloop.episode": headers["X-Everloop-Episode"],
            "everloop.call": headers["X-Everloop-Call"],
            "everloop.policy_version": "3fa9",
            "everloop.arm": "live",
        }.items()
    )
    (engine,), (durable,) = collector.named("ask engine"), collector.named("make durable")
    assert {engine.parent_span_id, durable.parent_span_id} == {call.span_id}
    assert attributes_of(engine)["gen_ai.request.model"] == "3fa9"
    assert engine.start_time_unix_nano < engine.end_time_unix_nano <= durable.start_time_unix_nano
    assert collector.resources[0]["service.name"] == "everloop-gateway"
    for words in (b"Where is my card", b"on its way", b"anna"):
        assert not any(words in body for body in collector.bodies)


async def test_from_a_trace_to_the_episode_and_back(traced: Any, store_of: Any) -> None:
    _, _, headers = await traced.chat(n=2, Traceparent=SAMPLED)
    rows = store_of(traced).rows(f"SELECT episode, call FROM turns WHERE trace = '{TRACE}'")
    assert [row["episode"] for row in rows] == [headers["X-Everloop-Episode"]] * 2
    assert rows[0]["call"] == headers["X-Everloop-Call"]


async def streamed(bench: Any) -> Any:
    headers = {"Authorization": f"Bearer {bench.key}"}
    return await bench.http.post(f"{bench.url}/v1/chat/completions", json={**ASK, "stream": True}, headers=headers)


async def test_a_stream_notes_its_first_token(traced: Any, collector: Any, attributes_of: Any, soon: Any) -> None:
    traced.engine.resume.clear()
    response = await streamed(traced)
    await response.content.readany()
    traced.engine.resume.set()
    await response.read()
    await soon(lambda: len(collector.spans) == 3)
    (engine,) = collector.named("ask engine")
    (first,) = engine.events
    assert first.name == "first token"
    assert engine.start_time_unix_nano <= first.time_unix_nano < engine.end_time_unix_nano
    said = attributes_of(collector.named("chat")[0])
    assert (said["gen_ai.request.stream"], said["gen_ai.usage.output_tokens"]) == (True, 6)


async def test_the_context_goes_on_to_the_engine(home: Any, start: Any, collector: Any, soon: Any) -> None:
    heard: list[tuple[str | None, str | None]] = []

    async def engine(request: web.Request) -> web.Response:
        heard.append((request.headers.get("traceparent"), request.headers.get("tracestate")))
        choice = {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "prompt_token_ids": [1]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", engine)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    serving = HttpServing(f"http://127.0.0.1:{runner.addresses[0][1]}")
    bench = await start(telemetry={"otlp_endpoint": collector.url}, engine=serving)
    await bench.chat(Traceparent=SAMPLED, Tracestate="vendor=1")
    await soon(lambda: collector.named("ask engine"))
    (asked,) = collector.named("ask engine")
    assert heard == [(f"00-{TRACE}-{asked.span_id.hex()}-01", "vendor=1")]
    await bench.chat(Traceparent=NOT_SAMPLED)
    assert heard[1][0] is not None
    assert heard[1][0].startswith(f"00-{TRACE}-")
    assert heard[1][0].endswith("-00")
    await bench.chat(Traceparent="00-garbage\u00e9-x-01")
    assert heard[2][0] is not None
    assert TRACE not in heard[2][0]
    await serving.close()
    await runner.cleanup()


async def test_sampling_is_the_callers_decision_where_there_is_one(start: Any, collector: Any, soon: Any) -> None:
    bench = await start(telemetry={"otlp_endpoint": collector.url, "sample": 0})
    await bench.chat("one")
    await bench.chat("two", Traceparent=NOT_SAMPLED)
    await bench.chat("three", Traceparent=SAMPLED)
    await soon(lambda: len(collector.spans) == 3)
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    calls = {event.payload.messages[0].text: event.payload.trace for event in bench.events()}
    assert calls == {"one": None, "two": TRACE, "three": TRACE}


@pytest.mark.parametrize(
    ("wrong", "status", "kind", "failed"),
    [
        ({"model": "nobody"}, 404, "model_not_found", False),
        ({"temperature": 9}, 400, "invalid_value", False),
        ({"key": "ek_wrong"}, 401, "invalid_api_key", False),
        ({}, 503, "engine_unavailable", True),
    ],
)
async def test_what_fails_says_why(
    traced: Any, collector: Any, attributes_of: Any, soon: Any, wrong: Any, status: int, kind: str, failed: bool
) -> None:
    traced.engine.error = ServingError("the engine is away", status=503, code="engine_unavailable")
    got, _, _ = await traced.chat(**wrong)
    assert got == status
    await soon(lambda: collector.named("chat"))
    (call,) = collector.named("chat")
    said = attributes_of(call)
    assert (said["error.type"], said.get("http.response.status_code", 503)) == (kind, status)
    assert (call.status.code == Status.STATUS_CODE_ERROR) is failed
    assert [attributes_of(span)["error.type"] for span in collector.named("ask engine")] == [kind] * failed


async def test_a_stream_that_breaks_and_a_client_that_leaves(
    traced: Any, collector: Any, attributes_of: Any, soon: Any
) -> None:
    traced.engine.break_after = 2
    assert b"the engine broke off" in await (await streamed(traced)).read()
    await soon(lambda: len(collector.spans) == 3)
    assert attributes_of(collector.named("chat")[0])["error.type"] == "upstream_broken"
    traced.engine.break_after = None
    traced.engine.resume.clear()
    asked = asyncio.create_task(traced.chat("again"))
    await soon(lambda: len(traced.engine.asked) == 2)
    asked.cancel()
    await soon(lambda: len(collector.named("chat")) == 2)
    assert attributes_of(collector.named("chat")[1])["error.type"] == "client_left"


async def test_an_answer_that_could_not_be_recorded(start: Any, collector: Any, attributes_of: Any, soon: Any) -> None:
    def broken(log: Any) -> Any:
        def refuse(records: Any) -> None:
            raise LogError("the disk is gone")

        log.append_soon = refuse
        return log

    bench = await start(broken, telemetry={"otlp_endpoint": collector.url})
    assert (await bench.chat())[0] == 503
    await soon(lambda: len(collector.spans) == 3)
    for name in ("chat", "make durable"):
        assert attributes_of(collector.named(name)[0])["error.type"] == "log_unavailable"


def outcomes(bench: Any) -> dict[str, int]:
    sent = bench.gateway.metrics.spans_sent
    return {name: int(sent.labels(name)._value.get()) for name in ("exported", "failed", "dropped")}


async def test_a_dead_collector_breaks_nothing(start: Any, soon: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")  # s
    bench = await start(telemetry={"otlp_endpoint": "http://127.0.0.1:9"})
    for at in range(5):
        assert (await bench.chat(str(at)))[0] == 200
    assert len(bench.events()) == 5
    await soon(lambda: outcomes(bench) == {"exported": 0, "failed": 15, "dropped": 0})


async def test_a_collector_that_refuses_is_counted(traced: Any, collector: Any, soon: Any) -> None:
    collector.status = 400
    assert (await traced.chat())[0] == 200
    await soon(lambda: outcomes(traced)["failed"] == 3)


async def test_a_slow_collector_costs_spans_and_no_request(
    start: Any, collector: Any, soon: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tracing, "QUEUE", 16)
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    bench = await start(telemetry={"otlp_endpoint": collector.url})
    collector.go.clear()
    for at in range(20):
        assert (await bench.chat(str(at)))[0] == 200
    held = outcomes(bench)
    assert held["exported"] == 0
    assert 60 - 16 - 4 <= held["dropped"] <= 60 - 16, "as many wait as the queue holds, and a batch is under way"
    collector.go.set()
    await soon(lambda: outcomes(bench)["exported"] == 60 - held["dropped"])
    assert outcomes(bench)["failed"] == 0
    assert len(collector.spans) == 60 - held["dropped"]
    assert len(bench.events()) == 20


async def test_own_spans_that_come_back_are_no_episodes(start: Any, soon: Any, monkeypatch: Any) -> None:
    receiver = await start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"Authorization=Bearer%20{receiver.key}")
    sender = await start(telemetry={"otlp_endpoint": receiver.url})
    await sender.chat()
    await sender.chat(X_Everloop_Capture="off")
    await soon(lambda: outcomes(sender)["exported"] == 5)
    received = receiver.gateway.metrics.spans_received
    assert received.labels("dropped")._value.get() == 5
    assert [event.payload.kind for event in receiver.events()] == ["call"], "the one that was made here"


def test_what_is_off_is_not_even_loaded() -> None:
    code = (
        "import sys, tempfile\n"
        "from pathlib import Path\n"
        "from everloop.config import Config\n"
        "from services.gateway.__main__ import build\n"
        "build(Config(home=Path(tempfile.mkdtemp())))\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
