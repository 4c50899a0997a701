"""Agents' traces: what becomes of spans, whatever batches and orders they come in; and what is refused, and how."""

from __future__ import annotations

import gzip
import itertools
import json
from typing import Any

import pytest
from everloop.errors import LogFull
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

TRACE = "0af7651916cd43dd8448eb211c80319c"
PROTOBUF = "application/x-protobuf"
NOON = 1_763_900_000


def made(at: int, trace: str = TRACE, **attributes: Any) -> Span:
    """A span that began ``at`` seconds after noon. Underscores in names are dots where they are doubled."""
    pairs = [KeyValue(key=key.replace("__", "."), value=value_of(value)) for key, value in attributes.items()]
    begin = (NOON + at) * 10**9
    ids = {"trace_id": bytes.fromhex(trace), "span_id": (at + 1).to_bytes(8, "big")}
    return Span(**ids, name="chat", start_time_unix_nano=begin, end_time_unix_nano=begin + 10**9 // 2, attributes=pairs)


def value_of(value: Any) -> AnyValue:
    if isinstance(value, str):
        return AnyValue(string_value=value)
    return AnyValue(int_value=value) if isinstance(value, int) else AnyValue(double_value=value)


def call(at: int, asked: str = "Where is my card?", said: str = "On its way.", **more: Any) -> Span:
    user = [{"role": "user", "parts": [{"type": "text", "content": asked}]}]
    answer = [{"role": "assistant", "parts": [{"type": "text", "content": said}], "finish_reason": "stop"}]
    fields: dict[str, Any] = {
        "gen_ai__operation__name": "chat",
        "gen_ai__request__model": "gpt-4o",
        "gen_ai__input__messages": json.dumps(user),
        "gen_ai__output__messages": json.dumps(answer),
    }
    return made(at, **{**fields, **more})


def tool(at: int, **more: Any) -> Span:
    fields = {"gen_ai__operation__name": "execute_tool", "gen_ai__tool__name": "route"}
    said = {"gen_ai__tool__call__arguments": '{"a":1}', "gen_ai__tool__call__result": f"queued {at}"}
    return made(at, **{**fields, **said, **more})


def batch(*spans: Span, scope: str = "an.agent", **resource: str) -> bytes:
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    for key, value in resource.items():
        group.resource.attributes.add(key=key.replace("__", "."), value=value_of(value))
    scoped = group.scope_spans.add(spans=spans)
    scoped.scope.name = scope
    return request.SerializeToString()


async def send(bench: Any, body: bytes, key: str | None = None, **headers: str) -> tuple[int, bytes, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    auth = {"Authorization": f"Bearer {key or bench.key}", "Content-Type": PROTOBUF}
    async with bench.http.post(f"{bench.url}/v1/traces", data=body, headers=auth | named) as response:
        return response.status, await response.read(), response.headers


async def taken(bench: Any, *spans: Span, **resource: str) -> None:
    """Send spans that must all be taken or dropped."""
    status, body, _ = await send(bench, batch(*spans, **({"everloop__policy": "assistant"} | resource)))
    assert (status, body) == (200, b"")


def partial(body: bytes) -> tuple[int, str]:
    said = ExportTraceServiceResponse.FromString(body).partial_success
    return said.rejected_spans, said.error_message


def counted(bench: Any) -> dict[str, int]:
    received = bench.gateway.metrics.spans_received
    return {name: int(received.labels(name)._value.get()) for name in ("taken", "dropped", "rejected")}


async def test_a_trace_is_an_episode(bench: Any) -> None:
    more = {"gen_ai__request__temperature": 0.5, "gen_ai__request__max_tokens": 9, "user__id": "anna"}
    await taken(bench, call(0, **more), tool(1), made(2, http__method="GET"))
    first, second = bench.events()
    assert first.episode == second.episode == bench.home.ids.episode_named("bank", TRACE)
    assert first.subject == second.subject == bench.home.ids.pseudonym("bank", "subject", "anna")
    assert (first.policy, first.time, first.synthetic) == ("assistant", NOON, False)
    said = first.payload
    assert (said.id, said.trace, said.model) == ("0000000000000001", TRACE, "gpt-4o")
    assert (said.policy_version, said.arm, said.release, said.tokens) == ("elsewhere", "live", None, None)
    assert [message.text for message in said.messages] == ["Where is my card?"]
    assert (said.output.text, said.finish_reason, said.latency) == ("On its way.", "stop", 0.5)
    assert (said.sampling.temperature, said.sampling.max_tokens) == (0.5, 9)
    assert (second.payload.name, second.payload.arguments, second.payload.result) == ("route", '{"a":1}', "queued 1")
    assert counted(bench) == {"taken": 2, "dropped": 1, "rejected": 0}


async def test_in_whatever_batches_and_order_it_is_the_same_episode(start: Any, store_of: Any) -> None:
    spans = [call(0), tool(1), call(2, "And now?", "Soon."), tool(3)]
    query = "SELECT episode, call, prompt, answer, tools, policy_version, complete FROM turns ORDER BY turn"
    found = []
    for order in itertools.islice(itertools.permutations(spans), 0, None, 9):
        bench = await start()
        for span in order:
            await taken(bench, span)
        found.append(store_of(bench).rows(query))
        break_up(bench)
    assert [row["answer"] for row in found[0]] == ["On its way.", "Soon."]
    assert [[one["result"] for one in row["tools"]] for row in found[0]] == [["queued 1"], ["queued 3"]]
    assert all(rows == found[0] for rows in found)


def break_up(bench: Any) -> None:
    """Forget everything: the next gateway of the same home begins with nothing."""
    for name in ("log.db", "log.db-wal", "log.db-shm"):
        (bench.home.root / name).unlink(missing_ok=True)


async def test_a_batch_that_is_sent_again_changes_nothing(bench: Any, store_of: Any) -> None:
    spans = [call(0, gen_ai__output__messages=json.dumps(ANSWERS)), tool(1)]
    await taken(bench, *spans)
    query = "SELECT * EXCLUDE (updated) FROM turns ORDER BY turn"
    before = store_of(bench).rows(query)
    await taken(bench, *spans)
    await taken(bench, spans[1])
    assert store_of(bench).rows(query) == before
    assert [row["answer"] for row in before] == ["a", "b"]
    assert len(bench.events()) == 7
    assert len({event.id for event in bench.events()}) == 3


ANSWERS = [{"role": "assistant", "parts": [{"type": "text", "content": word}]} for word in "ab"]


async def test_an_episode_is_called_by_its_conversation_or_session(bench: Any) -> None:
    other = "11" * 16
    await taken(bench, tool(0), call(1, gen_ai__conversation__id="chat-7"))
    await taken(bench, call(2, trace=other, gen_ai__conversation__id="chat-7"))
    await taken(bench, call(3, trace="22" * 16, session__id="visit-1"))
    named = bench.home.ids.episode_named
    episodes = [event.episode for event in bench.events()]
    assert episodes == [named("bank", "chat-7")] * 3 + [named("bank", "visit-1")]


async def test_feedback_by_the_name_of_the_episode(bench: Any, store_of: Any) -> None:
    words = {"episode": TRACE, "kind": "correction", "text": "card_arrival", "call": f"{1:016x}"}
    assert (await bench.post("/v1/feedback", words))[0] == 202
    assert (await bench.post("/v1/feedback", {"episode": TRACE, "kind": "outcome", "value": 1}))[0] == 202
    await taken(bench, call(0))
    (turn,) = store_of(bench).rows("SELECT correction, answer FROM turns")
    assert turn == {"correction": "card_arrival", "answer": "On its way."}
    (episode,) = store_of(bench).rows("SELECT outcome FROM episodes")
    assert episode["outcome"] == 1


@pytest.mark.parametrize(
    ("span", "resource", "policy"),
    [
        ({"everloop__policy": "writer"}, {"everloop__policy": "assistant"}, "writer"),
        ({}, {"everloop__policy": "writer", "service__name": "assistant"}, "writer"),
        ({}, {"service__name": "writer"}, "writer"),
        ({}, {"service__name": "shop"}, None),
        ({"everloop__policy": "nobody"}, {"service__name": "writer"}, None),
        ({"everloop__policy": 7}, {}, None),
    ],
)
async def test_whose_call_it_is(bench: Any, span: Any, resource: Any, policy: str | None) -> None:
    status, body, _ = await send(bench, batch(call(0, **span), **resource))
    assert status == 200
    assert [event.policy for event in bench.events()] == ([policy] if policy else [])
    rejected, why = partial(body)
    assert rejected == (policy is None)
    assert policy or "you have: assistant, writer" in why


async def test_the_only_policy_of_a_tenant_needs_no_name(bench: Any) -> None:
    key = bench.new_key("airline")
    assert (await send(bench, batch(call(0)), key))[:2] == (200, b"")
    (event,) = bench.events()
    assert (event.tenant, event.policy) == ("airline", "assistant")


@pytest.mark.parametrize(
    ("span", "why"),
    [
        (made(0, gen_ai__operation__name="chat"), "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"),
        (call(0, gen_ai__output__messages="[]"), "no answer"),
        (call(0, gen_ai__input__messages='[{"role": "king", "parts": []}]'), "the role 'king'"),
        (call(0, gen_ai__input__messages="[" * 90 + "]" * 90), "nests deeper"),
        (call(0, trace="00" * 16), "ids"),
        (call(0, trace="44" * 16, session__id="ep_aaaaaaaa"), "no such episode"),
        (call(0, gen_ai__request__top_p=5e300, session__id="x" * 300), None),
    ],
)
async def test_what_no_event_can_be_made_of_is_rejected_and_the_rest_is_taken(
    bench: Any, span: Span, why: str | None
) -> None:
    status, body, _ = await send(bench, batch(span, call(1), everloop__policy="assistant"))
    assert status == 200
    rejected, said = partial(body)
    assert rejected == (why is not None)
    assert (why or "") in said
    assert counted(bench) == {"taken": 2 - rejected, "dropped": 0, "rejected": rejected}
    assert len(bench.events()) == 2 - rejected


async def test_a_failed_call_needs_no_answer(bench: Any) -> None:
    span = call(0, gen_ai__output__messages="", error__type="RateLimitError")
    span.status.code, span.status.message = 2, "429: too many"
    await taken(bench, span)
    (event,) = bench.events()
    said = event.payload
    assert (said.error, said.error_code, said.finish_reason) == ("429: too many", "RateLimitError", "error")


async def test_calls_that_a_gateway_here_answered_are_there_once(bench: Any, store_of: Any) -> None:
    _, answer, headers = await bench.chat()
    _, unrecorded, _ = await bench.chat("secret", X_Everloop_Capture="off")
    await taken(bench, call(0, gen_ai__response__id=answer["id"]), tool(1, session__id="else"), made(2))
    await taken(bench, call(3, gen_ai__response__id=unrecorded["id"]))
    body = {"output__mime_type": "application/json", "output__value": json.dumps(answer)}
    await taken(bench, made(4, openinference__span__kind="LLM", **body))
    kinds = [(event.payload.kind, event.episode) for event in bench.events()]
    assert sorted(kinds) == [(kind, headers["X-Everloop-Episode"]) for kind in ("call", "tool")]
    (turn,) = store_of(bench).rows("SELECT call, tools FROM turns")
    assert (turn["call"], turn["tools"][0]["result"]) == (headers["X-Everloop-Call"], "queued 1")
    await taken(bench, call(5, trace="33" * 16, gen_ai__response__id="chatcmpl-of-somebody-else"))
    assert len(bench.events()) == 3


async def test_json_is_read_as_the_specification_writes_it(bench: Any) -> None:
    user = {"kvlistValue": {"values": [
        {"key": "role", "value": {"stringValue": "user"}},
        {"key": "parts", "value": {"arrayValue": {"values": [{"kvlistValue": {"values": [
            {"key": "type", "value": {"stringValue": "text"}}, {"key": "content", "value": {"stringValue": "Hi"}},
        ]}}]}}},
    ]}}  # fmt: skip
    attributes = {
        "gen_ai.operation.name": {"stringValue": "chat"},
        "gen_ai.input.messages": {"arrayValue": {"values": [user]}},
        "gen_ai.output.messages": {"stringValue": json.dumps(ANSWERS[:1])},
        "gen_ai.request.max_tokens": {"intValue": "12"},
    }
    span = {
        "traceId": TRACE.upper(),
        "spanId": "eee19b7ec3c1b174",
        "parentSpanId": "",
        "name": "chat",
        "kind": 3,
        "startTimeUnixNano": f"{NOON}000000000",
        "endTimeUnixNano": f"{NOON}500000000",
        "attributes": [{"key": key, "value": value} for key, value in attributes.items()],
        "aFieldOfTomorrow": {"x": 1},
    }
    scoped = {"scope": {"name": "x"}, "spans": [span, {"traceId": TRACE, "spanId": "00f067aa0ba902b7", "name": "a"}]}
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "writer"}}]}
    body = json.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [scoped]}]}).encode()
    status, said, headers = await send(
        bench, gzip.compress(body), Content_Type="application/json", Content_Encoding="gzip"
    )
    assert (status, headers["Content-Type"].split(";")[0], json.loads(said)) == (200, "application/json", {})
    (event,) = bench.events()
    assert (event.payload.id, event.payload.trace, event.policy) == ("eee19b7ec3c1b174", TRACE, "writer")
    assert (event.payload.messages[0].text, event.payload.output.text) == ("Hi", "a")
    assert (event.payload.sampling.max_tokens, event.time) == (12, NOON)
    del span["attributes"][1]
    body = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}).encode()
    status, said, _ = await send(bench, body, Content_Type="application/json")
    assert (status, json.loads(said)["partialSuccess"]["rejectedSpans"]) == (200, "1")


def bomb(size: int) -> bytes:
    return gzip.compress(b"\0" * size)


@pytest.mark.parametrize(
    ("body", "headers", "status", "why"),
    [
        (b"\xff" * 500, {}, 400, "no ExportTraceServiceRequest"),
        (b'{"resourceSpans": 7}', {}, 400, "no ExportTraceServiceRequest"),
        (b'{"resourceSpans": 7}', {"Content_Type": "application/json"}, 400, "no ExportTraceServiceRequest"),
        (b"[]", {"Content_Type": "application/json"}, 400, "no ExportTraceServiceRequest"),
        (b'{"resourceSpans": [""]}', {"Content_Type": "application/json"}, 400, "must be an object, not str"),
        (b"[" * 5000, {"Content_Type": "application/json"}, 400, "no ExportTraceServiceRequest"),
        (b"\x1f\x8bgarbage" * 30, {"Content_Encoding": "gzip"}, 400, "cannot be read"),
        (b"x", {"Content_Type": "text/plain"}, 415, "text/plain"),
        (b"x", {"Content_Encoding": "snappy"}, 415, "snappy"),
        (b"x", {"key": "ek_nobodys"}, 401, "not known"),
        (bomb(50_000_000), {"Content_Encoding": "gzip"}, 413, "4,194,304"),
        (batch(*[Span()] * 20_001), {}, 413, "20,001 spans"),
        (b"\x0a\x00" * 20_001, {}, 413, "20,001 resources"),
        (b'{"resourceSpans":[' + b"{}," * 200_001 + b"{}]}", {"Content_Type": "application/json"}, 413, "JSON objects"),
    ],
)
async def test_what_is_no_export_is_refused_for_good(
    bench: Any, body: bytes, headers: Any, status: int, why: str
) -> None:
    got, said, answered = await send(bench, body, **headers)
    assert got == status
    as_json = headers.get("Content_Type") == "application/json"
    message = json.loads(said)["message"] if as_json else Status.FromString(said).message
    assert why in message
    assert "Retry-After" not in answered
    assert (await send(bench, batch(call(0), service__name="writer")))[0] == 200, "and it goes on"


async def test_who_may_send(bench: Any) -> None:
    assert (await send(bench, batch(call(0)), bench.new_key(scope="feedback")))[0] == 403
    assert (await send(bench, batch(call(0)), bench.new_key(scope="research")))[0] == 200


async def test_one_too_many_is_told_when_to_come_again(start: Any) -> None:
    tenant = {"policies": {"assistant": {"base": "tiny"}}, "per_second": 2}
    bench = await start(tenants={"bank": tenant})
    assert (await send(bench, batch(*[call(at) for at in range(9)])))[0] == 200
    status, _, headers = await send(bench, batch(call(9)))
    assert (status, int(headers["Retry-After"]) > 0) == (429, True)


async def test_what_cannot_be_made_durable_is_to_be_sent_again(start: Any) -> None:
    refusing = True

    def filling(log: Any) -> Any:
        append = log.append_soon

        def full(records: Any) -> Any:
            if refusing:
                raise LogFull("no room")
            return append(records)

        log.append_soon = full
        return log

    bench = await start(filling)
    body = batch(call(0), service__name="writer")
    status, said, headers = await send(bench, body)
    assert (status, headers["Retry-After"], "no room" in Status.FromString(said).message) == (503, "5", True)
    refusing = False
    assert (await send(bench, body))[0] == 200
    assert len(bench.events()) == 1


async def test_ten_thousand_spans_in_one_batch(bench: Any) -> None:
    spans = [call(at, trace=f"{1 + at // 10:032x}") if at % 10 == 0 else made(at) for at in range(10_000)]
    await taken(bench, *spans)
    assert counted(bench) == {"taken": 1000, "dropped": 9000, "rejected": 0}
    assert len({event.episode for event in bench.events()}) == 1000


def masked(event: dict[str, Any]) -> dict[str, Any]:
    event["payload"]["messages"] = [{**message, "content": "***"} for message in event["payload"]["messages"]]
    return event


async def test_the_redaction_hook_comes_first(start: Any) -> None:
    bench = await start(gateway={"redact": f"{__name__}:masked"})
    await taken(bench, call(0))
    (event,) = bench.events()
    assert event.payload.messages[0].text == "***"
