"""The serving port over HTTP: an engine that speaks vLLM's dialect of the OpenAI API."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
from everloop.errors import AdapterRefused, Overloaded, ServingError, UnknownAdapter
from everloop.section import root_url
from everloop.serving.base import Route

from services.gateway import brief
from services.gateway.http1 import CONNECT, Broken, Client, Connection, Expired, Framing
from services.gateway.trace import CURRENT

AFTERWARDS = 1.0  # seconds after [DONE] in which the engine may end its stream, so that the connection can be kept
PROCESS = os.urandom(8).hex()
REQUESTS = itertools.count()


class HttpServing:
    """An engine at ``url``. Implements ``everloop.serving.base.Serving``; made and used inside one event loop.

    ``brief``: log-probabilities and token ids of a lone answer, where no alternatives were asked for, may be left as
    JSON (see ``brief.loads``).
    """

    def __init__(self, url: str, *, timeout: float = 300.0, brief: bool = False) -> None:
        self.url = root_url(url)
        self.client = Client(self.url, timeout)
        self._brief = brief

    async def complete(self, route: Route, body: dict[str, Any]) -> dict[str, Any]:
        async with _asked(self, "POST", f"/v1/{route}", body) as answered:
            raw = await answered.body()
            if answered.framing.status != 200:
                raise _refusal(answered.framing, raw)
        try:
            answer = brief.loads(raw) if self._brief and _alone(body) else orjson.loads(raw)
            answer["choices"][0]
        except (orjson.JSONDecodeError, KeyError, IndexError, TypeError):
            raise ServingError("the engine's answer is not a completion", code="upstream_garbled") from None
        return answer  # type: ignore[no-any-return]

    async def stream(self, route: Route, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with _asked(self, "POST", f"/v1/{route}", asked) as answered:
            if answered.framing.status != 200:
                raise _refusal(answered.framing, await answered.body())
            async for chunk in _chunks(answered):
                yield chunk

    async def load(self, name: str, folder: Path) -> None:
        body = {"lora_name": name, "lora_path": str(folder)}
        status, said = await self._order("/v1/load_lora_adapter", body)
        if status >= 500:
            raise ServingError(f"the engine could not load adapter {name}: {said}")
        if status >= 400 and "already" not in said:
            raise AdapterRefused(f"the engine refused adapter {name}: {said}")

    async def unload(self, name: str) -> None:
        status, said = await self._order("/v1/unload_lora_adapter", {"lora_name": name})
        if status not in (200, 400, 404):
            raise ServingError(f"the engine could not unload adapter {name}: {said}")

    async def adapters(self) -> frozenset[str]:
        return frozenset(name for name, parent in (await self.models()).items() if parent)

    async def models(self) -> dict[str, str | None]:
        """Everything that it can be asked for: bases (None), and adapters with their base."""
        async with _asked(self, "GET", "/v1/models", None) as answered:
            raw = await answered.body()
            if answered.framing.status != 200:
                raise _refusal(answered.framing, raw)
        try:
            return {model["id"]: model.get("parent") for model in orjson.loads(raw)["data"]}
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise ServingError(f"{self.url}/v1/models is no list of models", code="upstream_garbled") from None

    async def healthy(self) -> bool:
        try:
            async with asyncio.timeout(CONNECT), _asked(self, "GET", "/health", None) as answered:
                await answered.body()
                return answered.framing.status == 200
        except (ServingError, TimeoutError):
            return False

    async def close(self) -> None:
        self.client.close()

    async def _order(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        async with _asked(self, "POST", path, body) as answered:
            return answered.framing.status, _message(await answered.body())


def _alone(body: dict[str, Any]) -> bool:
    return "top_logprobs" not in body and body.get("n", 1) == 1


class _asked:
    """One request to the engine, as a context: errors of the wire become ServingError, wherever they come up.

    Headers of the agent's request never go on; the request id is our own, and so is the trace context.
    """

    __slots__ = ("_body", "_connection", "_method", "_path", "_serving")

    def __init__(self, serving: HttpServing, method: str, path: str, body: dict[str, Any] | None) -> None:
        self._serving = serving
        self._method = method
        self._path = path
        try:
            self._body = b"" if body is None else orjson.dumps(body)
        except orjson.JSONEncodeError as error:
            raise ServingError(f"the request cannot be sent: {error}", status=400, code="invalid_value") from None

    async def __aenter__(self) -> Connection:
        request_id = f"{PROCESS}-{next(REQUESTS):x}"
        trace = CURRENT.get()
        more = "" if trace is None else trace.headers
        try:
            self._connection = await self._serving.client.ask(self._method, self._path, self._body, request_id, more)
        except OSError as error:
            raise self._failed(error) from error
        return self._connection

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._serving.client.give_back(self._connection)
        if isinstance(error, OSError):
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> ServingError:
        where = self._serving.url
        if isinstance(error, Expired):
            return ServingError(f"the engine at {where} did not answer: {error}", status=504, code="engine_timeout")
        if isinstance(error, Broken):
            return ServingError(str(error), code="upstream_broken")
        return ServingError(f"no engine answers at {where}: {error}", status=503, code="engine_unavailable")


async def _chunks(answered: Connection) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events up to ``[DONE]``. Raises ServingError where the stream ends without it."""
    rest = b""
    while block := await answered.block():
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                await answered.end(AFTERWARDS)
                return
            yield _chunk(data)
    raise ServingError("the engine's stream ended before its answer did", code="upstream_truncated")


def _chunk(data: bytes) -> dict[str, Any]:
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise ServingError("the engine's stream is garbled", code="upstream_garbled") from None
    if not isinstance(chunk, dict):
        raise ServingError("the engine's stream is garbled", code="upstream_garbled")
    if chunk.get("error"):
        raise ServingError(_message(data), code="upstream_error")
    return chunk


def _refusal(answer: Framing, raw: bytes) -> ServingError:
    """The engine's refusal as the port's errors. Its own faults stay 5xx, the request's stay 4xx."""
    said, code = _message(raw), _code(raw)
    status = answer.status
    if status == 429:
        return Overloaded(
            said or "the engine's queue is full", retry_after=_seconds(answer.headers.get(b"retry-after"))
        )
    if status == 404:
        return UnknownAdapter(said)
    if status == 503:
        return ServingError(said or "the engine is not ready", status=503, code=code or "engine_unavailable")
    if status >= 500 or status in (401, 403):
        return ServingError(f"the engine failed ({status}): {said}", status=502, code=code or "upstream_error")
    if "context length" in said or "context window" in said:
        code = "context_length_exceeded"
    return ServingError(said, status=status, code=code or "invalid_request")


def _message(raw: bytes) -> str:
    error = _error(raw)
    return str(error.get("message") or raw[:300].decode("utf-8", "replace"))[:1000]


def _code(raw: bytes) -> str | None:
    """The engine's code where it is a word: vLLM puts the status there."""
    code = _error(raw).get("code")
    return code if isinstance(code, str) else None


def _error(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    if not isinstance(body, dict):
        return {}
    inner = body.get("error")
    return inner if isinstance(inner, dict) else body


def _seconds(text: bytes | None) -> float:
    try:
        return max(1.0, float(text or 1))
    except ValueError:
        return 1.0
