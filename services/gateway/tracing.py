"""Spans of calls: made by OpenTelemetry's SDK, sent to a collector by OTLP. Imported only where that is on.

::

    request ─▶ CallTrace: "chat assistant"    the agent's traceparent is its parent, and decides whether it is sampled
                 ├─ "ask engine"              one each version that was asked; its context goes on to the engine
                 └─ "make durable"            until the log has the events
    ended spans ─▶ SpanQueue (bounded) ─▶ the SDK's thread ─▶ collector
                      └─ full: dropped, and counted

No prompt and no answer is in a span: ``everloop.episode`` and ``everloop.call`` say where they are, and the call's
record has the trace id.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from everloop.errors import LogError, ServingError
from everloop.serving.base import Answering, Route
from everloop.telemetry_config import TelemetryConfig
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    format_trace_id,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import Counter

from services.gateway.answer import Answer
from services.gateway.ask import Ask
from services.gateway.calls import CODE, Answered
from services.gateway.refusals import Refused
from services.gateway.spans import SCOPE
from services.gateway.trace import CURRENT
from services.gateway.turns import Turn

NAME = "everloop-gateway"
QUEUE = 8192  # ended spans that may wait for the collector
LAST = 2.0  # seconds at the end for what still waits
SWITCH = 0.0005  # seconds for which making a batch may hold up the event loop
SOURCE = InstrumentationScope(SCOPE)
FINE, FAILED = Status(StatusCode.UNSET), Status(StatusCode.ERROR)
OPERATIONS = {"completions": "text_completion"}  # every other route is a chat
PROPAGATOR = TraceContextTextMapPropagator()
Handler = Callable[[web.Request], Awaitable[Answered]]


class Tracing:
    """Makes the traces of one gateway. ``sent`` counts spans by ``outcome``: exported, failed or dropped.

    Spans are put together when they have ended, from what was noted: the SDK's own, with a lock and a check for every
    attribute, take three times as long, in the thread that answers.
    """

    def __init__(self, config: TelemetryConfig, sent: Counter) -> None:
        assert config.otlp_endpoint is not None
        self._exporter = CountedExporter(OTLPSpanExporter(f"{config.otlp_endpoint.rstrip('/')}/v1/traces"), sent)
        self._queue = SpanQueue(self._exporter, sent)
        self._resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", NAME)})
        self.sampler = ParentBased(TraceIdRatioBased(config.sample))
        self.ids = RandomIdGenerator()
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # it speaks at every try; what counts is counted
        sys.setswitchinterval(SWITCH)

    def traced(self, path: str, handler: Handler) -> Handler:
        """A handler of calls that leaves a trace of each."""
        operation = OPERATIONS.get(path, "chat")

        async def answered(request: web.Request) -> Answered:
            trace = CallTrace(self, request, operation)
            token = CURRENT.set(trace)
            try:
                answer = await handler(request)
                trace.answered(request.get(CODE, answer.status))
                return answer
            except BaseException as error:
                trace.failed(error)
                raise
            finally:
                CURRENT.reset(token)
                trace.end()

        return answered

    def ended(self, noted: Noted, parent: SpanContext | None, context: SpanContext) -> None:
        """One span, from now on the collector's."""
        span = ReadableSpan(
            name=noted.name,
            context=context,
            parent=parent,
            resource=self._resource,
            attributes=noted.attributes,
            events=noted.events,
            kind=noted.kind,
            status=FAILED if "error.type" in noted.attributes and not noted.excused else FINE,
            start_time=noted.start,
            end_time=time.time_ns(),
            instrumentation_scope=SOURCE,
        )
        self._queue.on_end(span)

    def close(self) -> None:
        """Send what waits, for two seconds at most. Blocks."""
        ending = threading.Thread(target=self._queue.shutdown, daemon=True)
        ending.start()
        ending.join(LAST)
        if ending.is_alive():
            self._exporter.shutdown()  # wakes it from waiting to try again


class Noted:
    """What is known of a span so far. ``excused``: its error is somebody else's."""

    __slots__ = ("attributes", "events", "excused", "kind", "name", "start")

    def __init__(self, name: str, kind: SpanKind, attributes: dict[str, Any]) -> None:
        self.name = name
        self.kind = kind
        self.attributes = attributes
        self.events: list[Event] = []
        self.excused = False
        self.start = time.time_ns()


class CallTrace:
    """The spans of one call. Used by the event loop alone. Of a call that is not sampled only its context is known."""

    def __init__(self, tracing: Tracing, request: web.Request, operation: str) -> None:
        context = PROPAGATOR.extract(request.headers, Context())
        given = get_current_span(context).get_span_context()
        self._tracing = tracing
        self._operation = operation
        self._parent = given if given.is_valid else None
        trace = given.trace_id if given.is_valid else tracing.ids.generate_trace_id()
        decided = tracing.sampler.should_sample(context, trace, operation)
        self._sampled = decided.decision.is_sampled()
        flags = TraceFlags(TraceFlags.SAMPLED if self._sampled else TraceFlags.DEFAULT)
        span = tracing.ids.generate_span_id()
        self._context = SpanContext(trace, span, False, flags, decided.trace_state)
        self._innermost = self._context
        known = {"gen_ai.operation.name": operation, "gen_ai.provider.name": "everloop"}
        self._call = Noted(operation, SpanKind.SERVER, known | _address(f"//{request.host}") if self._sampled else {})
        self._code: str | None = None
        self.id = format_trace_id(trace) if given.is_valid or self._sampled else None
        """The trace id, as the call's record has it; None where nobody will ever see that trace."""

    @property
    def headers(self) -> str:
        """The trace context for the engine, as lines of a request's head."""
        carrier: dict[str, str] = {}
        PROPAGATOR.inject(carrier, set_span_in_context(NonRecordingSpan(self._innermost), Context()))
        return "".join([f"{name}: {value}\r\n" for name, value in carrier.items()])

    @contextmanager
    def asking(self, url: str, model: str) -> Iterator[Callable[[str], None]]:
        """A span for as long as the engine takes; gives a function that notes what happened by name."""
        if not self._sampled:
            yield _nobody
            return
        noted = Noted("ask engine", SpanKind.CLIENT, {"gen_ai.request.model": model, **_address(url)})
        self._innermost = context = self._child()
        try:
            yield lambda name: noted.events.append(Event(name, timestamp=time.time_ns()))
        except BaseException as error:
            noted.attributes["error.type"] = _kind(error)
            raise
        finally:
            self._innermost = self._context
            self._tracing.ended(noted, self._context, context)

    def captured(self, turn: Turn, ask: Ask, answer: Answer, code: str | None) -> None:
        """Say what the call was, as it is recorded. ``code``: the kind of failure; None: none that has one."""
        self._code = code
        if not self._sampled:
            return
        self._call.name = f"{self._operation} {ask.policy}"
        prompt, completion = answer.counted
        usage = answer.usage or {}
        self._call.attributes |= {
            "gen_ai.request.model": ask.model,
            "gen_ai.request.temperature": ask.sampling["temperature"],
            "gen_ai.request.max_tokens": ask.sampling["max_tokens"],
            "gen_ai.request.stream": ask.stream,
            "gen_ai.response.id": turn.response,
            "gen_ai.response.model": turn.model,
            "gen_ai.response.finish_reasons": [choice.finish_reason or "" for choice in answer.choices],
            "gen_ai.usage.input_tokens": usage.get("prompt_tokens", prompt),
            "gen_ai.usage.output_tokens": usage.get("completion_tokens", completion),
            "everloop.episode": turn.episode,
            "everloop.call": turn.call,
            "everloop.policy_version": turn.served,
            "everloop.arm": turn.assignment.arm,
        }

    def storing(self, stored: asyncio.Future[None]) -> None:
        """A span until that promise is kept."""
        if not self._sampled:
            return
        noted = Noted("make durable", SpanKind.INTERNAL, {})

        def ended(stored: asyncio.Future[None]) -> None:
            error = asyncio.CancelledError() if stored.cancelled() else stored.exception()
            if error is not None:
                noted.attributes["error.type"] = _kind(error)
            self._tracing.ended(noted, self._context, self._child())

        stored.add_done_callback(ended)

    def answered(self, status: int) -> None:
        self._call.attributes["http.response.status_code"] = status
        if status >= 500:
            self._call.attributes["error.type"] = self._code or str(status)

    def failed(self, error: BaseException) -> None:
        its = self._call.attributes
        its["error.type"] = _kind(error)
        if isinstance(error, Refused):
            its["http.response.status_code"] = error.status
            self._call.excused = error.status < 500  # the agent's own fault is no failure of the gateway

    def end(self) -> None:
        if self._sampled:
            self._tracing.ended(self._call, self._parent, self._context)

    def _child(self) -> SpanContext:
        own = self._context
        return SpanContext(own.trace_id, self._tracing.ids.generate_span_id(), False, own.trace_flags, own.trace_state)


class TracedServing:
    """What answers, with a span around every question."""

    def __init__(self, serving: Answering) -> None:
        self._serving = serving
        self._url = getattr(serving, "url", "")

    async def complete(self, route: Route, body: dict[str, Any]) -> dict[str, Any]:
        with self._asking(body):
            return await self._serving.complete(route, body)

    async def stream(self, route: Route, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        with self._asking(body) as note:
            async with aclosing(self._serving.stream(route, body)) as chunks:  # type: ignore[type-var]
                first = True
                async for chunk in chunks:
                    if first:
                        note("first token")
                        first = False
                    yield chunk

    def _asking(self, body: dict[str, Any]) -> AbstractContextManager[Callable[[str], None]]:
        trace = CURRENT.get()
        return nullcontext(_nobody) if trace is None else trace.asking(self._url, body["model"])

    async def close(self) -> None:
        await self._serving.close()


class CountedExporter(SpanExporter):
    """An exporter whose outcomes are counted. ``given`` is how many spans it was given in all."""

    def __init__(self, exporter: SpanExporter, sent: Counter) -> None:
        self._exporter = exporter
        self._exported = sent.labels("exported")
        self._failed = sent.labels("failed")
        self.given = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.given += len(spans)
        result = self._exporter.export(spans)
        (self._exported if result is SpanExportResult.SUCCESS else self._failed).inc(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class SpanQueue(BatchSpanProcessor):
    """The SDK's queue, which is never asked to take more than it holds: it would drop without a count."""

    def __init__(self, exporter: CountedExporter, sent: Counter) -> None:
        super().__init__(exporter, max_queue_size=QUEUE)
        self._given_by = exporter
        self._taken = 0
        self._dropped = sent.labels("dropped")

    def on_end(self, span: ReadableSpan) -> None:
        if self._taken - self._given_by.given >= QUEUE:
            self._dropped.inc()
            return
        self._taken += 1
        super().on_end(span)


def _nobody(name: str) -> None:
    """Nobody wants to know."""


def _kind(error: BaseException) -> str:
    """What went wrong, as ``error.type`` has it: few words, the same each time."""
    if isinstance(error, Refused | ServingError):
        return error.code or str(error.status)
    if isinstance(error, LogError):
        return "log_unavailable"
    if isinstance(error, asyncio.CancelledError | ConnectionError | GeneratorExit):
        return "client_left"
    return type(error).__name__


def _address(url: str) -> dict[str, str | int]:
    """Host and port of a URL, as far as it names them."""
    try:
        parts = urlsplit(url)
        found = {"server.address": parts.hostname, "server.port": parts.port}
    except ValueError:
        return {}
    return {name: value for name, value in found.items() if value}
