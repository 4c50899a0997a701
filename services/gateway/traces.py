"""Traces that agents send (``/v1/traces``): spans of model calls and tools become events, all others are let go.

::

    request ─▶ Door ─▶ otlp.read ─▶ spans.kind ──nothing of an episode's──▶ dropped
                                        │ a call, a tool
                                   what no event can be made of ─▶ rejected, told in ``partial_success``
                                        │
                                   Capture.stored ─▶ durable ─▶ 200

A trace is an episode, called by its conversation, its session, or else the trace's id; a span is an event, by its own
id, so what is sent twice is there once. Events are numbered by when their span began: batches may come in any order.
A call that a gateway here answered is recorded already: its span is dropped, and says whose episode its tools are of.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from aiohttp import web
from everloop.errors import LogError
from everloop.event import ELSEWHERE, Event
from everloop.ids import RESPONSE
from pydantic import ValidationError

from services.gateway import otlp, spans
from services.gateway.capture import choice_call, event_fields
from services.gateway.desk import Desk
from services.gateway.events import AT_ONCE
from services.gateway.otlp import SpanRead
from services.gateway.refusals import Refused, from_log
from services.gateway.sealing import Fields, Unsealed
from services.gateway.spans import Unreadable
from services.gateway.turns import LATEST, named_episode

logger = logging.getLogger(__name__)
TOGETHER = 500  # events of one append: others have their turn in between
UNRECORDED = RESPONSE + "unrecorded-"  # begins the ids of answers that nothing may be kept of
EPISODES = ("gen_ai.conversation.id", "session.id", "traceloop.association.properties.session_id")
SUBJECTS = ("user.id", "enduser.id", "gen_ai.user", "llm.user", "traceloop.association.properties.user_id")
SHOWN = 3  # reasons in an answer


class Of(NamedTuple):
    """What a trace's spans say together: a tool's span may lack what its call's has. Empty: none says it.

    ``own`` is the episode of an answer that was given here, ``named`` what the agent calls its episode.
    """

    own: str = ""
    named: str = ""
    subject: str = ""


class TraceDesk(Desk):
    """Answers ``/v1/traces``. Used by the event loop alone."""

    __slots__ = ()

    async def take(self, request: web.Request) -> web.Response:
        form = otlp.JSON if request.content_type == otlp.JSON else otlp.PROTOBUF
        try:
            return await self._take(request)
        except Refused as refused:
            return otlp.refusal(form, refused)
        except LogError as error:
            return otlp.refusal(form, from_log(error))

    async def _take(self, request: web.Request) -> web.Response:
        key = self.door.key(request, "events")
        form = otlp.form(request)
        raw = await self.door.body(request)
        given = await asyncio.to_thread(otlp.read, raw, form)
        told = {span.trace: Of() for span in given}
        for span in given:
            told[span.trace] = self._told(key.tenant, span, told[span.trace])
        events: list[Unsealed] = []
        taken, reasons = 0, Counter[str]()
        for at, span in enumerate(given):
            try:
                made = [Unsealed(event) for event in self._events(key.tenant, span, told[span.trace])]
            except (Unreadable, ValidationError, Refused) as error:
                reasons[_reason(error)] += 1
            else:
                events += made
                taken += bool(made)
            if at % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
        self.door.limits.charge(key.tenant, max(0, len(events) - 1))
        for at in range(0, len(events), TOGETHER):
            part = events[at : at + TOGETHER]
            await self.capture.stored(await self.capture.redacted(part, len(raw)))
        return self._answer(form, len(given), taken, reasons)

    def _answer(self, form: str, given: int, taken: int, reasons: Counter[str]) -> web.Response:
        rejected = reasons.total()
        counts = {"taken": taken, "rejected": rejected, "dropped": given - taken - rejected}
        for outcome, count in counts.items():
            self.metrics.spans_received.labels(outcome).inc(count)
        why = "; ".join(f"{count} spans: {reason}" for reason, count in reasons.most_common(SHOWN))
        if why:
            logger.info("rejected of %d spans: %s", given, why)
        return otlp.answer(form, rejected, why)

    def _told(self, tenant: str, span: SpanRead, of: Of) -> Of:
        """What is known of its trace with this span; the first that says something is believed."""
        its = span.attributes
        response = spans.response_of(span) if spans.kind(span) == "call" else ""
        return Of(
            of.own or self._episode_of(tenant, response),
            of.named or _first(its, EPISODES),
            of.subject or _first(its, SUBJECTS),
        )

    def _episode_of(self, tenant: str, response: str) -> str:
        """The episode of an answer that a gateway here gave; empty for any other's."""
        try:
            return self.ids.parse_response(tenant, response)[0] if response.startswith(RESPONSE) else ""
        except ValueError:
            return ""

    def _events(self, tenant: str, span: SpanRead, of: Of) -> Iterator[Fields]:
        """The events of a span: none, a tool's, or one each answer to a call.

        Raises Unreadable, ValidationError or Refused where no event can be made of it.
        """
        kind = spans.kind(span)
        if kind is None:
            return
        if kind == "call":
            response = spans.response_of(span)
            if response.startswith(UNRECORDED) or self._episode_of(tenant, response):
                return
        if not _is_id(span.trace, 32) or not _is_id(span.id, 16):
            raise Unreadable("its ids are none: a trace's has 16 bytes, a span's 8, and not all are 0")
        policy = self._policy_of(tenant, span, needed=kind == "call")
        name = of.own or _first(span.attributes, EPISODES) or of.named or span.trace
        episode = named_episode(self.ids, tenant, name)
        payloads = _calls(span) if kind == "call" else [spans.tool(span)]
        subject = _first(span.attributes, SUBJECTS) or of.subject
        for at, payload in enumerate(payloads):
            fields = event_fields(
                tenant,
                policy,
                episode,
                f"ev_{span.trace}{span.id}" + (f"_{at}" if at else ""),
                span.start / 1e9 if span.start else time.time(),
                payload,
                subject=self.ids.pseudonym(tenant, "subject", subject) if subject else None,
                seq=min(span.start // 1000, LATEST) if span.start else None,
            )
            yield Event.model_validate(fields).model_dump()

    def _policy_of(self, tenant: str, span: SpanRead, *, needed: bool) -> str:
        """The policy that a span names, its service's where one is called so, else the tenant's only one."""
        policies = self.config.tenants[tenant].policies
        named = span.attributes.get("everloop.policy", span.resource.get("everloop.policy"))
        if named is not None:
            return self.policy(tenant, named, "", "everloop.policy")
        service = span.resource.get("service.name")
        if isinstance(service, str) and service in policies:
            return service
        if len(policies) == 1:
            return next(iter(policies))
        if needed:
            raise Unreadable(
                "nothing says which policy's call it is: set the resource's attribute everloop.policy "
                f"(OTEL_RESOURCE_ATTRIBUTES=everloop.policy=<name>); you have: {', '.join(policies)}"
            )
        return ""


def _calls(span: SpanRead) -> list[Fields]:
    """Payloads of a span's call, one each answer: made elsewhere, so nothing of a release here is in them."""
    call = spans.call(span)
    return [
        {
            "kind": "call",
            "id": choice_call(span.id, at),
            "messages": call.messages,
            "output": output.message,
            "tools": call.tools,
            "finish_reason": output.finish_reason,
            "choice": at,
            "policy_version": ELSEWHERE,
            "model": call.model,
            "sampling": call.sampling,
            "latency": max(0, span.end - span.start) / 1e9,
            "error": call.error,
            "error_code": call.error_code,
            "trace": span.trace,
        }
        for at, output in enumerate(call.outputs)
    ]


def _first(its: dict[str, Any], names: Sequence[str]) -> str:
    """The first that is a name an episode or a person can have: printable, not too long."""
    found = (its.get(name) for name in names)
    return next((v for v in found if isinstance(v, str) and 0 < len(v) <= 256 and v.isprintable()), "")


def _is_id(digits: str, length: int) -> bool:
    return len(digits) == length and set(digits) <= set("0123456789abcdef") and digits.strip("0") != ""


def _reason(error: Exception) -> str:
    """Why an event could not be made, in words that are alike for like spans."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(str(part) for part in problem['loc'] if not isinstance(part, int))}: {problem['msg']}"
    return error.message if isinstance(error, Refused) else str(error)
