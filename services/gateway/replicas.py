"""Several engines that answer as one: those of ``serving.url``, be it a single one.

::

    a task for each replica, once a second: /health, /v1/models ──▶ Replica: up, complete, what it holds
                                                                       ▲ read, never waited for
    a call ─▶ the one with the fewest under way ─▶ its answer          │
                 └─ refuses, is full, lacks the adapter, or breaks before its first chunk ─▶ another one

A replica is *complete* when it held every adapter that is routed as it was looked at. One that was away has forgotten
its adapters, so it gets no calls before the releaser has given them back, as long as another one is complete.

What was sent to an agent is never asked again. A request under which an engine ended is asked once more, not of all
the others: one that ends engines must not end them all.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from everloop.errors import Overloaded, ServingError, UnknownAdapter
from everloop.serving.base import LOST, Route

from services.gateway.http1 import CONNECT
from services.gateway.upstream import HttpServing

logger = logging.getLogger(__name__)
EVERY = 1.0  # seconds between looks at a replica
PROBE = 1.0  # seconds in which an engine that broke an answer off must say that it is well
CUT = frozenset({"upstream_broken", "upstream_truncated"})  # codes of an answer that did not come to its end
SUSPECT = CUT | {"upstream_error"}  # as the last words of an engine may look
NOTHING: frozenset[str] = frozenset()


class Replica:
    """One engine, and what was seen of it last. ``held``: every model that it named, bases too."""

    def __init__(self, serving: HttpServing) -> None:
        self.serving = serving
        self.name = serving.url.partition("://")[2]
        self.up = False
        self.complete = False
        self.held: frozenset[str] = NOTHING
        self.in_flight = 0
        self.moved_on = 0  # calls that were asked of another one after this one
        self.lost = 0  # answers that ended with it
        self.since = time.time()  # it is as it is
        self.trouble: str | None = f"the engine at {serving.url} was not asked yet"
        self.lacks: set[str] = set()  # what it was asked for in vain since the last look
        self._wanted: frozenset[str] = NOTHING

    async def look(self, wanted: frozenset[str]) -> None:
        """Ask how it is. ``wanted``: the adapters that make it complete; asked for before the look, so that one which
        was given to it before it was routed cannot be missed.
        """
        try:
            async with asyncio.timeout(CONNECT):
                up, (held, trouble) = await self.serving.healthy(), await self._models()
        except TimeoutError:
            up = False
        if not up:
            self.fell(f"no engine answers at {self.serving.url}")
            return
        if not self.up:
            self.since = time.time()
            logger.info("the engine at %s answers", self.serving.url)
        self.up, self.trouble = True, trouble
        self.held, self.lacks, self._wanted = held, set(), wanted
        self.complete = wanted <= held

    async def _models(self) -> tuple[frozenset[str], str | None]:
        try:
            return frozenset(await self.serving.models()), None
        except ServingError as error:
            return NOTHING, str(error)

    def fell(self, why: str) -> None:
        """Nobody answers there, for all that is known until the next look."""
        if self.up:
            self.since = time.time()
            logger.warning("%s", why)
        self.up = self.complete = False
        self.held, self.trouble = NOTHING, why

    async def ended(self) -> bool:
        """Whether it is found down, after it did not finish an answer."""
        try:
            async with asyncio.timeout(PROBE):
                return not await self.serving.healthy()
        except TimeoutError:
            return True

    def failed(self, model: str, error: ServingError) -> None:
        """What an error says of it."""
        if isinstance(error, UnknownAdapter):
            self.lacks.add(model)
            self.complete = self.complete and model not in self._wanted
        elif error.status == 503:
            self.lost += error.code == LOST
            self.fell(str(error))

    def described(self) -> dict[str, Any]:
        """For ``/status``."""
        return {
            "url": self.serving.url,
            "up": self.up,
            "complete": self.complete,
            "since": self.since,
            "in_flight": self.in_flight,
            "moved_on": self.moved_on,
            "lost": self.lost,
            "trouble": self.trouble,
        }


class Replicas:
    """Answers by whichever replica can. Implements ``everloop.serving.base.Answering``; one event loop's alone.

    ``timeout`` in seconds for a whole answer; ``brief`` as of :class:`HttpServing`.
    """

    def __init__(self, urls: Sequence[str], *, timeout: float = 300.0, brief: bool = False) -> None:
        self.each = tuple(Replica(HttpServing(url, timeout=timeout, brief=brief)) for url in urls)

    @property
    def url(self) -> str:
        """Where the only one answers; of several "": which of them is known when it is asked."""
        return self.each[0].serving.url if len(self.each) == 1 else ""

    async def complete(self, route: Route, body: dict[str, Any]) -> dict[str, Any]:
        tries = _Tries(self.each, body["model"])
        while True:
            replica = tries.next()
            replica.in_flight += 1
            try:
                return await replica.serving.complete(route, body)
            except ServingError as error:
                await tries.failed(replica, error)
            finally:
                replica.in_flight -= 1

    async def stream(self, route: Route, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        tries = _Tries(self.each, body["model"])
        while True:
            replica = tries.next()
            replica.in_flight += 1
            begun = False
            chunks = replica.serving.stream(route, body)
            try:
                async for chunk in chunks:
                    begun = True
                    yield chunk
                return
            except ServingError as error:
                await tries.failed(replica, error, begun)
            finally:
                replica.in_flight -= 1
                await chunks.aclose()  # type: ignore[attr-defined]

    async def look(self, routed: Callable[[], frozenset[str]] = frozenset) -> None:
        """Look at every replica once."""
        await asyncio.gather(*(replica.look(routed()) for replica in self.each))

    async def watch(self, routed: Callable[[], frozenset[str]] = frozenset) -> None:
        """Look at every replica once a second, until cancelled. ``routed``: the adapters that agents may be given."""
        await asyncio.gather(*(_watch(replica, routed) for replica in self.each))

    @property
    def trouble(self) -> str | None:
        """Why no call can be answered; None: some replica is up."""
        if any(replica.up for replica in self.each):
            return None
        return ", and ".join(str(replica.trouble) for replica in self.each)

    async def close(self) -> None:
        for replica in self.each:
            await replica.serving.close()


async def _watch(replica: Replica, routed: Callable[[], frozenset[str]]) -> None:
    while True:
        try:
            await replica.look(routed())
        except Exception:
            logger.exception("looking at %s", replica.name)
        await asyncio.sleep(EVERY)


class _Tries:
    """One call's way over the replicas."""

    __slots__ = ("_each", "_errors", "_model", "_tried")

    def __init__(self, each: tuple[Replica, ...], model: str) -> None:
        self._each = each
        self._model = model
        self._tried: list[Replica] = []
        self._errors: list[ServingError] = []

    def next(self) -> Replica:
        """Whom to ask now. Raises what stands in the way where all that are up were asked."""
        alone = len(self._each) == 1 and not self._tried
        replica = self._each[0] if alone else self._chosen()
        self._tried.append(replica)
        return replica

    def _chosen(self) -> Replica:
        tried, model = self._tried, self._model
        fit = [replica for replica in self._each if replica.complete and model not in replica.lacks]
        if not fit:
            up = [replica for replica in self._each if replica.up]
            fit = [replica for replica in up if model in replica.held and replica not in tried] or up
        left = [replica for replica in fit if replica not in tried]
        if not left and tried:
            raise self._verdict()
        if not left:
            return random.choice(self._each)  # none is up as far as is known: one of them may be back
        if tried:
            tried[-1].moved_on += 1
        least = min(replica.in_flight for replica in left)
        return random.choice([replica for replica in left if replica.in_flight == least])

    async def failed(self, replica: Replica, error: ServingError, begun: bool = False) -> None:
        """Note an error. Returns where another replica may be asked; else raises what the caller is told.

        ``begun``: something of the answer has gone to the caller.
        """
        if error.code in SUSPECT and await replica.ended():
            error = ServingError(
                f"the engine at {replica.serving.url} ended while it answered: send it again", status=503, code=LOST
            )
        replica.failed(self._model, error)
        if begun or not self._may_go_on(error):
            raise error
        self._errors.append(error)

    def _may_go_on(self, error: ServingError) -> bool:
        if error.code in CUT or error.code == LOST:
            return not any(one.code in CUT or one.code == LOST for one in self._errors)
        return isinstance(error, Overloaded | UnknownAdapter) or error.status == 503

    def _verdict(self) -> ServingError:
        """Of all errors the one that says most: to come back soon, that an adapter is held by none, else the last."""
        full = [error for error in self._errors if isinstance(error, Overloaded)]
        if full:
            return min(full, key=lambda error: error.retry_after)
        unknown = (error for error in self._errors if isinstance(error, UnknownAdapter))
        return next(unknown, self._errors[-1])
