"""The gateway's HTTP surface: which handler answers what, how refusals look, what is counted."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import orjson
from aiohttp import web
from everloop.config import Config
from everloop.errors import LogError
from everloop.home import Home
from everloop.log.base import Log
from everloop.log.embedded import EmbeddedLog
from everloop.serving.base import Serving
from prometheus_client import CollectorRegistry

from services.gateway import ask, openapi, responses, unserved
from services.gateway.calls import CODE, Answered, Calls, Reader
from services.gateway.capture import Capture, load_hook
from services.gateway.conversations import Conversations
from services.gateway.door import Door
from services.gateway.events import EventDesk
from services.gateway.feedback import FeedbackDesk
from services.gateway.keys import Keys
from services.gateway.metrics import Metrics
from services.gateway.refusals import Refused, from_log
from services.gateway.retries import Recovered, Retries
from services.gateway.routes import Routes
from services.gateway.scribe import Appends
from services.gateway.sealing import sealed_log
from services.gateway.spool import waiting
from services.gateway.tokens import Tokens
from services.gateway.turns import Turns

logger = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[Any]]  # what aiohttp can send
UNDER_WAY = 0.85  # of the drain: for answers under way; the rest is for their events to become durable
READERS: dict[str, Reader] = {
    "/v1/chat/completions": partial(ask.read, "chat/completions"),
    "/v1/completions": partial(ask.read, "completions"),
    "/v1/responses": responses.read,
}


class Gateway:
    """Everything that answers, wired to one log and one engine.

    ``appends`` writes events where the log itself does not. ``serving`` and ``appends`` belong to the event loop.
    """

    def __init__(
        self,
        config: Config,
        home: Home,
        log: Log,
        serving: Serving,
        appends: Appends | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.config = config
        self.serving = serving
        self.metrics = Metrics(registry or CollectorRegistry())
        self.keys = Keys(home.root / "keys.db")
        self._home = home
        away = not isinstance(log, EmbeddedLog)  # it may be
        self.routes = Routes(log, home.blobs, home.folder("state") / "routes.json" if away else None)
        self.metrics.route_epoch.set_function(self.routes.epoch)
        self.metrics.routes_age.set_function(self.routes.age)
        self.conversations = Conversations()
        ids, secret = home.ids, home.secret()
        tokens = Tokens(secret)
        hook = load_hook(config.gateway.redact)
        self._door = Door(config, self.keys, tokens)
        self._recovered = Recovered(ids, home.blobs)
        self._log = log
        self._replays = hook is None  # what was redacted cannot be given again
        self.capture = Capture(appends or sealed_log(config, home, log), hook, self.metrics)
        turns = Turns(config, ids, self.routes, self.conversations)
        self._calls = Calls(
            config, self._door, turns, serving, self.capture, Retries(secret), self._recovered, self.metrics
        )
        desk = (config, self._door, ids, self.conversations, self.capture, self.metrics)
        self._feedback = FeedbackDesk(*desk, tokens)
        self._events = EventDesk(*desk)

    def prepare(self) -> None:
        """What must be known before the first request: routes, and answers that may be asked for again. Blocks."""
        self.routes.begin()
        if not self._replays:
            return
        with waiting(self._home, self._log) as spool:
            if spool is not None:
                self._recovered.read(spool)
        if self.routes.trouble is None:  # else the log is away
            self._recovered.read(self._log)

    def add_to(self, app: web.Application) -> None:
        """Add every endpoint of the API to an application."""
        router = app.router
        for path, read in READERS.items():
            router.add_post(path, self._guarded(path, self._calling(read)))
        router.add_get("/v1/models", self._guarded("/v1/models", self._models))
        router.add_get("/v1/models/{model}", self._guarded("/v1/models", self._model))
        router.add_post("/v1/feedback", self._guarded("/v1/feedback", self._cross_origin(self._feedback.give)))
        router.add_options("/v1/feedback", self._cross_origin(_allowed))
        router.add_post("/v1/feedback/tokens", self._guarded("/v1/feedback/tokens", self._feedback.grant))
        router.add_post("/v1/events", self._guarded("/v1/events", self._events.take))
        router.add_get("/openapi.json", self._guarded("/openapi.json", _describe))
        router.add_route("*", "/{rest:.*}", self._guarded("other", unserved.refuse), name=unserved.REST)
        app.on_shutdown.append(self._end)

    async def _end(self, app: web.Application) -> None:
        self._calls.end_within(UNDER_WAY * self.config.services.drain)

    def status(self) -> dict[str, Any]:
        """For ``everloop status``: what answers, and how it goes."""
        return {
            "routes": self.routes.described(),
            "routes_trouble": self.routes.trouble,
            "engine": getattr(self.serving, "url", "in this process"),
        }

    def close(self) -> None:
        self.keys.close()
        self._log.close()

    def _calling(self, read: Reader) -> Handler:
        async def call(request: web.Request) -> Answered:
            self.metrics.under_way += 1
            try:
                return await self._calls.answer(request, read)
            finally:
                self.metrics.under_way -= 1

        return call

    async def _models(self, request: web.Request) -> web.Response:
        key = self._door.key(request, "call")
        models = [_model(name, key.tenant) for name in self.config.tenants[key.tenant].policies]
        return _json({"object": "list", "data": models})

    async def _model(self, request: web.Request) -> web.Response:
        key = self._door.key(request, "call")
        name = request.match_info["model"]
        if name not in self.config.tenants[key.tenant].policies:
            raise Refused(404, f"there is no model {name[:64]!r}; see GET /v1/models", "model_not_found", "model")
        return _json(_model(name, key.tenant))

    def _guarded(self, route: str, handler: Handler) -> Handler:
        """Refusals become answers, and every answer is counted; nothing else that goes wrong ends the service."""
        codes = self.metrics.requests
        duration = self.metrics.duration.labels(route)
        good = codes.labels(route, "200")

        async def guarded(request: web.Request) -> Answered:
            began = time.monotonic()
            code = 499
            try:
                response = await handler(request)
                code = request.get(CODE, response.status)
                return response
            except (Refused, LogError) as error:
                refused = error if isinstance(error, Refused) else from_log(error)
                code = refused.status
                return refused.response()
            except (ConnectionError, TimeoutError):
                raise
            except Exception:
                code = 500
                logger.exception("%s failed", route)
                return Refused(500, "the gateway failed; its log says why", "internal_error").response()
            finally:
                duration.observe(time.monotonic() - began)
                (good if code == 200 else codes.labels(route, str(code))).inc()

        return guarded

    def _cross_origin(self, handler: Handler) -> Handler:
        """Browsers of the configured origins may read the answer."""
        allowed = frozenset(self.config.gateway.allow_origins)

        async def answered(request: web.Request) -> web.StreamResponse:
            try:
                response = await handler(request)
            except Refused as refused:
                response = refused.response()
            origin = request.headers.get("Origin", "")
            if origin in allowed:
                response.headers["Access-Control-Allow-Origin"] = origin
                response.headers["Vary"] = "Origin"
                if request.method == "OPTIONS":
                    response.headers["Access-Control-Allow-Methods"] = "POST"
                    response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, Idempotency-Key"
                    response.headers["Access-Control-Max-Age"] = "600"
            return response

        return answered


async def _allowed(request: web.Request) -> web.Response:
    return web.Response(status=204)


async def _describe(request: web.Request) -> web.Response:
    return web.Response(text=openapi.written(), content_type="application/json")


def _model(name: str, tenant: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": tenant}


def _json(body: dict[str, Any]) -> web.Response:
    return web.Response(body=orjson.dumps(body), content_type="application/json")
