"""Bad input: the right status, a message that says what is wrong, bounded time and memory, and the service goes on."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import openai
import orjson
import pytest
from aiohttp import web
from everloop.config import PolicyConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway import ask, calls, responses
from services.gateway.refusals import Refused

GOOD = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def asked(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return asked(messages=[{"role": "user", "content": content, **more}])


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b'{"a": "\\ud800"}', 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"", 400, "not JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, "JSON"),
        (b'{"messages":' + b"[" * 65 + b"]" * 65 + b"}", 400, "nests deeper than 64"),
        (asked(model="gpt-9"), 404, "you have: assistant, writer"),
        (asked(model=""), 400, "'model' is missing"),
        (asked(model=7), 400, "'model' must be a text"),
        (asked(messages=[]), 400, "'messages' is missing or empty"),
        (asked(messages=["hi"]), 400, r"messages\[0\] must be an object"),
        (asked(messages=[{"role": "robot", "content": "hi"}]), 400, "roles are: assistant, developer"),
        (said(7), 400, "content must be a text"),
        (said(None), 400, "content must be a text"),
        (said([{"type": "text"}]), 400, "needs 'text'"),
        (said([{"type": "image_embeds", "image_embeds": "x"}]), 400, "parts may be"),
        (said([{"type": "image_url", "image_url": {}}]), 400, "needs 'image_url'"),
        (said([{**IMAGE, "image_url": {"url": "http://169.254.169.254/"}}]), 400, "fetches nothing from the network"),
        (said([{**IMAGE, "image_url": "https://example.com/x.png"}]), 400, "must be a data: URL"),
        (said("hi", name=7), 400, "name must be a text"),
        (asked(messages=[{"role": "tool", "content": "x"}]), 400, "'tool_call_id'"),
        (asked(temperature=3), 400, "'temperature' must be a number from 0 to 2, not 3"),
        (asked(temperature=True), 400, "'temperature'"),
        (asked(temperature="hot"), 400, "not 'hot'"),
        (asked(max_tokens=0), 400, "'max_tokens'"),
        (asked(n=1000), 400, "'n' must be a whole number from 1 to 16"),
        (asked(stop=[""]), 400, "'stop'"),
        (asked(tools=[{"type": "function"}]), 400, "'tools'"),
        (asked(stream="yes"), 400, "'stream' must be true or false"),
        (asked(temprature=1), 400, "did you mean 'temperature'?"),
        (asked(prompt_logprobs=1), 400, "unknown parameter"),
        (asked(echo=[]), 400, "'echo'"),
    ],
)
async def test_what_is_not_sound_is_refused_and_says_why(bench: Any, body: Any, status: int, words: str) -> None:
    got, answer, _ = await bench.post("/v1/chat/completions", body)
    assert got == status
    assert re.search(words, answer["error"]["message"]), answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert bench.engine.asked == []
    assert (await bench.chat())[0] == 200


@pytest.mark.parametrize(
    "changes", [{"prompt": ["a", "b"]}, {"prompt": [1, 2]}, {"prompt": ""}, {"prompt": "a", "echo": True}]
)
async def test_the_older_route_refuses_what_it_does_not_do(bench: Any, changes: dict[str, Any]) -> None:
    status, answer, _ = await bench.post("/v1/completions", {"model": "assistant", **changes})
    assert status == 400
    assert answer["error"]["code"] == "invalid_value"


async def test_data_urls_go_through(bench: Any) -> None:
    status, _, _ = await bench.post("/v1/chat/completions", said([{"type": "text", "text": "see"}, IMAGE]))
    assert status == 200
    assert bench.engine.asked[0]["messages"][0]["content"][1] == IMAGE


async def test_a_body_of_100_mb_is_refused_in_little_memory_and_time(bench: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    said_length = await raw(bench, [b"x" * 1000], {"Content-Length": str(100_000_000)})
    assert said_length.startswith(b"HTTP/1.1 413")
    assert b"gateway.max_body_bytes" in said_length
    block = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    chunked = await raw(bench, [block] * 100, {"Transfer-Encoding": "chunked"})
    assert chunked.startswith(b"HTTP/1.1 413")
    assert time.monotonic() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000, "kilobytes"
    assert (await bench.chat())[0] == 200


async def test_a_client_that_is_too_slow_is_let_go(bench: Any) -> None:
    bench.gateway._door._read_seconds = 0.2
    answer = await raw(bench, [b'{"model"'], {"Content-Length": "1000"}, wait=True)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not come within 0.2 s" in answer


async def test_a_stream_that_is_read_too_slowly_is_ended_and_its_generation_with_it(
    start: Any, soon: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "SLOWEST_CLIENT", 0.2)
    bench = await start(gateway={"timeout": 0.3})
    ended = asyncio.Event()

    async def flood(route: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        try:
            while True:
                yield {"choices": [{"index": 0, "delta": {"content": "x" * 65_536}, "finish_reason": None}]}
        finally:
            ended.set()

    bench.engine.stream = flood
    body = orjson.dumps(asked(stream=True))
    _, writer = await asyncio.open_connection("127.0.0.1", urlsplit(bench.url).port, limit=4096)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n" % bench.key.encode())
    writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    await asyncio.wait_for(ended.wait(), 20)
    await soon(bench.events)
    assert bench.events()[0].payload.finish_reason == "cancelled"
    assert (await bench.chat())[0] == 200
    writer.transport.abort()


async def raw(bench: Any, blocks: list[bytes], headers: dict[str, str], wait: bool = False) -> bytes:
    """Send what no client library would; returns what came back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(bench.url).port)
    head = {"Host": "x", "Authorization": f"Bearer {bench.key}", **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    writer.write(f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode("utf-8", "surrogateescape"))
    try:
        for block in blocks:
            writer.write(block)
            await asyncio.wait_for(writer.drain(), 5)
    except (ConnectionError, TimeoutError):
        pass
    try:
        return await asyncio.wait_for(reader.readuntil(b"}}"), 10)
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("scheme", [None, "Basic abc", "Bearer", "Bearer ", "Bearer ek_nobody", "Bearer ft_nothing"])
async def test_without_a_good_key_nothing_is_answered(bench: Any, scheme: str | None) -> None:
    headers = {} if scheme is None else {"Authorization": scheme}
    for path in ("chat/completions", "feedback", "events", "feedback/tokens"):
        async with bench.http.post(f"{bench.url}/v1/{path}", json=GOOD, headers=headers) as response:
            assert response.status in (401, 403)
            assert "message" in (await response.json())["error"]
    async with bench.http.get(f"{bench.url}/v1/models", headers=headers) as response:
        assert response.status in (401, 403)


async def test_a_key_of_a_tenant_that_is_gone_opens_nothing(bench: Any) -> None:
    assert (await bench.chat(key=bench.new_key("gone")))[0] == 401


async def test_headers_that_no_text_can_be_are_refused(bench: Any) -> None:
    for name in ("X-Everloop-Episode", "X-Everloop-Subject", "Idempotency-Key"):
        body = orjson.dumps(GOOD)
        answer = await raw(bench, [body], {"Content-Length": str(len(body)), name: "\udcff"})
        assert answer.startswith(b"HTTP/1.1 400"), answer
        assert b"must be printable" in answer


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/v1/feedback", "OPTIONS, POST"),
        ("GET", "/v1/feedback/tokens", "POST"),
        ("PUT", "/v1/events", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("POST", "/v1/models/assistant", "GET, HEAD"),
    ],
)
async def test_another_method_is_told_which_there_is(bench: Any, method: str, path: str, allowed: str) -> None:
    async with bench.http.request(method, bench.url + path) as answer:
        error = (await answer.json())["error"]
        assert (answer.status, answer.headers["Allow"], error["code"]) == (405, allowed, "method_not_allowed")
    assert f"{method} {path} is not served: it takes {allowed}" in error["message"]


async def test_the_engine_never_sees_the_agents_headers_or_admin_calls(bench: Any) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/chat/completions/x"):
        status, answer, _ = await bench.post(path, {"lora_name": "x", "lora_path": "/etc"})
        assert (status, answer["error"]["code"]) == (404, "unknown_endpoint")
    assert bench.engine.asked == []


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(max_size=9)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3)),
    max_leaves=9,
)


@settings(max_examples=200, deadline=None)
@given(
    body=st.dictionaries(
        st.one_of(st.sampled_from(sorted({*ask.CHECKS, *responses.PARAMETERS})), st.text(max_size=9)), JSON, max_size=4
    ),
)
def test_rubbish_is_refused_with_a_4xx_and_never_breaks(body: dict[str, Any]) -> None:
    policies = {"assistant": PolicyConfig()}
    for read, least in (
        (partial(ask.read, "chat/completions"), GOOD),
        (partial(ask.read, "completions"), {"model": "assistant", "prompt": "a"}),
        (responses.read, {"model": "assistant", "input": "a"}),
    ):
        raw = orjson.dumps({**least, **body})
        sound, refused = outcome(lambda raw=raw, read=read: read(ask.parse(raw), policies))
        if refused is None:
            orjson.dumps(sound.body)
            continue
        assert 400 <= refused.status < 500
        assert len(refused.message) < 1000
        json.loads(refused.body)


def outcome(call: Callable[[], Any]) -> tuple[Any, Refused | None]:
    """What a call returned, or how it refused; any other error is the test's failure."""
    try:
        return call(), None
    except Refused as refused:
        return None, refused


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=60))
def test_bytes_that_are_not_json_are_refused(raw: bytes) -> None:
    body, refused = outcome(lambda: ask.parse(raw))
    assert isinstance(body, dict) if refused is None else refused.status == 400


async def test_an_answer_that_a_stop_cuts_short_says_so(start: Any, soon: Any) -> None:
    """By status where nothing was sent, inside the stream else; what had come by then is in the record."""
    bench = await start(services={"drain": 0.5})
    bench.engine.resume.clear()
    whole = asyncio.create_task(bench.chat("Wait for me"))
    stream = await bench.client().chat.completions.create(
        model="assistant", messages=[{"role": "user", "content": "Hello"}], stream=True
    )
    await soon(lambda: len(bench.engine.asked) == 2)
    await bench.gateway._end(web.Application())
    status, body, headers = await whole
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "stopping", "1")
    with pytest.raises(openai.APIError, match="the gateway stopped before the answer was whole"):
        async for _ in stream:
            pass
    assert (await bench.chat("Too late"))[0] == 503
    await soon(lambda: len(bench.events()) == 3)
    assert {event.payload.error for event in bench.events()} == {"the gateway stopped before the answer was whole"}
    assert bench.engine.cancelled >= 2


async def test_a_stop_leaves_an_answer_its_own_shorter_time_and_one_that_is_over_alone(bench: Any) -> None:
    its = bench.gateway._calls

    async def stopped_while_it_is_broken_off() -> None:
        with its._limit() as over:
            async with over:
                try:
                    await asyncio.sleep(30)
                except asyncio.CancelledError:
                    its.end_within(10_000)
                    raise

    with its._limit() as shorter:
        async with shorter:
            at = shorter.when()
            its._longest = 0.0
            with pytest.raises(TimeoutError):
                await stopped_while_it_is_broken_off()
            assert shorter.when() == at
