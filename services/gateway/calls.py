"""A call: from a checked request to an answer whose events are durable.

::

    request ─▶ Door ─▶ ask.read ─▶ seen before? ──yes──▶ the first one's answer again
                                       │ no
                                  Turns.begin: episode, assignment, call id
                                       │
                                  engine ─▶ agent    (of a stream: all but what ends it)
                                       │
                                  Capture.store ─▶ durable ─▶ the last byte leaves

Only the engine and the log are waited for. A client that leaves cancels its handler, and with it the generation;
a call that is already on its way to the log stays there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import orjson
from aiohttp import web
from everloop.config import Config, PolicyConfig
from everloop.errors import LogError, ServingError, UnknownAdapter
from everloop.event import BASE
from everloop.serving.base import Serving

from services.gateway.answer import Answer, Choice, Listener, read_whole, show_whole
from services.gateway.ask import Ask, parse
from services.gateway.capture import Capture
from services.gateway.checks import bad
from services.gateway.chunks import spelled
from services.gateway.door import Door
from services.gateway.metrics import Metrics
from services.gateway.refusals import Refused, from_engine, from_log
from services.gateway.response_object import from_chat
from services.gateway.retries import Finished, Promise, Recovered, Retries
from services.gateway.turns import Turn, Turns
from services.gateway.whole import Whole

JSON = "application/json"
STREAM = "text/event-stream"
SLOWEST_CLIENT = 30.0  # seconds beyond the engine's time that a client may take to read its stream
LEFT = "client disconnected"
SLOW = "the answer, or the client that reads it, took too long"
STOPPED = "the gateway stopped before the answer was whole"
SOON = {"Retry-After": "1"}
Answered = web.StreamResponse | Whole
Reader = Callable[[dict[str, Any], dict[str, PolicyConfig]], Ask]
CODE = web.RequestKey("code", int)
"""The status that counts, where it is known only after another one was sent: a stream that broke."""


class Calls:
    """Answers requests to a policy, in any of their forms. Used by the event loop alone."""

    def __init__(
        self,
        config: Config,
        door: Door,
        turns: Turns,
        serving: Serving,
        capture: Capture,
        retries: Retries,
        recovered: Recovered,
        metrics: Metrics,
    ) -> None:
        self._tenants = config.tenants
        self._longest = config.gateway.timeout + SLOWEST_CLIENT
        self._limits: set[asyncio.Timeout] = set()  # of the answers under way
        self._ends: float | None = None  # when what is then under way is broken off, in the loop's time
        self._door = door
        self._turns = turns
        self._serving = serving
        self._capture = capture
        self._retries = retries
        self._recovered = recovered
        self._metrics = metrics

    async def answer(self, request: web.Request, read: Reader) -> Answered:
        """``read`` makes an Ask of a body and the tenant's policies; it may refuse."""
        key = self._door.key(request, "call")
        raw = await self._door.body(request)
        ask = read(parse(raw), self._tenants[key.tenant].policies)
        if _unrecorded(request):
            return await self._answer(request, ask, self._turns.begin_unrecorded(key, ask), _nothing)
        mark = self._retries.mark(request, key.tenant, raw)
        earlier = await self._retries.earlier(mark) or self._recovered.answer(mark, ask)
        if earlier is not None:
            self._metrics.retries_joined.inc()
            return Whole(earlier)
        turn = self._turns.begin(request, key, ask, mark.name, len(raw))
        with self._retries.answering(mark) as promise:
            return await self._answer(request, ask, turn, promise)

    def end_within(self, seconds: float) -> None:
        """The gateway stops: break off what is still being answered then, with a word to the client."""
        self._ends = asyncio.get_running_loop().time() + seconds
        for limit in self._limits:
            if not limit.expired():  # one that is being broken off already takes no other time
                limit.reschedule(min(self._ends, limit.when() or self._ends))

    @contextmanager
    def _limit(self) -> Iterator[asyncio.Timeout]:
        limit = asyncio.timeout(self._longest) if self._ends is None else asyncio.timeout_at(self._ends)
        self._limits.add(limit)
        try:
            yield limit
        finally:
            self._limits.discard(limit)

    async def _answer(self, request: web.Request, ask: Ask, turn: Turn, promise: Promise) -> Answered:
        stream = _Stream(request, ask, turn) if ask.stream else None
        try:
            with self._limit() as limit:
                async with limit:
                    if stream is None:
                        return await self._whole(ask, turn, promise)
                    return await self._stream(stream, promise)
        except (ServingError, LogError) as error:
            if isinstance(error, ServingError) and error.status >= 500:
                await self._unanswered(ask, turn, stream, str(error), "error", error.code)
            refused = from_engine(error) if isinstance(error, ServingError) else from_log(error)
            return await _break_off(stream, refused)
        except Refused as refused:
            return await _break_off(stream, refused)
        except TimeoutError:
            await self._unanswered(ask, turn, stream, SLOW if self._ends is None else STOPPED, "cancelled")
            if self._ends is None:
                self._metrics.disconnects.inc()
                raise
            return await _break_off(stream, Refused(503, f"{STOPPED}: send it again", "stopping", headers=SOON))
        except (asyncio.CancelledError, ConnectionError):
            self._metrics.disconnects.inc()
            await self._unanswered(ask, turn, stream, LEFT, "cancelled")
            raise

    async def _whole(self, ask: Ask, turn: Turn, promise: Promise) -> Whole:
        asked = time.monotonic()
        body = await self._complete(ask, turn)
        took = time.monotonic() - asked
        answer = read_whole(body)
        stored = await self._record(ask, turn, answer)
        show_whole(body, turn.response, ask.model, ask.wants_logprobs)
        shown = body if ask.echo is None else from_chat(ask, body)
        finished = Finished(orjson.dumps(shown), JSON, turn.headers)
        if stored is not None:
            promise(finished, stored)
            await asyncio.shield(stored)
        self._metrics.added.observe(time.monotonic() - turn.began - took)
        return Whole(finished)

    async def _stream(self, stream: _Stream, promise: Promise) -> web.StreamResponse:
        ask, turn = stream.ask, stream.turn
        async with aclosing(self._chunks(ask, turn)) as chunks:  # a client that leaves stops the engine at once
            async for chunk in chunks:
                await stream.take(chunk)
        if not stream.listener.finished:
            raise ServingError("the engine's stream ended before its answer did", code="upstream_truncated")
        stored = await self._record(ask, turn, stream.listener.answer)
        finished = Finished(stream.to_the_end(), STREAM, turn.headers)
        if stored is not None:
            promise(finished, stored)
            await asyncio.shield(stored)
        return await stream.end()

    async def _record(self, ask: Ask, turn: Turn, answer: Answer) -> asyncio.Future[None] | None:
        """The events of an answered call, on their way to the log; None where nothing is recorded."""
        if not turn.recorded:
            return None
        events = await self._capture.calls(turn, ask, answer)
        turn.stored = True
        for choice in answer.choices:
            self._turns.answered(turn, choice.message)
        self._metrics.counted(*answer.counted)
        return self._capture.store(events)

    async def _unanswered(
        self, ask: Ask, turn: Turn, stream: _Stream | None, why: str, finish: str, code: str | None = None
    ) -> None:
        """A call that failed or was left is an event too, with what had come by then; nobody waits for it."""
        if not turn.recorded or turn.stored:
            return
        answer = stream.listener.answer if stream is not None else Answer([])
        answer.choices = answer.choices or [Choice(0, {"role": "assistant", "content": None})]
        for choice in answer.choices:
            choice.finish_reason = choice.finish_reason or finish
        turn.stored = True
        try:
            self._capture.store_later(await self._capture.calls(turn, ask, answer, why, code))
        except Refused:
            self._metrics.dropped.inc(len(answer.choices))

    async def _complete(self, ask: Ask, turn: Turn) -> dict[str, Any]:
        for version in self._turns.versions(turn):
            try:
                answer = await self._serving.complete(ask.route, _for(ask, turn, version))
            except UnknownAdapter:
                continue
            self._served(turn, version)
            return answer
        raise self._nobody(ask, turn)

    async def _chunks(self, ask: Ask, turn: Turn) -> AsyncGenerator[dict[str, Any]]:
        for version in self._turns.versions(turn):
            stream = self._serving.stream(ask.route, _for(ask, turn, version))
            try:
                async for chunk in stream:
                    self._served(turn, version)
                    yield chunk
                return
            except UnknownAdapter:
                continue
            finally:
                await stream.aclose()  # type: ignore[attr-defined]
        raise self._nobody(ask, turn)

    def _served(self, turn: Turn, version: str) -> None:
        if turn.served != version:
            turn.served = version
            self._metrics.fallbacks.labels(turn.assignment.arm).inc()

    def _nobody(self, ask: Ask, turn: Turn) -> Exception:
        if turn.pinned:
            return Refused(404, f"the engine does not hold {ask.model!r} now", "model_not_found", "model")
        return ServingError(f"the engine holds no model {turn.base!r}", status=503, code="engine_unavailable")


class _Stream:
    """A stream to the agent. What ends a choice is held until its events are durable; all else goes at once."""

    def __init__(self, request: web.Request, ask: Ask, turn: Turn) -> None:
        self.ask = ask
        self.turn = turn
        self.listener = Listener(turn.response, ask.model, ask.wants_logprobs)
        self.response: web.StreamResponse | None = None
        self._request = request
        self._spelled = spelled(ask, turn.response)
        self._sent: list[bytes] = []
        self._held: list[bytes] = []

    async def take(self, chunk: dict[str, Any]) -> None:
        shown = self.listener.show(chunk)
        if shown is None:
            return
        ending = [choice for choice in shown["choices"] if choice.get("finish_reason")]
        if ending:
            self._held.append(self._spelled.chunk({**shown, "choices": ending}))
            shown["choices"] = [choice for choice in shown["choices"] if not choice.get("finish_reason")]
        if shown["choices"]:  # of several answers, those that go on go out in their order
            frame = self._spelled.chunk(shown)
            self._sent.append(frame)
            await self._write(frame)

    def to_the_end(self) -> bytes:
        """Take what comes last; returns the whole stream, as it will have been sent."""
        self._held.append(self._spelled.last(self.listener.usage_chunk()))
        return b"".join(self._sent) + b"".join(self._held)

    async def end(self) -> web.StreamResponse:
        return await self._close(b"".join(self._held))

    async def break_off(self, refused: Refused) -> web.StreamResponse:
        """An error event and no [DONE]: clients raise, where a bare end would look like an answer."""
        self._request[CODE] = refused.status
        return await self._close(self._spelled.failed(refused))

    async def _close(self, last: bytes) -> web.StreamResponse:
        await self._write(last)
        assert self.response is not None
        await self.response.write_eof()
        return self.response

    async def _write(self, frame: bytes) -> None:
        if self.response is None:
            headers = {"Content-Type": STREAM, "Cache-Control": "no-cache", **self.turn.headers}
            self.response = web.StreamResponse(headers=headers)
            await self.response.prepare(self._request)
        await self.response.write(frame)


async def _break_off(stream: _Stream | None, refused: Refused) -> web.StreamResponse:
    """Refuse: by status while nothing was sent, else inside the stream."""
    if stream is None or stream.response is None:
        raise refused
    return await stream.break_off(refused)


def _for(ask: Ask, turn: Turn, version: str) -> dict[str, Any]:
    return {**ask.body, "model": turn.base if version == BASE else version}


def _nothing(finished: Finished, stored: asyncio.Future[None]) -> None:
    """The promise of a call that is not recorded: there is none."""


def _unrecorded(request: web.Request) -> bool:
    given = request.headers.get("X-Everloop-Capture", "on").lower()
    if given not in ("on", "off"):
        raise bad(f"header X-Everloop-Capture is 'on' or 'off', not {given[:20]!r}", code="bad_header")
    return given == "off"
