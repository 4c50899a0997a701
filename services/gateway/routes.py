"""Which policy version answers: the newest route of every policy, followed from the log.

::

    releaser ──▶ ``routes``      ──read every 50 ms──▶ follow(), own thread ──replaces──▶ Routes._table, .names
    learner  ──▶ ``adapters``    ──┤                                                          │
             ──▶ ``checkpoints`` ──┤                     event loop: reads them, never waits ◀┘
    releaser ──▶ ``pins``        ──┘ (only while somebody waits for a pinned adapter)

Adapters and checkpoints are followed for the sake of pins: a researcher may ask for one that has no route.

Where the log may be away when the gateway starts, what was read last is kept in a file, and answers until then.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from everloop.errors import ContractError, LogError, LogRefused
from everloop.event import BASE, PROVIDER
from everloop.log.base import Log, Record
from everloop.names import Checkpoints, Pin
from everloop.release import Adapter, Route
from everloop.topics import ADAPTERS, CHECKPOINTS, PINS, ROUTES
from everloop.wire import BlobStore, decode

from services.gateway.names import Names

logger = logging.getLogger(__name__)
EVERY = 0.05  # seconds between looks: a route is followed within 100 ms
EVERY_AFAR = 0.25  # on a cluster, where a look is two questions over the network


class Assignment(NamedTuple):
    """Who answers a unit: ``version`` is an adapter's hash, 'base' or 'provider'; ``live`` is what to fall back on."""

    version: str = BASE
    arm: str = "live"
    probability: float = 1.0
    release: str | None = None


class Routes:
    """The route of each (tenant, policy). Written by one thread, read by the event loop: a dict, replaced by key."""

    def __init__(self, log: Log, blobs: BlobStore, kept: Path | None = None) -> None:
        self._log = log
        self._blobs = blobs
        self._kept = kept
        self._offsets: dict[tuple[str, int], int] = {}
        self._table: dict[tuple[str, str], Route] = {}
        self.names = Names()
        self._takers: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
            ROUTES.name: (Route, self._replace),
            ADAPTERS.name: (Adapter, self.names.take_adapter),
            CHECKPOINTS.name: (Checkpoints, self.names.take_checkpoints),
            PINS.name: (Pin, self.names.take_pin),
        }
        self._read_at = -math.inf
        self.trouble: str | None = None
        self.unready: str | None = None
        """The trouble, unless it is one through which the routes that are kept may answer."""

    def begin(self) -> None:
        """Before the gateway is ready. Raises LogError where the log is away and nothing is kept from before."""
        try:
            self.catch_up()
        except LogError as error:
            if not self._restored():
                raise
            self._say(error)

    def age(self) -> float:
        """Seconds since the routes were read; infinite where they were not, since the start."""
        return time.monotonic() - self._read_at

    def get(self, tenant: str, policy: str) -> Route | None:
        """None before the first route: the base model answers."""
        return self._table.get((tenant, policy))

    def assign(self, tenant: str, policy: str, unit: str) -> Assignment:
        """Who answers this unit (the subject, else the episode) now. Sticky: a hash of the release and the unit."""
        route = self._table.get((tenant, policy))
        if route is None:
            return Assignment()
        version, arm, probability = route.assign(unit)
        return Assignment(version, arm, probability, route.release)

    def resident(self, tenant: str, policy: str, version: str) -> bool:
        """Whether this version may still answer: nothing has been withdrawn since it was assigned."""
        route = self._table.get((tenant, policy))
        if route is None:
            return version in (BASE, PROVIDER)
        return version in (BASE, PROVIDER, route.live, route.canary) or version in route.uris

    def live(self, tenant: str, policy: str) -> str:
        route = self._table.get((tenant, policy))
        return BASE if route is None else route.live

    def versions(self, tenant: str, policy: str) -> frozenset[str]:
        """Every adapter that was made for this policy, released or not."""
        return self.names.adapters((tenant, policy))

    def epoch(self) -> int:
        """The newest epoch of any route."""
        return max((route.epoch for route in self._table.values()), default=0)

    def described(self) -> dict[str, dict[str, Any]]:
        shown = {"live", "canary", "share", "release", "epoch", "time"}
        return {route.key: route.model_dump(include=shown) for route in list(self._table.values())}

    def catch_up(self) -> None:
        """Read what is new. Called before the gateway is ready, then by follow."""
        if not self._offsets:
            topics = (ROUTES.name, ADAPTERS.name, CHECKPOINTS.name)
            begins = {(t, partition): 0 for t in topics for partition in range(self._log.partitions(t))}
            ends = self._log.end_offsets(PINS.name)  # nobody here waits for what was said before
            self._offsets = begins | {(PINS.name, partition): end for partition, end in enumerate(ends)}
        news = self._read_at == -math.inf  # that there is no route is worth keeping too
        for (topic, partition), offset in self._offsets.items():
            if topic == PINS.name and not self.names.awaited:
                continue
            while records := self._log.read(topic, partition, offset):
                for record in records:
                    self._take(record)
                offset = records[-1].offset + 1
                self._offsets[topic, partition] = offset
                news |= topic in (ROUTES.name, ADAPTERS.name)
        self._read_at = time.monotonic()
        if news and self._kept is not None:
            self._keep(self._kept)

    def follow(self, stop: threading.Event) -> None:
        """Blocks until ``stop`` is set. A log that is away for a while leaves the routes as they are."""
        every = EVERY if self._kept is None else EVERY_AFAR
        while not stop.wait(every):
            try:
                self.catch_up()
                self.trouble = self.unready = None
            except LogError as error:
                self._say(error)

    def _say(self, error: LogError) -> None:
        if self.trouble is None:
            logger.error("the routes cannot be read, the last ones stay in force: %s", error)
        self.trouble = f"the routes cannot be read: {error}"
        self.unready = self.trouble if self._kept is None or isinstance(error, LogRefused) else None

    def _keep(self, path: Path) -> None:
        """For a start without the log. A disk that does not take it takes nothing from those that answer now."""
        kept = {
            "routes": [route.model_dump() for route in self._table.values()],
            "adapters": self.names.plain(),
        }
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(orjson.dumps(kept))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            logger.error("the routes could not be kept in %s: %s", path, error)

    def _restored(self) -> bool:
        try:
            kept = orjson.loads(self._kept.read_bytes()) if self._kept is not None else {}
            for fields in kept["routes"]:
                self._replace(Route.model_validate(fields))
            self.names.restore(kept["adapters"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def _take(self, record: Record) -> None:
        if record.value is None:
            return
        try:
            contract, take = self._takers[record.topic]
            take(decode(contract, record.value, self._blobs))
        except ContractError as error:
            logger.error("a record of %s that cannot be read is passed over: %s", record.topic, error)

    def _replace(self, route: Route) -> None:
        unit = (route.tenant, route.policy)
        named = {v for v in (route.live, route.canary, *route.uris) if v is not None and v != BASE}
        self.names.take_hashes(unit, named)
        held = self._table.get(unit)
        if held is None or route.epoch > held.epoch:
            self._table[unit] = route
