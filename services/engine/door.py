"""The door of our own vLLM: an ASGI middleware in vLLM's process (``--middleware``), before all of its routes.

- More than ``serving.max_batch + serving.queue`` requests at once are answered 429, for vLLM itself would queue them
  without end.
- An adapter is loaded from below ``home/adapters`` alone, under its content hash, and only if this build serves the
  weights that it is on: vLLM answers 200 to any other, and ignores what it does not know. It gets the files in its
  own layout (``trainer/policy/layout.py``).

What passes goes on untouched, chunk by chunk. The configuration is that of the engine's process (see ``vllm.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import orjson
from everloop.config import Config, load
from everloop.errors import AdapterRefused, Overloaded, ServingError
from everloop.home import Home

from services.engine.app import HASH, error_fields
from trainer.policy import layout, lora, servable
from trainer.policy.servable import Servable

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
ANSWERING = frozenset(("/v1/chat/completions", "/v1/completions"))
LOAD = "/v1/load_lora_adapter"
LARGEST_ORDER = 65_536  # bytes


class Door:
    """Made by vLLM around its own application."""

    def __init__(self, app: App, config: Config | None = None) -> None:
        config = config or load()
        its = config.serving
        self._app = app
        self._room = its.max_batch + its.queue
        self._adapters = Home(config.home).folder("adapters").resolve()
        self._servable = Servable(its.targets or servable.ALL, "its build does not", its.vllm.max_lora_rank)
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path") if scope["type"] == "http" else None
        try:
            if path in ANSWERING:
                await self._answer(scope, receive, send)
            elif path == LOAD:
                await self._load(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except ServingError as error:
            await _refuse(send, error)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._inside >= self._room:
            raise Overloaded(f"{self._inside} requests are under way: try again soon, or raise serving.queue")
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1

    async def _load(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await _body(receive)
        try:
            raw = await asyncio.to_thread(self._checked, raw)
        except AdapterRefused as error:
            raise ServingError(str(error), status=400, code="adapter_refused") from None

        async def again() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": raw, "more_body": False}

        headers = [field for field in scope["headers"] if field[0] != b"content-length"]
        headers.append((b"content-length", str(len(raw)).encode()))
        await self._app({**scope, "headers": headers}, again, send)

    def _checked(self, raw: bytes) -> bytes:
        """The order as vLLM gets it, with the adapter in its layout.

        Raises AdapterRefused unless it names an adapter of this home that can be served.
        """
        try:
            order = orjson.loads(raw)
            name, folder = order["lora_name"], Path(order["lora_path"]).resolve()
        except (ValueError, KeyError, TypeError):
            raise AdapterRefused("an order to load has 'lora_name' and 'lora_path'") from None
        if not isinstance(name, str) or not HASH.fullmatch(name):
            raise AdapterRefused("'lora_name' must be the content hash of the adapter")
        if not folder.is_relative_to(self._adapters) or folder == self._adapters:
            raise AdapterRefused(f"'lora_path' must lie below {self._adapters}")
        lora.check_files(folder)
        servable.check(folder, self._servable)
        if (found := lora.content_hash(folder)) != name:
            raise AdapterRefused(f"the adapter in {folder} has hash {found}, not {name}: its files were changed")
        given = layout.converted(folder, self._adapters.with_name("vllm-adapters"))
        return orjson.dumps({**order, "lora_path": str(given)})


async def _body(receive: Receive) -> bytes:
    raw = b""
    while len(raw) <= LARGEST_ORDER:
        message = await receive()
        raw += message.get("body", b"")
        if not message.get("more_body"):
            return raw
    raise ServingError("the order is too long", status=413, code="too_large")


async def _refuse(send: Send, error: ServingError) -> None:
    headers = [(b"content-type", b"application/json")]
    if isinstance(error, Overloaded):
        headers.append((b"retry-after", str(max(1, round(error.retry_after))).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": orjson.dumps(error_fields(error))})
