"""The engine over HTTP: what its answers and failures become. The port's own promises are in tests/ports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from everloop.errors import AdapterRefused, Overloaded, ServingError, UnknownAdapter

from services.gateway.upstream import HttpServing

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
CHUNK = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'


@pytest.fixture
async def engine() -> AsyncIterator[Callable[[Handler], Awaitable[HttpServing]]]:
    """Serve a handler for every path; returns the serving port that asks it."""
    runners: list[web.AppRunner] = []
    made: list[HttpServing] = []

    async def start(handler: Handler, **options: Any) -> HttpServing:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        runners.append(runner)
        made.append(HttpServing(f"http://127.0.0.1:{runner.addresses[0][1]}/v1/", **options))
        return made[-1]

    yield start
    for serving in made:
        await serving.close()
    for runner in runners:
        await runner.cleanup()


def answers(status: int, body: Any, **headers: str) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        if isinstance(body, bytes):
            return web.Response(status=status, body=body, headers=headers)
        return web.json_response(body, status=status, headers=headers)

    return answer


def error(message: str, code: Any = None) -> dict[str, Any]:
    return {"error": {"message": message, "code": code}}


@pytest.mark.parametrize(
    ("status", "body", "kind", "became", "code"),
    [
        (
            400,
            error("This model's maximum context length is 64 tokens", 400),
            ServingError,
            400,
            "context_length_exceeded",
        ),
        (400, error("no tools here", "tools_not_supported"), ServingError, 400, "tools_not_supported"),
        (404, error("The model `x` does not exist.", 404), UnknownAdapter, 404, "adapter_not_found"),
        (429, error("full"), Overloaded, 429, "overloaded"),
        (500, error("CUDA out of memory", 500), ServingError, 502, "upstream_error"),
        (401, error("who are you"), ServingError, 502, "upstream_error"),
        (503, b"<html>loading</html>", ServingError, 503, "engine_unavailable"),
        (200, b"not json", ServingError, 502, "upstream_garbled"),
        (200, {"choices": []}, ServingError, 502, "upstream_garbled"),
        (200, [], ServingError, 502, "upstream_garbled"),
    ],
)
async def test_refusals_become_the_ports_errors(
    engine: Any, status: int, body: Any, kind: type, became: int, code: str
) -> None:
    serving = await engine(answers(status, body, **{"Retry-After": "7"}))
    with pytest.raises(ServingError) as raised:
        await serving.complete("chat/completions", BODY)
    assert type(raised.value) is kind
    assert (raised.value.status, raised.value.code) == (became, code)
    if isinstance(raised.value, Overloaded):
        assert raised.value.retry_after == 7
    if status != 200:
        with pytest.raises(kind):
            await anext(aiter(serving.stream("chat/completions", BODY)))


def streams(*blocks: bytes, cut: bool = False) -> Handler:
    async def stream(request: web.Request) -> web.StreamResponse:
        assert (await request.json())["stream_options"] == {"include_usage": True}
        response = web.StreamResponse()
        await response.prepare(request)
        for block in blocks:
            await response.write(block)
            await asyncio.sleep(0)
        if cut:
            assert request.transport is not None
            request.transport.abort()
        return response

    return stream


async def read(serving: HttpServing) -> list[str]:
    return [c["choices"][0]["delta"]["content"] async for c in serving.stream("chat/completions", BODY)]


async def test_a_stream_is_read_wherever_it_is_split(engine: Any) -> None:
    whole = b": comment\n\n" + CHUNK + CHUNK.replace(b"\n", b"\r\n") + b"data: [DONE]\n\n"
    for size in (1, 7, 1000):
        blocks = [whole[at : at + size] for at in range(0, len(whole), size)]
        assert await read(await engine(streams(*blocks))) == ["a", "a"]


@pytest.mark.parametrize(
    ("blocks", "cut", "code"),
    [
        ([CHUNK], False, "upstream_truncated"),
        ([CHUNK], True, "upstream_broken"),
        ([CHUNK, b"data: {\n\n"], False, "upstream_garbled"),
        ([CHUNK, b"data: []\n\n"], False, "upstream_garbled"),
        ([CHUNK, b'data: {"error": {"message": "died"}}\n\n'], False, "upstream_error"),
    ],
)
async def test_a_stream_that_breaks_raises(engine: Any, blocks: list[bytes], cut: bool, code: str) -> None:
    serving = await engine(streams(*blocks, cut=cut))
    with pytest.raises(ServingError) as raised:
        await read(serving)
    assert raised.value.code == code


async def test_leaving_stops_the_engine(engine: Any, soon: Any) -> None:
    came, gone = [], []

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        came.append(request.path)
        try:
            while True:
                await response.write(CHUNK)
                await asyncio.sleep(0.005)
        except (asyncio.CancelledError, ConnectionError):
            gone.append(request.path)
            raise

    serving = await engine(endless)
    stream = serving.stream("chat/completions", BODY)
    await anext(stream)
    await stream.aclose()
    await soon(lambda: len(gone) == 1)
    waiting = asyncio.create_task(serving.complete("chat/completions", BODY))
    await soon(lambda: len(came) == 2)
    waiting.cancel()
    await soon(lambda: len(gone) == 2)


async def test_an_engine_that_is_away_or_too_slow_says_so(engine: Any) -> None:
    away = HttpServing("http://127.0.0.1:1")
    with pytest.raises(ServingError) as raised:
        await away.complete("chat/completions", BODY)
    assert (raised.value.status, raised.value.code) == (503, "engine_unavailable")
    assert not await away.healthy()
    await away.close()

    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(ServingError) as raised:
        await (await engine(slow, timeout=0.1)).complete("chat/completions", BODY)
    assert (raised.value.status, raised.value.code) == (504, "engine_timeout")


async def test_a_connection_that_was_closed_while_idle_is_tried_anew(engine: Any) -> None:
    asked = []

    async def close_after(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers["X-Request-Id"])
        if len(asked) == 2:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response({"choices": [{}]})

    serving = await engine(close_after)
    for _ in range(2):
        assert await serving.complete("chat/completions", BODY) == {"choices": [{}]}
    assert len(asked) == 3, "the second request was sent again, on a new connection"
    assert asked[1] == asked[2] != asked[0]


async def test_adapters_are_loaded_listed_and_dropped(engine: Any) -> None:
    orders = []

    async def admin(request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            models = [{"id": "tiny", "parent": None}, {"id": "aaaa", "parent": "tiny"}]
            return web.json_response({"object": "list", "data": models})
        if request.path == "/health":
            return web.Response()
        body = await request.json()
        orders.append((request.path, body))
        said = {"bad": "rank too large", "again": "has already been loaded"}.get(body["lora_name"])
        return web.json_response(error(said), status=400) if said else web.Response(text="Success")

    serving = await engine(admin)
    await serving.load("aaaa", Path("/x/aaaa"))
    await serving.load("again", Path("/x/again"))
    with pytest.raises(AdapterRefused, match="rank too large"):
        await serving.load("bad", Path("/x/bad"))
    await serving.unload("aaaa")
    assert orders[0] == ("/v1/load_lora_adapter", {"lora_name": "aaaa", "lora_path": "/x/aaaa"})
    assert orders[-1] == ("/v1/unload_lora_adapter", {"lora_name": "aaaa"})
    assert await serving.adapters() == {"aaaa"}
    assert await serving.healthy()
