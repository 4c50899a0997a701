"""The engine's HTTP: vLLM's dialect of the OpenAI API over the serving port.

======================================  =====================================================================
``POST /v1/chat/completions``           ``model`` is a base model's name, or the hash of a resident adapter
``POST /v1/completions``                the same, for a bare prompt
``GET /v1/models``                      bases, and adapters with ``parent``
``POST /v1/load_lora_adapter``          ``{"lora_name": hash, "lora_path": folder below home/adapters}``
``POST /v1/unload_lora_adapter``        ``{"lora_name": hash}``
``GET /health``                         200 while the engine answers
======================================  =====================================================================

For the platform's own network: it asks for no key. A client that leaves stops its generation.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web
from everloop.errors import AdapterRefused, Overloaded, ServingError
from everloop.serving.base import Route

from services.engine.metrics import RequestMetrics
from trainer.rollout.embedded import EmbeddedServing

HASH = re.compile(r"[0-9a-f]{16,64}")
DONE = b"data: [DONE]\n\n"


class EngineApp:
    """Handlers over one engine. ``adapters`` is the only folder that adapters are loaded from."""

    def __init__(self, serving: EmbeddedServing, adapters: Path, metrics: RequestMetrics | None = None) -> None:
        self._serving = serving
        self._adapters = adapters.resolve()
        self._metrics = metrics or RequestMetrics()

    def register(self, app: web.Application) -> None:
        app.router.add_post("/v1/chat/completions", self._answering("chat/completions"))
        app.router.add_post("/v1/completions", self._answering("completions"))
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        app.router.add_get("/health", self._health)

    def trouble(self) -> str | None:
        return None if self._serving.alive else "the decoding thread has ended"

    def status(self) -> dict[str, Any]:
        counts = self._serving.counts
        return {
            "bases": {resident.name: resident.policy.identity for resident in self._serving.residents.bases},
            "adapters": self._serving.residents.adapters(),
            "waiting": counts.waiting,
            "running": counts.running,
            "sampled_tokens": counts.sampled_tokens,
        }

    def _answering(self, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            began = time.monotonic()
            try:
                body = await _body(request)
                answer = self._stream if body.get("stream") else self._whole
                response = await answer(request, route, body)
            except ServingError as error:
                response = refusal(error)
            self._metrics.requests.labels(route, response.status).inc()
            self._metrics.duration.labels(route).observe(time.monotonic() - began)
            return response

        return handle

    async def _whole(self, request: web.Request, route: Route, body: dict[str, Any]) -> web.StreamResponse:
        answer = await self._serving.complete(route, body)
        return web.Response(body=orjson.dumps(answer), content_type="application/json")

    async def _stream(self, request: web.Request, route: Route, body: dict[str, Any]) -> web.StreamResponse:
        began = time.monotonic()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        async with aclosing(self._serving.stream(route, body)) as chunks:  # type: ignore[type-var]
            opening = await anext(chunks)  # what is wrong with a request shows here, while a status can be sent
            await response.prepare(request)
            await response.write(_frame(opening))
            last = await self._write(response, chunks, began)
        await response.write(last)
        await response.write_eof()
        return response

    async def _write(self, response: web.StreamResponse, chunks: AsyncIterator[dict[str, Any]], began: float) -> bytes:
        """Send the chunks; returns what ends the stream: an error in it has no ``[DONE]`` after it."""
        first = True
        try:
            async for chunk in chunks:
                if first:
                    self._metrics.first.observe(time.monotonic() - began)
                    first = False
                await response.write(_frame(chunk))
        except ServingError as error:
            return _frame(error_fields(error))
        return DONE

    async def _models(self, request: web.Request) -> web.Response:
        residents = self._serving.residents
        models = [_model(resident.name) | {"max_model_len": resident.policy.context} for resident in residents.bases]
        models += [_model(name) | {"parent": base} for name, base in residents.adapters().items()]
        return web.json_response({"object": "list", "data": models})

    async def _load(self, request: web.Request) -> web.Response:
        try:
            body = await _body(request)
            name, folder = self._named(body), self._folder(body)
            await self._serving.load(name, folder)
        except AdapterRefused as error:
            return refusal(ServingError(str(error), status=400, code="adapter_refused"))
        except ServingError as error:
            return refusal(error)
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        try:
            name = self._named(await _body(request))
        except ServingError as error:
            return refusal(error)
        if not self._serving.residents.unload(name):
            return refusal(ServingError(f"adapter {name} is not loaded", status=404, code="adapter_not_found"))
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if await self._serving.healthy() else 503)

    def _named(self, body: dict[str, Any]) -> str:
        name = body.get("lora_name")
        if not isinstance(name, str) or not HASH.fullmatch(name):
            raise ServingError("'lora_name' must be the content hash of the adapter", status=400, code="invalid_value")
        return name

    def _folder(self, body: dict[str, Any]) -> Path:
        path = body.get("lora_path")
        if not isinstance(path, str) or "\0" in path:
            raise ServingError("'lora_path' must be the adapter's folder", status=400, code="invalid_value")
        folder = Path(path).resolve()
        if not folder.is_relative_to(self._adapters) or folder == self._adapters:
            raise ServingError(f"'lora_path' must lie below {self._adapters}", status=403, code="forbidden_path")
        return folder


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError as error:
        raise ServingError(f"the body is not JSON: {error}", status=400, code="invalid_json") from None
    if not isinstance(body, dict):
        raise ServingError("the body must be a JSON object", status=400, code="invalid_json")
    return body


def error_fields(error: ServingError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    fields = {"message": str(error), "type": kind, "param": None, "code": error.code}
    return {"error": fields}


def refusal(error: ServingError) -> web.Response:
    headers = {"Retry-After": f"{max(1, round(error.retry_after))}"} if isinstance(error, Overloaded) else {}
    body = orjson.dumps(error_fields(error))
    return web.Response(status=error.status, body=body, content_type="application/json", headers=headers)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "everloop"}


def _frame(chunk: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"
