"""OTLP over HTTP: a request's spans as plain values, and answers in the form that its sender reads.

Protobuf and JSON are the same message. In OTLP's JSON ids are hexadecimal, where protobuf's own JSON has base 64:
what was read as base 64 is written so again, and is the digits that were sent.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import orjson
from aiohttp import web
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import DecodeError, Message
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from services.gateway.refusals import Refused

JSON = "application/json"
PROTOBUF = "application/x-protobuf"
MOST = 20_000  # spans of one request
MOST_OBJECTS = 200_000  # of JSON: a span with its attributes is a few dozen
MOST_ATTRIBUTES = 4096  # of one span that are read
ERROR = trace_pb2.Status.STATUS_CODE_ERROR
DETAILS = "gen_ai.client.inference.operation.details"  # an event that has what the span's attributes lack


@dataclass(frozen=True, slots=True)
class SpanRead:
    """One span. Ids are hexadecimal, ``parent`` empty at a trace's root; times in ns since 1970, 0 where unknown.

    ``failed`` is what its status says of an error; None: it says none.
    """

    trace: str
    id: str
    parent: str
    name: str
    scope: str
    start: int
    end: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    failed: str | None


def form(request: web.Request) -> str:
    """JSON or PROTOBUF. Raises Refused (415) for anything else."""
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("identity", "gzip", "deflate"):
        raise Refused(415, f"Content-Encoding {encoding[:20]!r} is not read here: use gzip or none", "bad_encoding")
    if request.content_type not in (JSON, PROTOBUF):
        raise Refused(415, f"spans come as {PROTOBUF} or {JSON}, not {request.content_type[:64]!r}", "bad_content_type")
    return request.content_type


def read(raw: bytes, form: str) -> list[SpanRead]:
    """The spans of an export request. Raises Refused: 400 where it is none, 413 where there are too many."""
    if form == JSON and raw.count(b"{") > MOST_OBJECTS:
        raise _too_many(f"more than {MOST_OBJECTS:,} JSON objects")
    request = _parsed(raw, form)
    for what, count in _counts(request):
        if count > MOST:
            raise _too_many(f"{count:,} {what}")
    return list(_spans(request, form == JSON))


def answer(form: str, rejected: int, why: str) -> web.Response:
    """The answer to a request that was taken, but for ``rejected`` spans."""
    partial = ExportTracePartialSuccess(rejected_spans=rejected, error_message=why) if why else None
    return _response(200, ExportTraceServiceResponse(partial_success=partial), form, {})


def refusal(form: str, refused: Refused) -> web.Response:
    """A refusal as OTLP has it: a Status in the request's own form."""
    return _response(refused.status, Status(code=refused.status, message=refused.message), form, refused.headers)


def _response(status: int, message: Message, form: str, headers: dict[str, str]) -> web.Response:
    body = orjson.dumps(MessageToDict(message)) if form == JSON else message.SerializeToString()
    return web.Response(status=status, body=body, content_type=form, headers=headers)


def _counts(request: ExportTraceServiceRequest) -> Iterator[tuple[str, int]]:
    """How many there are of what is gone through one by one; each is looked at only where those before are few."""
    yield "resources", len(request.resource_spans)
    yield "scopes", sum(len(group.scope_spans) for group in request.resource_spans)
    yield "spans", sum(len(scope.spans) for group in request.resource_spans for scope in group.scope_spans)


def _too_many(what: str) -> Refused:
    return Refused(413, f"{what} in one request; send at most {MOST:,} spans, in smaller batches", "too_many")


def _parsed(raw: bytes, form: str) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    try:
        if form == JSON:
            given = orjson.loads(raw)
            if not isinstance(given, dict):
                raise ParseError("it must be an object")
            _all_objects(given)
            ParseDict(given, request, ignore_unknown_fields=True)
        else:
            request.ParseFromString(raw)
    except (DecodeError, ParseError, orjson.JSONDecodeError, TypeError, AttributeError, RecursionError) as error:
        said = f"the body is no ExportTraceServiceRequest in {form}: {str(error)[:200]}"
        raise Refused(400, said, "invalid_spans") from None
    return request


LISTS = (("resourceSpans", "resource_spans"), ("scopeSpans", "scope_spans"), ("spans",))


def _all_objects(given: dict[str, Any], depth: int = 0) -> None:
    """Raises ParseError where a span, or what holds spans, is no object: protobuf takes a text for an empty one."""
    for name in LISTS[depth]:
        for one in given.get(name) or ():
            if not isinstance(one, dict):
                raise ParseError(f"each of {name!r} must be an object, not {type(one).__name__}")
            if depth + 1 < len(LISTS):
                _all_objects(one, depth + 1)


def _spans(request: ExportTraceServiceRequest, hexadecimal: bool) -> Iterator[SpanRead]:
    for group in request.resource_spans:
        resource = _attributes(group.resource.attributes)
        for scope in group.scope_spans:
            for span in scope.spans:
                yield _span(span, scope.scope.name, resource, hexadecimal)


def _span(span: trace_pb2.Span, scope: str, resource: dict[str, Any], hexadecimal: bool) -> SpanRead:
    attributes = _attributes(span.attributes)
    for event in span.events:
        if event.name == DETAILS:
            attributes |= _attributes(event.attributes)
    return SpanRead(
        trace=_id(span.trace_id, hexadecimal),
        id=_id(span.span_id, hexadecimal),
        parent=_id(span.parent_span_id, hexadecimal),
        name=span.name,
        scope=scope,
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=attributes,
        resource=resource,
        failed=(span.status.message or "error") if span.status.code == ERROR else None,
    )


def _id(raw: bytes, hexadecimal: bool) -> str:
    return base64.b64encode(raw).decode().lower() if hexadecimal else raw.hex()


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in islice(pairs, MOST_ATTRIBUTES)}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    given = getattr(value, kind)
    if kind == "array_value":
        return [_value(item) for item in given.values]
    if kind == "kvlist_value":
        return {pair.key: _value(pair.value) for pair in given.values}
    return given.decode("utf-8", "replace") if isinstance(given, bytes) else given
