"""The adapters that every engine should hold: loaded, asked once, and dropped when others need the room.

::

    keep(wanted) ─▶ a task for each replica, once a second: what it holds against what it should hold
    hold(release) ─▶ at once, on all that are up        │
                                                        ▼
                                 make room ─▶ load ─▶ one token ─▶ warm: it may be routed

A replica that was away has forgotten its adapters, and gets them again. Those that were wanted longest ago are dropped
first, and none that is wanted or in use. An adapter's name is the hash of its content: what is held under a name is
what was loaded under it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from everloop.errors import AdapterRefused, RegistryError, ServingError
from everloop.release import Release
from everloop.serving.base import Serving

from services.gateway.replicas import Replica, Replicas
from services.releaser.questions import NOT_FINITE, patiently

logger = logging.getLogger(__name__)
EVERY = 1.0  # seconds between looks at what an engine holds
WITHIN = 120.0  # seconds for loading and the first token
ENDS = 3  # engines that may end over an adapter, before it is refused
ONE_TOKEN = {"prompt": "Hello", "max_tokens": 1, "temperature": 0.0}


class Seat:
    """One replica's adapters. ``warm``: those that have answered since it holds them. Changed under ``lock`` alone."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.warm: frozenset[str] = frozenset()
        self.lock = asyncio.Lock()
        self.asked = False
        self.trouble: str | None = replica.trouble

    async def look(self) -> bool:
        """Whether it is up; what it has lost is no longer warm."""
        await self.replica.look(frozenset())
        self.asked = True
        self.warm &= self.replica.held
        return self.replica.up

    def say(self, trouble: str | None) -> None:
        if trouble and self.trouble is None:
            logger.warning("%s does not hold all that it should: %s", self.replica.name, trouble)
        self.trouble = trouble

    def described(self) -> dict[str, Any]:
        """For ``/status``."""
        return {
            "url": self.replica.serving.url,
            "up": self.replica.up,
            "holds": sorted(self.warm),
            "trouble": self.trouble,
        }


class Residents:
    """Keeps the same adapters on every replica. Its coroutines belong to one event loop; the rest may be called by any
    thread. ``room``: adapters that an engine has room for; ``files`` gives the folder of a release's adapter.
    """

    def __init__(self, replicas: Replicas, room: int, files: Callable[[Release], Awaitable[Path]]) -> None:
        self._seats = [Seat(replica) for replica in replicas.each]
        self._room = room
        self._files = files
        self._wanted: dict[str, Release] = {}
        self._pinned: dict[str, Release] = {}
        self._known: frozenset[str] = frozenset()
        self._in_use: Counter[str] = Counter()
        self._used: dict[str, float] = {}
        """When an adapter was wanted or in use last, on the monotonic clock."""
        self._ends: Counter[str] = Counter()

    @property
    def held(self) -> frozenset[str]:
        """The adapters that are warm on every engine that is up; none where no engine is."""
        up = [seat.warm for seat in self._seats if seat.replica.up]
        return frozenset.intersection(*up) if up else frozenset()

    @property
    def trouble(self) -> str | None:
        """What is not as it should be; None: every engine is up and holds what is wanted."""
        return "; ".join(seat.trouble for seat in self._seats if seat.trouble) or None

    def described(self) -> list[dict[str, Any]]:
        """Each replica, for ``/status``."""
        return [seat.described() for seat in self._seats]

    def keep(self, wanted: dict[str, Release], known: set[str], pinned: dict[str, Release]) -> None:
        """``wanted``: by adapter, the releases that engines must hold. ``known``: all that they may be told to drop:
        adapters of releases and pins; others were loaded by somebody else, and stay. ``pinned``: what they should hold
        beside the wanted, what matters most first; from the last on they give way.
        """
        now = time.monotonic()
        used = {adapter: at for adapter, at in self._used.items() if adapter in known}
        self._used = used | dict.fromkeys((*self._wanted, *wanted), now)
        self._wanted, self._known, self._pinned = dict(wanted), frozenset(known), dict(pinned)

    @contextmanager
    def using(self, adapter: str) -> Iterator[None]:
        """Meanwhile it is not dropped, wanted or not."""
        self._in_use[adapter] += 1
        try:
            yield
        finally:
            self._in_use[adapter] -= 1
            self._used[adapter] = time.monotonic()

    async def hold(self, release: Release) -> None:
        """Return once it is warm on every engine that is up, which is one at least.

        Raises AdapterRefused, RegistryError or ServingError where an engine that is up does not get it, or none is.
        """
        seats = [seat for seat in self._seats if seat.replica.up or not seat.asked] or self._seats
        with self.using(release.adapter):
            given = await asyncio.gather(*(self._give(seat, release) for seat in seats), return_exceptions=True)
        failed = [(seat, error) for seat, error in zip(seats, given, strict=True) if error is not None]
        for seat, error in failed:
            away = isinstance(error, ServingError) and not seat.replica.up  # it gets it when it is back
            if not away or len(failed) == len(seats):
                raise error

    async def keep_reconciled(self) -> None:
        """Until cancelled."""
        await asyncio.gather(*(self._reconcile(seat) for seat in self._seats))

    async def _reconcile(self, seat: Seat) -> None:
        while True:
            try:
                seat.say(await self._completed(seat))
            except Exception as error:
                logger.exception("reconciling the adapters of %s", seat.replica.name)
                seat.say(repr(error))
            await asyncio.sleep(EVERY)

    async def _completed(self, seat: Seat) -> str | None:
        """Load what the engine lacks; what is not as it should be then."""
        async with seat.lock:
            if not await seat.look():
                return seat.replica.trouble
        trouble = None
        beside = {adapter: release for adapter, release in self._pinned.items() if adapter not in self._wanted}
        for release in [one for adapter, one in (self._wanted | beside).items() if adapter not in seat.warm]:
            try:
                await self._give(seat, release)
                logger.info("%s holds adapter %s", seat.replica.name, release.adapter)
            except (ServingError, RegistryError, AdapterRefused) as error:
                trouble = str(error)
        return trouble

    async def _give(self, seat: Seat, release: Release) -> None:
        adapter, folder = release.adapter, await self._files(release)
        async with seat.lock:
            if self._ends[adapter] >= ENDS:
                raise AdapterRefused(f"{ENDS} engines ended while they loaded adapter {adapter}, or at its first token")
            if not await seat.look():
                raise ServingError(str(seat.replica.trouble), status=503, code="engine_unavailable")
            if adapter not in seat.warm:
                await self._warm(seat, adapter, folder)
            self._ends.pop(adapter, None)

    async def _warm(self, seat: Seat, adapter: str, folder: Path) -> None:
        serving = seat.replica.serving
        try:
            async with asyncio.timeout(WITHIN):
                await self._make_room(seat, adapter)
                await serving.load(adapter, folder)
                await _first_token(serving, adapter)
        except ServingError as error:
            if error.status >= 500 and await seat.replica.ended():
                self._ends[adapter] += 1
                seat.replica.fell(f"the engine at {serving.url} ended over adapter {adapter}: {error}")
            raise
        except TimeoutError:
            raise ServingError(
                f"the engine at {serving.url} did not load adapter {adapter} and answer within {WITHIN:g} s"
            ) from None
        seat.warm |= {adapter}
        seat.replica.held |= {adapter}

    async def _make_room(self, seat: Seat, coming: str) -> None:
        """Engines hold few adapters at once: drop those that were wanted longest ago before one too many comes, and
        pinned ones after all others.
        """
        held = await seat.replica.serving.adapters()
        free = [adapter for adapter in held & self._known if adapter not in self._wanted and not self._in_use[adapter]]
        last = {adapter: at for at, adapter in enumerate(reversed(self._pinned), 1)}
        for adapter in sorted(free, key=lambda one: (last.get(one, 0), self._used.get(one, 0.0), one)):
            if coming in held or len(held) < self._room:
                return
            await seat.replica.serving.unload(adapter)
            held -= {adapter}
            seat.warm -= {adapter}
            seat.replica.held -= {adapter}


async def _first_token(serving: Serving, adapter: str) -> None:
    """Have it answer. That what it says is no number is for the gate to judge: it did answer."""
    try:
        await patiently(serving, "completions", {"model": adapter, **ONE_TOKEN})
    except ServingError as error:
        if error.code != NOT_FINITE:
            raise
