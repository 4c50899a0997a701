"""Feedback over HTTP: what people and products say about an answer or an episode, as events of that episode.

Whose episode it is comes from the key or the token; ids that are not that tenant's are unknown to it.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web
from everloop.feedback import Feedback
from everloop.ids import Ids, unique
from pydantic import ValidationError

from services.gateway.ask import parse
from services.gateway.capture import choice_call, event_fields
from services.gateway.desk import Desk, batch, unfit
from services.gateway.door import header
from services.gateway.keys import Key
from services.gateway.refusals import Refused
from services.gateway.retries import IDEMPOTENCY_KEY
from services.gateway.sealing import Unsealed
from services.gateway.tokens import LONGEST, Grant, Tokens
from services.gateway.turns import named_episode

LONGEST_TEXT = 65_536
TARGET = frozenset({"response_id", "episode", "call", "choice", "policy"})
SAID = frozenset({"kind", "value", "text", "chosen", "rejected", "name", "rater", "id", "time", "withdrawn", "source"})
ACCEPTED = TARGET | SAID
DEFAULT_TTL = 86_400


@dataclass(frozen=True, slots=True)
class FeedbackDesk(Desk):
    """Answers ``/v1/feedback`` and ``/v1/feedback/tokens``. Used by the event loop alone."""

    tokens: Tokens

    async def give(self, request: web.Request) -> web.Response:
        rater = self.door.rater(request)
        raw = await self.door.body(request)
        body = parse(raw)
        items = batch(body, "feedback") if "feedback" in body else [body]
        self.door.limits.charge(rater.tenant, len(items) - 1)
        now = time.time()
        told = [self._told(rater, item, at, request, now) for at, item in enumerate(items)]
        await self.capture.stored(await self.capture.redacted([Unsealed(event) for event, _ in told], len(raw)))
        for _, feedback in told:
            self.metrics.feedback.labels(feedback.kind.value).inc()
        return answered(len(told), [feedback.id for _, feedback in told])

    async def grant(self, request: web.Request) -> web.Response:
        """A token that a browser may hold: feedback about one episode, for a while."""
        key = self.door.key(request, "feedback")
        body = parse(await self.door.body(request))
        ttl = body.get("ttl", DEFAULT_TTL)
        if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 1 <= ttl <= LONGEST:
            raise unfit(f"'ttl' must be a number of seconds from 1 to {LONGEST}", "ttl")
        episode, _ = self._target(key.tenant, body)
        expires = int(time.time() + ttl)
        grant = Grant(key.tenant, episode, self.conversations.policy_of(episode), expires)
        return web.json_response({"token": self.tokens.grant(grant), "expires": expires}, dumps=_text)

    def _told(
        self, rater: Key | Grant, item: dict[str, Any], at: int, request: web.Request, now: float
    ) -> tuple[dict[str, Any], Feedback]:
        """One piece of feedback as the fields of its event, checked."""
        if unknown := sorted(set(item) - ACCEPTED):
            raise unfit(f"feedback[{at}] has unknown fields: {', '.join(unknown)[:200]}; leave them out", unknown[0])
        episode, call = self._target(rater.tenant, item)
        if isinstance(rater, Grant) and episode != rater.episode:
            raise Refused(404, "this token is for another episode", "episode_not_found")
        feedback = self._feedback(rater, item, call, at, request, now)
        granted = rater.policy if isinstance(rater, Grant) else ""
        policy = self.policy(rater.tenant, item.get("policy"), episode, f"feedback[{at}]", granted)
        id = same_event(rater.tenant, episode, feedback.id, {**item, "time": item.get("time")})
        payload = {"kind": "feedback", "feedback": feedback.model_dump()}
        return event_fields(rater.tenant, policy, episode, id, feedback.time, payload), feedback

    def _feedback(
        self, rater: Key | Grant, item: dict[str, Any], call: str | None, at: int, request: web.Request, now: float
    ) -> Feedback:
        fields = {name: value for name, value in item.items() if name in SAID and value is not None}
        refuse_source(rater, fields, f"feedback[{at}]")
        if "id" not in fields:
            key = header(request, IDEMPOTENCY_KEY)
            fields["id"] = unique("fb_") if key is None else _named("fb_", rater.tenant, key, str(at))
        return checked(self.ids, rater.tenant, {**fields, "call": call}, f"feedback[{at}]", now)

    def _target(self, tenant: str, item: dict[str, Any]) -> tuple[str, str | None]:
        """(episode, call) that an item is about. Raises Refused: 404 for what is not this tenant's."""
        response, episode, call = item.get("response_id"), item.get("episode"), item.get("call")
        for name, value in (("response_id", response), ("episode", episode), ("call", call)):
            if value is not None and not (isinstance(value, str) and 0 < len(value) <= 256):
                raise unfit(f"'{name}' must be a text of at most 256 characters", name)
        if (response is None) == (episode is None):
            raise unfit("say what it is about: either 'response_id' or 'episode'", "response_id")
        if episode is not None:
            return named_episode(self.ids, tenant, episode), call
        try:
            found, first = self.ids.parse_response(tenant, str(response))
        except ValueError:
            raise Refused(
                404,
                "there is no such response of yours: send the 'id' of an answer that you were given. Answers to "
                "requests with 'X-Everloop-Capture: off' cannot be rated",
                "response_not_found",
                "response_id",
            ) from None
        choice = item.get("choice", 0)
        if isinstance(choice, bool) or not isinstance(choice, int) or not 0 <= choice < 1000:
            raise unfit("'choice' must be the index of one of the answers, from 0 up", "choice")
        return found, call or choice_call(first, choice)


def refuse_source(rater: Key | Grant, said: dict[str, Any], where: str) -> None:
    """A check, judge or critic speaks through the platform's own handlers, or by a researcher's key: nobody else may
    say that what they send is one's. Raises Refused (400)."""
    if said.get("source") is not None and (isinstance(rater, Grant) or not rater.may("source")):
        raise Refused(
            400,
            f"{where}: 'source' says that a check or judge of the platform found this out; leave it out, or send it "
            "with a key of scope 'research'",
            "source_not_yours",
            "source",
        )


def checked(ids: Ids, tenant: str, fields: dict[str, Any], where: str, now: float) -> Feedback:
    """Feedback in these words, its rater a pseudonym; said ``now``, if no time is given or one that is still to come.
    Raises Refused (422), saying what does not fit."""
    for name in ("text", "chosen", "rejected"):
        if isinstance(fields.get(name), str) and len(fields[name]) > LONGEST_TEXT:
            raise unfit(f"{where}: '{name}' has more than {LONGEST_TEXT:,} characters; send less", name)
    for name in ("id", "rater", "name"):
        if isinstance(fields.get(name), str) and not 0 < len(fields[name]) <= 256:
            raise unfit(f"{where}: '{name}' must have 1 to 256 characters", name)
    try:
        feedback = Feedback.model_validate({"time": now, **fields})
    except ValidationError as error:
        problem = error.errors()[0]
        param = str(problem["loc"][0]) if problem["loc"] else None
        said = problem["msg"].removeprefix("Value error, ")
        raise unfit(f"{where}{'.' + param if param else ''}: {said}", param) from None
    rater = None if feedback.rater is None else ids.pseudonym(tenant, "rater", feedback.rater)
    return feedback.model_copy(update={"rater": rater, "time": min(feedback.time, now)})


def same_event(tenant: str, episode: str, id: str, said: dict[str, Any]) -> str:
    """The event id of something with an id of its producer's: the same words again are the same event."""
    return _named("ev_", tenant, episode, id, orjson.dumps(said, option=orjson.OPT_SORT_KEYS).decode())


def answered(accepted: int, ids: list[str]) -> web.Response:
    return web.Response(
        status=202, body=orjson.dumps({"accepted": accepted, "ids": ids}), content_type="application/json"
    )


def _named(prefix: str, *parts: str) -> str:
    return prefix + hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _text(value: object) -> str:
    return orjson.dumps(value).decode()
