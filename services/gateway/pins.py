"""A pinned name whose adapter the engine lacks: ask for it through the log, and wait until the releaser has answered.

::

    call ─▶ engine: unknown adapter ─▶ Pin (asked) ─▶ log ─▶ releaser: files checked, loaded ─▶ Pin (held) ─▶ log
      ▲                                                                                                      │
      └──────────── again, where it is held; else 503 or 422 with the releaser's reason ◀── Routes.follow ◀──┘

Several calls for one adapter ask once. An adapter that goes on being called is asked for again now and then, so that
the releaser knows that it is in use.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Future

from everloop import wire
from everloop.config import Config
from everloop.errors import LogError
from everloop.ids import unique
from everloop.log.base import Log, NewRecord, Position
from everloop.names import Pin, PinState
from everloop.section import seconds
from everloop.topics import PINS

from services.gateway.names import Names
from services.gateway.refusals import Refused
from services.gateway.turns import Turn

logger = logging.getLogger(__name__)
EVERY = 0.02  # seconds between looks for an answer
AGAIN = {PinState.FULL: "30", PinState.FAILED: "5"}
"""Seconds after which it is worth asking again (Retry-After)."""
Wanted = tuple[str, str, str]
"""(tenant, policy, adapter)"""


class Pins:
    """Used by the event loop alone."""

    def __init__(self, config: Config, log: Log, names: Names) -> None:
        self._log = log
        self._names = names
        self._longest = config.gateway.pin_timeout
        self._renew = seconds(config.serving.keep_pinned) / 10
        self._renewed: dict[Wanted, float] = {}  # when each was last asked for, on the monotonic clock
        self._asking: dict[Wanted, asyncio.Task[Pin | None]] = {}

    async def resident(self, turn: Turn, model: str) -> None:
        """Returns once the engine should hold a pinned turn's adapter.

        Raises Refused: 422 where its files are not fit to be served, 503 where it cannot be held now.
        """
        wanted = (turn.tenant, turn.policy, turn.assignment.version)
        task = self._asking.get(wanted)
        if task is None:
            task = self._asking[wanted] = asyncio.create_task(self._ask(wanted))
            task.add_done_callback(lambda _: self._asking.pop(wanted, None))
        try:
            answer = await asyncio.shield(task)  # one that leaves must not take it from the others
        except LogError as error:
            raise _not_now(model, f"it could not be asked for: {error}", "5") from None
        if answer is None:
            raise _not_now(model, f"the releaser has not loaded it within {self._longest:g} s", "5")
        if answer.state is PinState.REFUSED:
            raise Refused(422, f"{model!r} cannot be served: {answer.reason}", "adapter_refused", "model")
        if answer.state is not PinState.HELD:
            raise _not_now(model, answer.reason, AGAIN[answer.state])

    def used(self, turn: Turn) -> None:
        """A pinned adapter has answered: where that was not said for a while, say so. Nobody waits for it."""
        wanted = (turn.tenant, turn.policy, turn.assignment.version)
        if time.monotonic() - self._renewed.get(wanted, -self._renew) < self._renew:
            return
        try:
            self._append(wanted).add_done_callback(_told)
        except LogError as error:
            logger.warning("that %s is in use could not be said: %s", wanted[2], error)

    async def _ask(self, wanted: Wanted) -> Pin | None:
        pin = unique("pin_")
        self._names.awaited.add(pin)
        try:
            async with asyncio.timeout(self._longest):
                await asyncio.shield(
                    asyncio.wrap_future(self._append(wanted, pin))
                )  # its writer is not to be disturbed
                while pin not in self._names.said:
                    await asyncio.sleep(EVERY)
        except TimeoutError:
            return None
        finally:
            self._names.awaited.discard(pin)
            answer = self._names.said.pop(pin, None)
        return answer

    def _append(self, wanted: Wanted, id: str = "") -> Future[list[Position]]:
        tenant, policy, adapter = wanted
        self._renewed[wanted] = time.monotonic()
        pin = Pin(id=id or unique("pin_"), tenant=tenant, policy=policy, adapter=adapter, time=time.time())
        record = NewRecord(PINS.name, pin.key, wire.encode(pin), {"schema": "Pin", "id": pin.id}, pin.time)
        return self._log.append_soon([record])


def _not_now(model: str, why: str, seconds: str) -> Refused:
    message = f"the engine does not hold {model!r} now: {why}. Try again after {seconds} s"
    return Refused(503, message, "model_not_resident", "model", headers={"Retry-After": seconds})


def _told(future: Future[list[Position]]) -> None:
    error = future.exception()
    if error is not None:
        logger.warning("that a pinned adapter is in use could not be said: %s", error)
