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
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from everloop.errors import LogError, ServingError
from everloop.serving.base import Route, Serving
from everloop.telemetry_config import TelemetryConfig
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    INVALID_SPAN,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
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
OPERATIONS = {"completions": "text_completion"}  # every other route is a chat
PROPAGATOR = TraceContextTextMapPropagator()
Handler = Callable[[web.Request], Awaitable[Answered]]


class Tracing:
    """Makes the traces of one gateway. ``sent`` counts spans by ``outcome``: exported, failed or dropped."""

    def __init__(self, config: TelemetryConfig, sent: Counter) -> None:
        assert config.otlp_endpoint is not None
        self._exporter = CountedExporter(OTLPSpanExporter(f"{config.otlp_endpoint.rstrip('/')}/v1/traces"), sent)
        self._queue = SpanQueue(self._exporter, sent)
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.sample)),
            resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", NAME)}),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(self._queue)
        self._tracer = provider.get_tracer(SCOPE)
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # it speaks at every try; what counts is counted

    def traced(self, path: str, handler: Handler) -> Handler:
        """A handler of calls that leaves a trace of each."""
        operation = OPERATIONS.get(path, "chat")

        async def answered(request: web.Request) -> Answered:
            trace = CallTrace(self._tracer, request, operation)
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

    def close(self) -> None:
        """Send what waits, for two seconds at most. Blocks."""
        ending = threading.Thread(target=self._queue.shutdown, daemon=True)
        ending.start()
        ending.join(LAST)
        if ending.is_alive():
            self._exporter.shutdown()  # wakes it from waiting to try again


class CallTrace:
    """The spans of one call. Used by the event loop alone."""

    def __init__(self, tracer: Tracer, request: web.Request, operation: str) -> None:
        context = PROPAGATOR.extract(request.headers, Context())
        parent = get_current_span(context).get_span_context()
        self._tracer = tracer
        self._operation = operation
        self._span = tracer.start_span(operation, context, SpanKind.SERVER)
        self._innermost = self._span
        self._code: str | None = None
        own = self._span.get_span_context()
        self.id = format_trace_id(own.trace_id) if parent.is_valid or own.trace_flags.sampled else None
        """The trace id, as the call's record has it; None where nobody will ever see that trace."""
        if self._span.is_recording():
            self._span.set_attributes(
                {
                    "gen_ai.operation.name": operation,
                    "gen_ai.provider.name": "everloop",
                    **_address(f"//{request.host}"),
                }
            )

    @property
    def headers(self) -> str:
        """The trace context for the engine, as lines of a request's head."""
        carrier: dict[str, str] = {}
        PROPAGATOR.inject(carrier, set_span_in_context(self._innermost, Context()))
        return "".join([f"{name}: {value}\r\n" for name, value in carrier.items()])

    @contextmanager
    def asking(self, url: str, model: str) -> Iterator[Span]:
        """A span for as long as the engine takes."""
        span = self._child("ask engine", SpanKind.CLIENT)
        if span.is_recording():
            span.set_attributes({"gen_ai.request.model": model, **_address(url)})
        self._innermost = span
        try:
            yield span
        except BaseException as error:
            _fail(span, _kind(error))
            raise
        finally:
            self._innermost = self._span
            span.end()

    def captured(self, turn: Turn, ask: Ask, answer: Answer, code: str | None) -> None:
        """Say what the call was, as it is recorded. ``code``: the kind of failure; None: none that has one."""
        self._code = code
        if not self._span.is_recording():
            return
        self._span.update_name(f"{self._operation} {ask.policy}")
        prompt, completion = answer.counted
        usage = answer.usage or {}
        self._span.set_attributes(
            {
                "gen_ai.request.model": ask.model,
                "gen_ai.request.temperature": ask.sampling["temperature"],
                "gen_ai.request.max_tokens": ask.sampling["max_tokens"],
                "gen_ai.request.stream": ask.stream,
                "gen_ai.response.id": turn.response,
                "gen_ai.response.model": turn.base,
                "gen_ai.response.finish_reasons": [choice.finish_reason or "" for choice in answer.choices],
                "gen_ai.usage.input_tokens": usage.get("prompt_tokens", prompt),
                "gen_ai.usage.output_tokens": usage.get("completion_tokens", completion),
                "everloop.episode": turn.episode,
                "everloop.call": turn.call,
                "everloop.policy_version": turn.served,
                "everloop.arm": turn.assignment.arm,
            }
        )

    def storing(self, stored: asyncio.Future[None]) -> None:
        """A span until that promise is kept."""
        span = self._child("make durable", SpanKind.INTERNAL)

        def ended(stored: asyncio.Future[None]) -> None:
            error = asyncio.CancelledError() if stored.cancelled() else stored.exception()
            if error is not None:
                _fail(span, _kind(error))
            span.end()

        stored.add_done_callback(ended)

    def answered(self, status: int) -> None:
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            _fail(self._span, self._code or str(status))

    def failed(self, error: BaseException) -> None:
        if isinstance(error, Refused) and error.status < 500:  # the agent's own fault is no failure of the gateway
            self._span.set_attributes({"http.response.status_code": error.status, "error.type": _kind(error)})
        else:
            _fail(self._span, _kind(error))

    def end(self) -> None:
        self._span.end()

    def _child(self, name: str, kind: SpanKind) -> Span:
        return self._tracer.start_span(name, set_span_in_context(self._span, Context()), kind)


class TracedServing:
    """The serving port, with a span around every question. Everything else is the engine's own."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._url = getattr(serving, "url", "")

    async def complete(self, route: Route, body: dict[str, Any]) -> dict[str, Any]:
        with self._asking(body):
            return await self._serving.complete(route, body)

    async def stream(self, route: Route, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        with self._asking(body) as span:
            async with aclosing(self._serving.stream(route, body)) as chunks:  # type: ignore[type-var]
                first = True
                async for chunk in chunks:
                    if first:
                        span.add_event("first token")
                        first = False
                    yield chunk

    def _asking(self, body: dict[str, Any]) -> AbstractContextManager[Span]:
        trace = CURRENT.get()
        return nullcontext(INVALID_SPAN) if trace is None else trace.asking(self._url, body["model"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._serving, name)


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


def _fail(span: Span, kind: str) -> None:
    if span.is_recording():
        span.set_attribute("error.type", kind)
        span.set_status(Status(StatusCode.ERROR))


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
