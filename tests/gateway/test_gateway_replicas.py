"""Several engines as one: who is asked, when another one is, and what the caller is told. Over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from everloop.errors import Overloaded, ServingError, UnknownAdapter
from everloop.serving.base import LOST

from services.gateway.replicas import Replicas

CHAT = "chat/completions"


class Stub:
    """An engine over HTTP that a test can make fail. ``asked``: models in order."""

    def __init__(self, *adapters: str) -> None:
        self.adapters = set(adapters)
        self.asked: list[str] = []
        self.fails: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await self._site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def end(self, request: web.Request) -> web.StreamResponse:
        """As a process that dies of a request: nobody listens any more, and its connections end."""
        await self._site.stop()
        return await cut(request)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        named = [{"id": "tiny"}, *({"id": name, "parent": "tiny"} for name in self.adapters)]
        return web.json_response({"data": named})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body["model"])
        if self.fails is not None:
            return await self.fails(request)
        if body["model"] != "tiny" and body["model"] not in self.adapters:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        if not body.get("stream"):
            await self.go_on.wait()
            return web.json_response({"choices": [{"says": self.port}]})
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n')
        await self.go_on.wait()
        await response.write(b"data: [DONE]\n\n")
        return response


def status(code: int, message: str = "no", **headers: str) -> Any:
    async def refuse(request: web.Request) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.json_response({"error": {"message": message}}, status=code, headers=named)

    return refuse


async def cut(request: web.Request) -> web.StreamResponse:
    """The connection ends before the answer begins."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def cut_later(request: web.Request) -> web.StreamResponse:
    """It ends after the first chunk."""
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n')
    await asyncio.sleep(0.01)
    return await cut(request)


class Pair:
    def __init__(self, a: Stub, b: Stub, replicas: Replicas) -> None:
        self.a, self.b, self.replicas = a, b, replicas
        self.routed = frozenset[str]()

    async def look(self) -> None:
        await self.replicas.look(lambda: self.routed)

    async def ask(self, model: str = "tiny") -> Any:
        return await self.replicas.complete(CHAT, {"model": model})

    async def read(self, model: str = "tiny") -> list[Any]:
        return [chunk async for chunk in self.replicas.stream(CHAT, {"model": model})]

    def seen(self, name: str) -> list[Any]:
        return [getattr(replica, name) for replica in self.replicas.each]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    a, b = Stub("x"), Stub("x")
    await a.start()
    await b.start()
    replicas = Replicas([a.url, b.url], timeout=30)
    made = Pair(a, b, replicas)
    await made.look()
    yield made
    await replicas.close()
    await a.stop()
    await b.stop()


async def both(pair: Pair, asked: Callable[[], Awaitable[Any]], count: int = 8) -> None:
    """Ask so often that whoever is drawn first, both would be."""
    for _ in range(count):
        await asked()


async def test_calls_are_spread_by_what_is_under_way(pair: Pair) -> None:
    for stub in (pair.a, pair.b):
        stub.go_on.clear()
    calls = [asyncio.create_task(pair.ask()) for _ in range(6)]
    async with asyncio.timeout(10):
        while len(pair.a.asked) + len(pair.b.asked) < 6:
            await asyncio.sleep(0.01)
    assert (len(pair.a.asked), len(pair.b.asked)) == (3, 3)
    assert pair.seen("in_flight") == [3, 3]
    pair.b.go_on.set()
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    async with asyncio.timeout(10):
        while pair.seen("in_flight") != [3, 0]:
            await asyncio.sleep(0.01)
    for _ in range(3):
        assert await pair.ask() == {"choices": [{"says": pair.b.port}]}
    pair.a.go_on.set()
    await asyncio.gather(*calls)
    assert pair.seen("in_flight") == [0, 0]


@pytest.mark.parametrize("fails", [status(503), status(429), status(404), cut], ids=["503", "429", "404", "cut"])
async def test_what_fails_before_the_first_chunk_is_asked_of_another(pair: Pair, fails: Any) -> None:
    pair.a.fails = fails
    for _ in range(8):
        await pair.look()
        assert await pair.ask("x") == {"choices": [{"says": pair.b.port}]}
        await pair.look()
        assert len(await pair.read("x")) == 1
    assert len(pair.b.asked) == 16
    assert 0 < pair.seen("moved_on")[0] <= len(pair.a.asked), "it was asked first at times"
    assert pair.seen("moved_on")[1] == 0


async def test_a_replica_that_is_gone_costs_no_answer_and_is_left_alone(pair: Pair) -> None:
    await pair.a.stop()
    await both(pair, pair.ask)
    await both(pair, pair.read)
    assert len(pair.b.asked) == 16
    assert pair.seen("up") == [False, True]
    assert pair.replicas.trouble is None


@pytest.mark.parametrize("code", [400, 413, 422, 500])
async def test_a_refusal_is_not_asked_again(pair: Pair, code: int) -> None:
    pair.a.fails = pair.b.fails = status(code)
    for asked in (pair.ask, pair.read):
        with pytest.raises(ServingError):
            await asked()
    assert len(pair.a.asked) + len(pair.b.asked) == 2
    assert pair.seen("moved_on") == [0, 0]


async def test_where_all_are_full_the_shortest_wait_is_told(pair: Pair) -> None:
    pair.a.fails, pair.b.fails = status(429, Retry_After="9"), status(429, Retry_After="4")
    for asked in (pair.ask, pair.read):
        with pytest.raises(Overloaded) as raised:
            await asked()
        assert raised.value.retry_after == 4


async def test_an_adapter_is_unknown_only_where_no_replica_holds_it(pair: Pair) -> None:
    for asked in (pair.ask, pair.read):
        with pytest.raises(UnknownAdapter):
            await asked("y")
    assert pair.a.asked == pair.b.asked == ["y", "y"]
    pair.a.adapters.add("y")
    for _ in range(8):
        await pair.look()
        assert await pair.ask("y") == {"choices": [{"says": pair.a.port}]}


async def test_after_the_first_chunk_nothing_is_asked_again(pair: Pair) -> None:
    pair.a.fails = pair.b.fails = cut_later
    stream = pair.replicas.stream(CHAT, {"model": "tiny"})
    assert await anext(stream)
    with pytest.raises(ServingError) as raised:
        await anext(stream)
    assert raised.value.code == "upstream_broken", "the engine is well: it may be the adapter's doing"
    assert len(pair.a.asked) + len(pair.b.asked) == 1
    assert pair.seen("lost") == [0, 0]


async def test_an_answer_that_ended_with_its_engine_is_lost_and_nobodys_fault(pair: Pair) -> None:
    for stub in (pair.a, pair.b):
        stub.go_on.clear()
    streams = [pair.replicas.stream(CHAT, {"model": "tiny"}) for _ in range(2)]
    for stream in streams:
        await anext(stream)
    await pair.a.stop()
    pair.b.go_on.set()
    ends = await asyncio.gather(*(anext(stream) for stream in streams), return_exceptions=True)
    (lost,) = (error for error in ends if isinstance(error, ServingError))
    assert (lost.status, lost.code) == (503, LOST)
    assert sum(isinstance(error, StopAsyncIteration) for error in ends) == 1
    assert pair.seen("lost") == [1, 0]
    assert pair.seen("up") == [False, True]


async def test_a_request_that_ends_engines_does_not_end_them_all(pair: Pair) -> None:
    more = [Stub(), Stub()]
    for stub in more:
        await stub.start()
    stubs = [pair.a, pair.b, *more]
    replicas = Replicas([stub.url for stub in stubs])
    await replicas.look()
    for stub in stubs:
        stub.fails = stub.end
    with pytest.raises(ServingError) as raised:
        await replicas.complete(CHAT, {"model": "tiny"})
    assert (raised.value.status, raised.value.code) == (503, LOST)
    assert sum(replica.up for replica in replicas.each) == 2
    assert sum(replica.lost for replica in replicas.each) == 2
    for stub in stubs:
        stub.fails = None
    assert await replicas.complete(CHAT, {"model": "tiny"})
    await replicas.close()
    for stub in more:
        await stub.stop()


async def test_one_that_was_away_gets_no_calls_before_it_holds_what_is_routed(pair: Pair) -> None:
    pair.routed = frozenset({"x"})
    await pair.look()
    assert pair.seen("complete") == [True, True]
    await pair.a.stop()
    await pair.look()
    pair.a.adapters.clear()
    await pair.a.start()
    await pair.look()
    assert (pair.seen("up"), pair.seen("complete")) == ([True, True], [False, True])
    await both(pair, pair.ask)
    await both(pair, lambda: pair.ask("x"))
    pair.b.fails = status(429)
    with pytest.raises(Overloaded):
        await pair.ask()
    assert pair.a.asked == [], "nor where the others are full"
    pair.b.fails = None
    pair.a.adapters.add("x")
    await pair.look()
    await both(pair, pair.ask, 20)
    assert pair.a.asked


async def test_where_none_is_complete_the_one_that_holds_the_model_is_asked_then_any(pair: Pair) -> None:
    pair.routed = frozenset({"x", "y"})
    pair.a.adapters = {"y"}
    await pair.look()
    assert pair.seen("complete") == [False, False]
    for _ in range(8):
        assert await pair.ask("y") == {"choices": [{"says": pair.a.port}]}
        assert await pair.ask("x") == {"choices": [{"says": pair.b.port}]}
    assert (set(pair.a.asked), set(pair.b.asked)) == ({"y"}, {"x"}), "nobody was asked in vain"
    await both(pair, pair.ask, 20)
    assert "tiny" in pair.a.asked
    assert "tiny" in pair.b.asked


async def test_one_that_was_started_anew_between_two_looks_is_found_out_by_a_call(pair: Pair) -> None:
    pair.routed = frozenset({"x"})
    await pair.look()
    pair.a.adapters.clear()
    await both(pair, lambda: pair.ask("x"), 20)
    assert len(pair.a.asked) == 1
    assert pair.seen("complete") == [False, True]
    assert len(pair.b.asked) == 20


async def test_a_new_route_is_answered_by_all_before_the_next_look(pair: Pair) -> None:
    """The route comes after the adapter, which both hold by then; what was seen before it says nothing."""
    for stub in (pair.a, pair.b):
        stub.adapters.add("new")
    await both(pair, lambda: pair.ask("new"), 20)
    assert pair.a.asked
    assert pair.b.asked


async def test_where_all_are_away_it_is_said_at_once_and_one_that_is_back_is_found(pair: Pair) -> None:
    await pair.a.stop()
    await pair.b.stop()
    for _ in range(3):
        with pytest.raises(ServingError) as raised:
            await pair.ask()
        assert (raised.value.status, raised.value.code) == (503, "engine_unavailable")
    await pair.look()
    assert str(pair.a.port) in (pair.replicas.trouble or "")
    assert str(pair.b.port) in (pair.replicas.trouble or "")
    await pair.a.start()
    await pair.b.start()
    assert await pair.ask(), "no look was needed"
    await pair.look()
    assert pair.replicas.trouble is None


async def test_an_engine_that_does_not_say_what_it_holds_still_answers() -> None:
    async def plain(request: web.Request) -> web.StreamResponse:
        return web.json_response({"choices": [{}]} if request.method == "POST" else {})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", plain)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    replicas = Replicas([f"http://127.0.0.1:{runner.addresses[0][1]}"])
    await replicas.look(lambda: frozenset({"x"}))
    (replica,) = replicas.each
    assert (replica.up, replica.complete) == (True, False)
    assert "no list of models" in (replica.trouble or "")
    assert await replicas.complete(CHAT, {"model": "tiny"}) == {"choices": [{}]}
    await replicas.close()
    await runner.cleanup()
