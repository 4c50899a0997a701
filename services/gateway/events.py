"""Events over HTTP: what an agent's SDK saw for itself (tool results, ends, feedback, calls made elsewhere).

The tenant comes from the key. A call made elsewhere says nothing about a release here: arm, release and, unless a
researcher sends it, token ids are not taken from outside.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from aiohttp import web
from everloop.event import ELSEWHERE, PROVIDER, Event
from pydantic import ValidationError

from services.gateway.ask import parse
from services.gateway.desk import Desk, batch, unfit
from services.gateway.feedback import checked, refuse_source
from services.gateway.keys import Key
from services.gateway.sealing import Fields, Unsealed
from services.gateway.turns import LATEST, named_episode

ACCEPTED = frozenset({"id", "episode", "policy", "subject", "seq", "time", "payload"})
KINDS = ("call", "tool", "feedback", "end")
AT_ONCE = 50  # events checked before others get the loop


class EventDesk(Desk):
    """Answers ``/v1/events``. Used by the event loop alone."""

    __slots__ = ()

    async def take(self, request: web.Request) -> web.Response:
        key = self.door.key(request, "events")
        raw = await self.door.body(request)
        body = parse(raw)
        if "events" not in body:
            raise unfit("'events' is missing: send {\"events\": [...]}", "events")
        events = []
        items = batch(body, "events")
        self.door.limits.charge(key.tenant, len(items) - 1)
        for at, item in enumerate(items):
            events.append(self._event(key, item, at))
            if at % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
        await self.capture.stored(await self.capture.redacted([Unsealed(event) for event in events], len(raw)))
        for event in events:
            if event["payload"]["kind"] == "feedback":
                self.metrics.feedback.labels(event["payload"]["feedback"]["kind"]).inc()
        return web.Response(status=202, body=b'{"accepted":%d}' % len(events), content_type="application/json")

    def _event(self, key: Key, item: dict[str, Any], at: int) -> Fields:
        where = f"events[{at}]"
        if unknown := sorted(set(item) - ACCEPTED):
            raise unfit(f"{where} has unknown fields: {', '.join(unknown)[:200]}; leave them out", unknown[0])
        for name in ("id", "episode"):
            _name(where, name, item.get(name), needed=True)
        for name in ("policy", "subject"):
            _name(where, name, item.get(name), needed=False)
        episode = named_episode(self.ids, key.tenant, item["episode"])
        subject = item.get("subject")
        fields = {
            "id": item["id"],
            "tenant": key.tenant,
            "policy": self._policy_of(key, item, episode, where),
            "episode": episode,
            "subject": self.ids.pseudonym(key.tenant, "subject", subject) if subject else None,
            "seq": _seq(where, item.get("seq")),
            "time": _time(where, item.get("time")),
            "payload": self._payload(key, item.get("payload"), where),
        }
        try:
            return Event.model_validate(fields).model_dump()
        except ValidationError as error:
            problem = error.errors()[0]
            raise unfit(f"{where}.{'.'.join(map(str, problem['loc']))}: {problem['msg']}", "payload") from None

    def _policy_of(self, key: Key, item: dict[str, Any], episode: str, where: str) -> str:
        """A call is always some policy's: where nobody says whose, the tenant's only one."""
        payload = item.get("payload")
        if not isinstance(payload, dict) or payload.get("kind") != "call":
            return self.policy(key.tenant, item.get("policy"), episode, where)
        policies = list(self.config.tenants[key.tenant].policies)
        policy = self.policy(key.tenant, item.get("policy"), episode, where, policies[0] if len(policies) == 1 else "")
        if not policy:
            raise unfit(f"{where}: say which policy's call it is ('policy'); you have: {', '.join(policies)}", "policy")
        return policy

    def _payload(self, key: Key, payload: Any, where: str) -> dict[str, Any]:
        if not isinstance(payload, dict) or payload.get("kind") not in KINDS:
            raise unfit(f"{where}.payload must be an object whose 'kind' is one of: {', '.join(KINDS)}", "payload")
        if payload["kind"] == "feedback":
            said = payload.get("feedback")
            if not isinstance(said, dict):
                raise unfit(f"{where}.payload.feedback must be an object", "payload")
            refuse_source(key, said, f"{where}.payload.feedback")
            feedback = checked(self.ids, key.tenant, said, f"{where}.payload.feedback", time.time())
            return {"kind": "feedback", "feedback": feedback.model_dump()}
        if payload["kind"] == "call":
            ours = {"arm": "live", "release": None, "probability": 1.0}
            knows = key.may("pin")  # a researcher may bring in what a version of ours answered, with its tokens
            said = payload.get("policy_version")
            ours["policy_version"] = said if said and (knows or said == PROVIDER) else ELSEWHERE
            return {**payload, **ours, "tokens": payload.get("tokens") if knows else None}
        return payload


def _name(where: str, name: str, value: Any, *, needed: bool) -> None:
    if value is None and not needed:
        return
    if not isinstance(value, str) or not 0 < len(value) <= 256 or not value.isprintable():
        raise unfit(f"{where}.{name} must be a printable text of 1 to 256 characters", name)


def _seq(where: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LATEST):
        raise unfit(f"{where}.seq must be a whole number from 0 up, or left out", "seq")
    return value


def _time(where: str, value: Any) -> float:
    if value is None:
        return time.time()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise unfit(f"{where}.time must be a finite number of seconds since 1970", "time")
    return float(value)
