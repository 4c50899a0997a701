"""Which policy version answers: the newest route of every policy, followed from the log.

::

    releaser ──▶ ``routes``   ──read every 50 ms──▶ follow(), own thread ──replaces──▶ Routes._table, ._adapters
    learner  ──▶ ``adapters`` ──┘                                                          │
                                                      event loop: reads them, never waits ◀┘

Adapters are followed for the sake of pins: a researcher may ask for one of the policy's own that has no route.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, NamedTuple

from everloop.errors import ContractError, LogError
from everloop.event import BASE
from everloop.log.base import Log, Record
from everloop.release import Adapter, Route
from everloop.topics import ADAPTERS, ROUTES
from everloop.wire import BlobStore, decode

logger = logging.getLogger(__name__)
EVERY = 0.05  # seconds between looks: a route is followed within 100 ms


class Assignment(NamedTuple):
    """Who answers a unit: ``version`` is an adapter's hash or 'base'; ``live`` is what to fall back on."""

    version: str = BASE
    arm: str = "live"
    probability: float = 1.0
    release: str | None = None


class Routes:
    """The route of each (tenant, policy). Written by one thread, read by the event loop: a dict, replaced by key."""

    def __init__(self, log: Log, blobs: BlobStore) -> None:
        self._log = log
        self._blobs = blobs
        self._offsets = {
            (topic.name, partition): 0
            for topic in (ROUTES, ADAPTERS)
            for partition in range(log.partitions(topic.name))
        }
        self._table: dict[tuple[str, str], Route] = {}
        self._adapters: dict[tuple[str, str], frozenset[str]] = {}
        self.trouble: str | None = None

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
            return version == BASE
        return version in (BASE, route.live, route.canary) or version in route.uris

    def live(self, tenant: str, policy: str) -> str:
        route = self._table.get((tenant, policy))
        return BASE if route is None else route.live

    def versions(self, tenant: str, policy: str) -> frozenset[str]:
        """Every adapter that was made for this policy, released or not."""
        return self._adapters.get((tenant, policy), frozenset())

    def epoch(self) -> int:
        """The newest epoch of any route."""
        return max((route.epoch for route in self._table.values()), default=0)

    def described(self) -> dict[str, dict[str, Any]]:
        shown = {"live", "canary", "share", "release", "epoch", "time"}
        return {route.key: route.model_dump(include=shown) for route in list(self._table.values())}

    def catch_up(self) -> None:
        """Read what is new. Called before the gateway is ready, then by follow."""
        for (topic, partition), offset in self._offsets.items():
            while records := self._log.read(topic, partition, offset):
                for record in records:
                    self._take(record)
                offset = records[-1].offset + 1
                self._offsets[topic, partition] = offset

    def follow(self, stop: threading.Event) -> None:
        """Blocks until ``stop`` is set. A log that is away for a while leaves the routes as they are."""
        while not stop.wait(EVERY):
            try:
                self.catch_up()
                self.trouble = None
            except LogError as error:
                if self.trouble is None:
                    logger.error("the routes cannot be read, the last ones stay in force: %s", error)
                self.trouble = f"the routes cannot be read: {error}"

    def _take(self, record: Record) -> None:
        if record.value is None:
            return
        try:
            if record.topic == ADAPTERS.name:
                self._make_known(decode(Adapter, record.value, self._blobs))
            else:
                self._replace(decode(Route, record.value, self._blobs))
        except ContractError as error:
            logger.error("a record of %s that cannot be read is passed over: %s", record.topic, error)

    def _make_known(self, adapter: Adapter) -> None:
        unit = (adapter.tenant, adapter.policy)
        self._adapters[unit] = self._adapters.get(unit, frozenset()) | {adapter.hash}

    def _replace(self, route: Route) -> None:
        unit = (route.tenant, route.policy)
        named = {v for v in (route.live, route.canary, *route.uris) if v is not None and v != BASE}
        self._adapters[unit] = self._adapters.get(unit, frozenset()) | named
        held = self._table.get(unit)
        if held is None or route.epoch > held.epoch:
            self._table[unit] = route
