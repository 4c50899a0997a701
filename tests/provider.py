"""A provider for tests: an OpenAI-compatible endpoint that is strict, before a real engine or with words of its own.

It refuses what OpenAI refuses (unknown parameters, a wrong key, ``max_tokens`` of chat) and gives nothing that OpenAI
does not give. It runs in a thread, so that any test may ask it.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

KEY = "sk-a-key-of-this-test"
MODEL = "gpt-of-this-test"
SHAPING = {"temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "n", "stop", "logit_bias"}
COMMON = {"model", "stream", "stream_options", "logprobs", *SHAPING}
KNOWN = {
    "chat/completions": COMMON
    | {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"}
    | {"response_format", "reasoning_effort", "verbosity"},
    "completions": COMMON | {"prompt", "max_tokens", "suffix"},
}
MESSAGE = {"role", "content", "name", "tool_calls", "tool_call_id", "refusal"}
HEADERS = {"host", "content-type", "content-length", "authorization", "user-agent", "x-request-id"}
Answers = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


class StrictProvider:
    """``asked`` are the bodies that it took. ``engine``: (URL, model) of an engine that answers for it; else
    ``answer`` does, which a test may change."""

    def __init__(self, engine: tuple[str, str] | None = None) -> None:
        self.engine = engine
        self.asked: list[dict[str, Any]] = []
        self.refused: list[str] = []
        self.key = KEY
        self.says = "the card is on its way"
        self.answer: Answers = self._words if engine is None else self._forwarded
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/openai/v1"

    def config(self, role: str = "incumbent", **more: Any) -> dict[str, Any]:
        return {"url": self.url, "model": MODEL, "key_env": "PROVIDER_KEY_OF_THIS_TEST", "role": role, **more}

    def start(self) -> None:
        """On the same port, however often."""
        self._do(self._start())

    def stop(self) -> None:
        """Nobody answers any more."""
        self._do(self._runner.cleanup())

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**24)
        app.router.add_get("/openai/v1/models", self._models)
        for route in KNOWN:
            app.router.add_post(f"/openai/v1/{route}", self._asked)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return self._locked(request) or web.json_response({"object": "list", "data": [{"id": MODEL}]})

    def _locked(self, request: web.Request) -> web.Response | None:
        given = request.headers.get("Authorization", "")
        if given == f"Bearer {self.key}":
            return None
        return self._no(401, f"Incorrect API key provided: {given.removeprefix('Bearer ')}", "invalid_api_key")

    def _no(self, status: int, message: str, code: str | None = None) -> web.Response:
        self.refused.append(message)
        fields = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        return web.json_response({"error": fields}, status=status)

    async def _asked(self, request: web.Request) -> web.StreamResponse:
        locked = self._locked(request)
        if locked is not None:
            return locked
        body = await request.json()
        unknown = sorted(set(body) - KNOWN[request.path.removeprefix("/openai/v1/")])
        unknown += [f"messages.{name}" for one in body.get("messages", ()) for name in set(one) - MESSAGE]
        unknown += sorted({name.lower() for name in request.headers} - HEADERS)
        if unknown:
            return self._no(400, f"Unrecognized request argument supplied: {', '.join(unknown)}", "unknown_parameter")
        if body["model"] != MODEL:
            return self._no(404, f"The model {body['model']} does not exist", "model_not_found")
        self.asked.append(body)
        return await self.answer(request, body)

    async def _words(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """``says``, a word a chunk."""
        words = [f"{' ' if at else ''}{word}" for at, word in enumerate(self.says.split(" "))]
        usage = {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": 5 + len(words)}
        if not body.get("stream"):
            message = {"role": "assistant", "content": self.says, "annotations": []}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
            return web.json_response({"id": "chatcmpl-theirs", "model": MODEL, "choices": [choice], "usage": usage})
        choices = [{"index": 0, "delta": {"content": word}, "finish_reason": None} for word in words]
        choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
        chunks = [{"id": "chatcmpl-theirs", "model": MODEL, "choices": [choice]} for choice in choices]
        return await streamed(request, [*chunks, {"choices": [], "usage": usage}, "[DONE]"])

    async def _forwarded(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """What the engine says; a stream event for event. It gives no token ids where none are asked for."""
        assert self.engine is not None
        url, model = self.engine
        path = f"{url}/v1/{request.path.removeprefix('/openai/v1/')}"
        async with aiohttp.ClientSession() as http, http.post(path, json={**body, "model": model}) as given:
            if given.status != 200 or not body.get("stream"):
                kept = {"Retry-After": given.headers["Retry-After"]} if "Retry-After" in given.headers else {}
                return web.json_response(await given.json(), status=given.status, headers=kept)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            async for block in given.content.iter_any():
                await response.write(block)
            await response.write_eof()
            return response


async def streamed(request: web.Request, events: list[Any], *, cut: bool = False) -> web.StreamResponse:
    """Server-sent events; ``cut``: the connection breaks after the last one."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for event in events:
        text = event if isinstance(event, str) else json.dumps(event)
        await response.write(f"data: {text}\n\n".encode())
    if cut:
        assert request.transport is not None
        request.transport.abort()
    return response
