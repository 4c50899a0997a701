"""The releaser's reading and writing of the log: its own topics as the authority, the others as news.

A change is written whole or not at all: the route first, then the releases; in one append to the embedded log, in one
transaction on Kafka. So a kill leaves all of a step or nothing of it, and what is in the log is what the next process
starts from. On Kafka whoever opens the journal fences the one before, on whatever machine that runs: one that was
paused cannot write any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from everloop import wire
from everloop.contract import Contract
from everloop.errors import ContractError
from everloop.log.base import Log, NewRecord, Record
from everloop.log.embedded import EmbeddedLog
from everloop.names import Checkpoints, Pin
from everloop.release import Adapter, Release, Route
from everloop.run import Command
from everloop.topics import (
    ADAPTERS,
    CHECKPOINTS,
    EPISODES,
    EVENTS,
    PAUSES,
    PINS,
    RELEASER,
    RELEASES,
    ROUTES,
    Topic,
)
from everloop.wire import BlobStore

from services.releaser.state import Change

logger = logging.getLogger(__name__)
C = TypeVar("C", bound=Contract)


class Tail:
    """Reads a topic from given offsets on, outside any group. ``behind``: the last look left something unread."""

    def __init__(self, log: Log, topic: Topic, offsets: dict[int, int] | None = None) -> None:
        self._log = log
        self._topic = topic.name
        count = log.partitions(topic.name)
        self.offsets = {partition: (offsets or {}).get(partition, 0) for partition in range(count)}
        self.behind = False

    def new(self, most: int = 500) -> list[Record]:
        """What was appended since the last time, at most ``most`` records of a partition."""
        found: list[Record] = []
        self.behind = False
        for partition, offset in self.offsets.items():
            records = self._log.read(self._topic, partition, offset, most)
            if records:
                self.offsets[partition] = records[-1].offset + 1
                self.behind |= len(records) == most
                found += records
        return found

    def all(self) -> Iterator[Record]:
        """What was appended since the last time, to the present end."""
        while records := self.new():
            yield from records


def sole_writer(log: Log) -> Callable[[Sequence[NewRecord]], object]:
    """Writes records whole or not at all. The embedded log is of one home, where one releaser works at a time."""
    return log.append if isinstance(log, EmbeddedLog) else log.fenced(RELEASER).write


class Journal:
    """Typed access to the topics that the releaser lives on. :meth:`open` it before what it holds is believed."""

    def __init__(self, log: Log, blobs: BlobStore) -> None:
        self.log = log
        self._append: Callable[[Sequence[NewRecord]], object]
        self._blobs = blobs
        self._adapters = Tail(log, ADAPTERS)
        self._checkpoints = Tail(log, CHECKPOINTS)
        self._pins = Tail(log, PINS)

    def open(self) -> None:
        """From here on nobody else writes: read after this. Raises LogError where the cluster does not let it."""
        self._append = sole_writer(self.log)

    def releases(self) -> Iterator[Release]:
        """Every version that the log holds, oldest first."""
        return self._decoded(Release, Tail(self.log, RELEASES).all())

    def routes(self) -> Iterator[Route]:
        return self._decoded(Route, Tail(self.log, ROUTES).all())

    def new_adapters(self) -> Iterator[Adapter]:
        """Adapters announced since the last time; all of them the first time."""
        return self._decoded(Adapter, self._adapters.all())

    def new_checkpoints(self) -> Iterator[Checkpoints]:
        """As :meth:`new_adapters`."""
        return self._decoded(Checkpoints, self._checkpoints.all())

    def new_pins(self) -> Iterator[Pin]:
        """Wishes and answers, as :meth:`new_adapters`."""
        return self._decoded(Pin, self._pins.all())

    def pauses(self) -> Iterator[Command]:
        """The newest pause or resume, freeze or unfreeze of each policy, and perhaps some before it, oldest first."""
        return self._decoded(Command, Tail(self.log, PAUSES).all())

    def write(self, change: Change) -> None:
        """Append a change, whole or not at all; durable on return. Raises Fenced where another releaser took over."""
        records = [self._record(RELEASES, r, f"{r.key}/{r.id}", f"{r.id}-{r.step}") for r in change.releases]
        if change.route is not None:
            records.insert(0, self._record(ROUTES, change.route, change.route.key, f"epoch-{change.route.epoch}"))
        if records:
            self._append(records)

    def announce(self, adapter: Adapter) -> None:
        self._append([self._record(ADAPTERS, adapter, adapter.key, adapter.hash)])

    def answer(self, pin: Pin) -> None:
        self._append([self._record(PINS, pin, pin.key, f"{pin.id}-{pin.state}")])

    def traffic_begins(self) -> dict[str, dict[str, int]]:
        """Where a canary's traffic begins: the present ends of the topics that tell of it."""
        return {
            topic.name: {str(p): end for p, end in enumerate(self.log.end_offsets(topic.name))}
            for topic in (EVENTS, EPISODES)
        }

    def tail_from(self, topic: Topic, begins: dict[str, dict[str, int]]) -> Tail:
        return Tail(self.log, topic, {int(p): end for p, end in begins.get(topic.name, {}).items()})

    def decode(self, contract: type[C], record: Record) -> C | None:
        return next(self._decoded(contract, iter([record])), None)

    def unsealed(self, record: Record) -> dict[str, object] | None:
        """A record's fields without validation: for events, of which there are many and few fields matter."""
        if record.value is None:
            return None
        try:
            return wire.unseal(record.value, self._blobs)
        except ContractError as error:
            logger.warning("%s/%d@%d is passed over: %s", record.topic, record.partition, record.offset, error)
            return None

    def _record(self, topic: Topic, contract: Release | Route | Adapter | Pin, key: str, id: str) -> NewRecord:
        headers = {"schema": type(contract).__name__, "id": id}
        return NewRecord(topic.name, key, wire.encode(contract, self._blobs), headers, contract.time)

    def _decoded(self, contract: type[C], records: Iterator[Record]) -> Iterator[C]:
        for record in records:
            if record.value is None:
                continue
            try:
                yield wire.decode(contract, record.value, self._blobs)
            except ContractError as error:
                logger.error("%s/%d@%d is passed over: %s", record.topic, record.partition, record.offset, error)
