"""Retried requests get the answer of the first: no second turn, no second generation.

A retry is a request with an ``Idempotency-Key`` that was seen before, or the same body again with
``x-stainless-retry-count`` above 0 (what the official clients send).

::

    first ──answering()──▶ Entry ──events durable──▶ settled: Finished ──┬──▶ kept a while, for retries to come
                                                                          └──▶ wakes retries that wait in earlier()
          ──failed, or its client left──▶ settled: None ──▶ the first retry that wakes begins anew

After a restart the memory is empty: :class:`Recovered` answers from the newest events of the log, so that a turn
that was durable when the gateway died, and never heard of, is not made twice.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson
from aiohttp import web
from everloop.errors import ContractError
from everloop.event import Call, Event
from everloop.ids import Ids
from everloop.log.base import Log
from everloop.serving.base import Route
from everloop.topics import EVENTS
from everloop.wire import BlobStore, decode

from services.gateway.ask import Ask
from services.gateway.chunks import spelled
from services.gateway.door import header
from services.gateway.refusals import Refused
from services.gateway.response_object import from_chat

logger = logging.getLogger(__name__)
KEPT_SECONDS = 120.0
KEPT_BYTES = 67_108_864
OVERHEAD = 1200  # bytes of an answer that is kept, beyond its body: measured
TAIL = 1000  # newest events of each partition that are looked at after a start
RETRY_COUNT = "x-stainless-retry-count"
IDEMPOTENCY_KEY = "Idempotency-Key"


class Finished(NamedTuple):
    """An answer as it was sent, byte for byte. ``headers`` are the gateway's own words: nobody else writes in them."""

    body: bytes
    content_type: str
    headers: dict[str, str]


class Mark(NamedTuple):
    """What makes two requests the same. ``retry``: the client says that this one may be a repeat."""

    name: str
    body: bytes
    retry: bool


class Entry:
    """The answer to one request: under way, then settled. ``settled`` is never cancelled by who waits for it."""

    __slots__ = ("at", "body", "promised", "settled", "size")

    def __init__(self, body: bytes, settled: asyncio.Future[Finished | None]) -> None:
        self.body = body
        self.settled = settled
        self.promised = False
        self.size = 0
        self.at = 0.0


Promise = Callable[[Finished, "asyncio.Future[None]"], None]


class Answering:
    """Gives the promise of one answer. Without a promise by the end of the context, the request failed.

    A promise is kept once the answer's events are durable, even if its client has left by then.
    """

    __slots__ = ("_entry", "_name", "_retries")

    def __init__(self, retries: Retries, name: str, entry: Entry) -> None:
        self._retries = retries
        self._name = name
        self._entry = entry

    def __enter__(self) -> Promise:
        return self._promise

    def __exit__(self, *error: object) -> None:
        if not self._entry.promised:
            self._retries.over(self._name, self._entry, None)

    def _promise(self, finished: Finished, stored: asyncio.Future[None]) -> None:
        self._entry.promised = True
        stored.add_done_callback(
            lambda stored: self._retries.over(self._name, self._entry, finished if _good(stored) else None)
        )


class Retries:
    """Answers of late, by mark. Used by the event loop alone; what is kept is bounded in bytes and time."""

    def __init__(self, secret: bytes, kept_bytes: int = KEPT_BYTES) -> None:
        self._secret = hashlib.sha256(b"request marks" + secret).digest()
        self._under_way: dict[str, Entry] = {}
        self._kept: OrderedDict[str, Entry] = OrderedDict()
        self._size = 0
        self._limit = kept_bytes

    def mark(self, request: web.Request, tenant: str, raw: bytes) -> Mark:
        """Keyed with the installation's secret: what is stored beside an event says nothing of its words."""
        headers = request.headers
        key = header(request, IDEMPOTENCY_KEY)
        count = headers.get(RETRY_COUNT, "0")
        body = hashlib.blake2b(raw, digest_size=16).digest()
        who = (headers.get("X-Everloop-Episode", ""), headers.get("X-Everloop-Subject", ""))
        seen = "\0".join((tenant, request.path, *who, headers.get("X-Everloop-Seq", ""), key or ""))
        what = seen.encode("utf-8", "surrogatepass") + (b"" if key else body)
        name = hashlib.blake2b(what, digest_size=16, key=self._secret).hexdigest()
        return Mark(name, body, key is not None or (count.isdecimal() and count.strip("0") != ""))

    async def earlier(self, mark: Mark) -> Finished | None:
        """The answer of the request that this one repeats, waited for if need be; None: this one is the first.

        Raises Refused (422) where an Idempotency-Key comes again with another body.
        """
        while mark.retry and (entry := self._under_way.get(mark.name) or self._recent(mark.name)) is not None:
            if entry.body != mark.body:
                raise Refused(
                    422,
                    f"this {IDEMPOTENCY_KEY} was used with another body; use a new key for a new request",
                    "idempotency_key_reused",
                )
            finished = await asyncio.shield(entry.settled)
            if finished is not None:
                return finished
        return None

    def answering(self, mark: Mark) -> Answering:
        """The time in which a request is answered, as a context: repeats of it wait."""
        entry = self._under_way[mark.name] = Entry(mark.body, asyncio.get_running_loop().create_future())
        return Answering(self, mark.name, entry)

    def over(self, name: str, entry: Entry, finished: Finished | None) -> None:
        """Settle an entry: its answer stands, or None, and whoever waits begins anew."""
        if self._under_way.get(name) is entry:
            del self._under_way[name]
        if finished is not None:
            # orjson's bytes hold on to 8 KB however few they are
            finished = finished._replace(body=bytes(memoryview(finished.body)))
            self._keep(name, entry, len(finished.body) + OVERHEAD)
        entry.settled.set_result(finished)

    def _recent(self, name: str) -> Entry | None:
        entry = self._kept.get(name)
        return entry if entry is not None and time.monotonic() - entry.at <= KEPT_SECONDS else None

    def _keep(self, name: str, entry: Entry, size: int) -> None:
        entry.at, entry.size = time.monotonic(), size
        before = self._kept.pop(name, None)
        self._kept[name] = entry
        self._size += size - (before.size if before is not None else 0)
        while self._size > self._limit:
            self._size -= self._kept.popitem(last=False)[1].size


def _good(stored: asyncio.Future[None]) -> bool:
    return not stored.cancelled() and stored.exception() is None


class Recovered:
    """Answers that were durable before this gateway started, from the log's newest events, each given once."""

    def __init__(self, ids: Ids, blobs: BlobStore) -> None:
        self._ids = ids
        self._blobs = blobs
        self._values: dict[str, list[bytes]] = {}

    def read(self, log: Log) -> None:
        """Look at the newest events of each partition. Before the gateway is ready; only what answers a request."""
        for partition, end in enumerate(log.end_offsets(EVENTS.name)):
            offset = max(0, end - TAIL)
            while records := log.read(EVENTS.name, partition, offset):
                offset = records[-1].offset + 1
                for record in records:
                    mark = record.headers.get("request")
                    if mark and record.value is not None:
                        self._values.setdefault(mark, []).append(record.value)

    def answer(self, mark: Mark, ask: Ask) -> Finished | None:
        """The answer to the request of this mark; None: there is none, or it failed."""
        values = self._values.pop(mark.name, None) if mark.retry else None
        if values is None:
            return None
        try:
            events = [decode(Event, value, self._blobs) for value in values]
        except ContractError as error:
            logger.error("an answer cannot be recovered for its retry, which is answered anew: %s", error)
            return None
        answered = {e.payload.choice: e for e in events if isinstance(e.payload, Call) and e.payload.error is None}
        if 0 not in answered:
            return None
        return _again(self._ids, [answered[at] for at in sorted(answered)], ask)


def _again(ids: Ids, events: list[Event], ask: Ask) -> Finished:
    first = events[0]
    call = first.payload
    assert isinstance(call, Call)
    raw = base64.b32decode(call.id.removeprefix("call_").upper() + "===")
    response = ids.response(first.tenant, first.episode, raw, ask.prefix)
    headers = {
        "X-Request-Id": response,
        "X-Everloop-Episode": first.episode,
        "X-Everloop-Call": call.id,
        "X-Everloop-Policy-Version": call.policy_version,
        "X-Everloop-Arm": call.arm,
    }
    calls = [event.payload for event in events if isinstance(event.payload, Call)]
    fields = {"id": response, "created": int(first.time), "model": ask.model}
    if ask.stream:
        return Finished(_as_stream(ask, fields, calls), "text/event-stream", headers)
    whole = _as_whole(ask.route, fields, calls)
    return Finished(orjson.dumps(whole if ask.echo is None else from_chat(ask, whole)), "application/json", headers)


def _usage(calls: list[Call]) -> dict[str, int] | None:
    """None: nobody counted, as of a provider's answers."""
    counted = [call.tokens for call in calls if call.tokens is not None]
    if len(counted) < len(calls):
        return None
    prompt = len(counted[0].prompt) if counted else 0
    completion = sum(len(tokens.completion) for tokens in counted)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _said(route: Route, call: Call, part: str) -> dict[str, Any]:
    """A choice in the route's own form: ``part`` is "message" or "delta"."""
    if route == "completions":
        return {"index": call.choice, "text": call.output.text, "logprobs": None, "finish_reason": call.finish_reason}
    message = call.output.model_dump(exclude_none=True) | {"content": call.output.content}
    return {"index": call.choice, part: message, "logprobs": None, "finish_reason": call.finish_reason}


def _as_whole(route: Route, fields: dict[str, Any], calls: list[Call]) -> dict[str, Any]:
    kind = "chat.completion" if route == "chat/completions" else "text_completion"
    choices = [_said(route, call, "message") for call in calls]
    return {**fields, "object": kind, "choices": choices, "usage": _usage(calls)}


def _as_stream(ask: Ask, fields: dict[str, Any], calls: list[Call]) -> bytes:
    kind = "chat.completion.chunk" if ask.route == "chat/completions" else "text_completion"
    chunks: list[dict[str, Any]] = []
    for call in calls:
        choice = _said(ask.route, call, "delta")
        for at, part in enumerate(choice.get("delta", {}).get("tool_calls") or ()):
            part["index"] = at
        chunks.append({**fields, "object": kind, "choices": [choice]})
    form = spelled(ask, fields["id"])
    said = [form.chunk(chunk) for chunk in chunks]
    return b"".join(said) + form.last({**fields, "object": kind, "choices": [], "usage": _usage(calls)})
