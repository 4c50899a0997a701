"""An engine over HTTP that answers by what it is asked: tool calls in one and in several pieces, trouble, breaks.

With it gateway and client are tested; what a model would choose to say is not. What the last message asks for:

::

    weather in Bern and Basel, with tools   ─▶ a call of the first tool for each city
    results of tools                        ─▶ "The results: <them, in order>"
    be busy; be busy once                   ─▶ 429 with Retry-After 1, each time; the first time
    fail                                    ─▶ 500
    break off                               ─▶ two words, then the connection is cut
    anything else                           ─▶ "the card is on its way"
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
from aiohttp import web
from everloop.errors import Overloaded, ServingError

from tests.gateway.conftest import Engine

HOP = ("Host", "Content-Length", "Transfer-Encoding", "Connection")


class Scripted:
    """The engine. ``asked`` are the bodies of all requests, in the order in which they came."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def asks(self, words: str) -> list[dict[str, Any]]:
        """The requests whose last message has these words."""
        return [body for body in list(self.asked) if words in last_words(body)]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.method != "POST":
            return web.json_response({})
        body = await request.json()
        before = len(self.asks(last_words(body)))
        self.asked.append(body)
        engine = told(body, before)
        route = request.path.removeprefix("/v1/")
        try:
            if not body.get("stream"):
                return web.json_response(await engine.complete(route, body))
            return await self._stream(request, engine, route, body)
        except Overloaded as error:
            return web.json_response({"error": {"message": str(error)}}, status=429, headers={"Retry-After": "1"})
        except ServingError as error:
            return web.json_response({"error": {"message": str(error)}}, status=500)

    async def _stream(
        self, request: web.Request, engine: Engine, route: str, body: dict[str, Any]
    ) -> web.StreamResponse:
        response: web.StreamResponse | None = None
        try:
            async for chunk in engine.stream(route, body):
                if response is None:
                    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                    await response.prepare(request)
                await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        except ServingError:
            if response is None or request.transport is None:
                raise
            request.transport.abort()
            return response
        assert response is not None
        await response.write(b"data: [DONE]\n\n")
        return response


def last_words(body: dict[str, Any]) -> str:
    content = body["messages"][-1].get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def told(body: dict[str, Any], before: int) -> Engine:
    """The engine for one request; ``before``: how often the same words were asked."""
    engine, words = Engine(), last_words(body)
    engine.held = {body["model"]}
    results = [message for message in body["messages"] if message["role"] == "tool"]
    if results:
        engine.says = "The results: " + "; ".join(last_words({"messages": [result]}) for result in results)
    elif body.get("tools") and (cities := re.search(r"weather in (\w+)(?: and (\w+))?", words)):
        name = body["tools"][0]["function"]["name"]
        engine.tool_calls = [_call(name, city) for city in cities.groups() if city]
    elif "be busy" in words and not ("be busy once" in words and before):
        engine.error = Overloaded("the engine's queue is full", retry_after=1)
    elif "fail" in words:
        engine.error = ServingError("the engine failed", status=500)
    elif "break off" in words:
        engine.break_after = 2
    return engine


def _call(name: str, city: str) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps({"city": city})}
    return {"id": f"call_{city.lower()}", "type": "function", "function": function}


class Losing:
    """A way to a gateway that loses the first answer to every request: it was made, and its client never hears it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._seen: set[bytes] = set()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name: value for name, value in request.headers.items() if name not in HOP}
        async with (
            aiohttp.ClientSession() as http,
            http.request(request.method, self._url + request.path, data=body, headers=headers) as answer,
        ):
            whole = await answer.read()
            kept = {name: value for name, value in answer.headers.items() if name not in HOP}
        if body in self._seen:
            return web.Response(status=answer.status, body=whole, headers=kept)
        self._seen.add(body)
        assert request.transport is not None
        request.transport.abort()
        return web.Response()


@contextmanager
def listening(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Iterator[str]:
    """Serve every path in a thread of its own; gives the address."""
    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)

    async def begin() -> int:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return int(runner.addresses[0][1])

    port = loop.run_until_complete(begin())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
