"""The log port on Kafka: see the folder's ``__init__`` for what does what."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from everloop.errors import LogError
from everloop.log.base import NewRecord, Position, Record, checked_size
from everloop.log.kafka.appender import Appender
from everloop.log.kafka.clients import Clients
from everloop.log.kafka.cluster import Cluster
from everloop.log.kafka.declared import Keeping, TopicSpec, spec_of
from everloop.log.kafka.fenced import FencedWriter
from everloop.log.kafka.member import Member
from everloop.log.kafka.plan import Plan, plan
from everloop.log.kafka.reader import Readers
from everloop.log.kafka.records import milliseconds
from everloop.log.kafka.settings import Access, Address

Opened = TypeVar("Opened", Member, FencedWriter)


class KafkaLog:
    """See :class:`everloop.log.base.Log`. Opening it asks nothing of the cluster; the first call does.

    ``make``: topics that are missing are made as declared. ``deadline``: seconds that an append waits for the
    cluster before it raises.
    """

    def __init__(
        self,
        address: Address,
        access: Access,
        keeping: Keeping,
        *,
        make: bool = True,
        deadline: float = 30.0,
    ) -> None:
        self.clients = Clients(address, access, keeping.max_record_bytes)
        self.cluster = Cluster(self.clients, keeping, make)
        self._keeping = keeping
        self.max_record_bytes = keeping.max_record_bytes
        self._appender = Appender(self.clients, self.cluster.partitions, deadline=deadline)
        self._readers = Readers(self.clients)
        self._opened: list[Member | FencedWriter] = []
        self._lock = threading.Lock()

    def plan(self, *, add_partitions: bool = False) -> Plan:
        """What differs on the cluster from what is declared. Raises LogError with cause and mend, within 15 s."""
        return plan(self.cluster, self.clients.address, self._keeping, add_partitions=add_partitions)

    def declared(self, topic: str) -> TopicSpec:
        """As a topic should be."""
        return spec_of(topic, self._keeping)

    def append(self, records: Sequence[NewRecord]) -> list[Position]:
        return self._appender.wait(self.append_soon(records))

    def append_soon(self, records: Sequence[NewRecord]) -> Future[list[Position]]:
        size = sum(checked_size(record, self.max_record_bytes) for record in records)
        return self._appender.submit(records, size)

    @property
    def rebuilds(self) -> int:
        """How often the client that appends was thrown away and made anew."""
        return self._appender.rebuilds

    def consumer(self, group: str, topics: Sequence[str], *, start: str = "earliest", member: str = "") -> Member:
        if start not in ("earliest", "latest"):
            raise LogError(f"start is 'earliest' or 'latest', not {start!r}")
        if not topics:
            raise LogError(f"a consumer of group {group!r} needs at least one topic")
        return self._remember(Member(self, group, topics, start, member))

    def fenced(self, name: str) -> FencedWriter:
        """The writer of this name, alone in the cluster: it fences whoever had the name before. For workers."""
        return self._remember(FencedWriter(self, name))

    def _remember(self, opened: Opened) -> Opened:
        with self._lock:
            self._opened.append(opened)
        return opened

    def forget(self, closed: Member | FencedWriter) -> None:
        with self._lock:
            if closed in self._opened:
                self._opened.remove(closed)

    def read(self, topic: str, partition: int, offset: int = 0, max_records: int = 500) -> list[Record]:
        end = self._ends(topic, partition)[partition]
        return self._readers.read(topic, partition, max(0, offset), end, max_records)

    def _ends(self, topic: str, partition: int) -> list[int]:
        count = self.partitions(topic)
        if not 0 <= partition < count:
            raise LogError(f"topic {topic!r} has partitions 0 to {count - 1}, not {partition}")
        return self.end_offsets(topic)

    def partitions(self, topic: str) -> int:
        return self.cluster.partitions(topic)

    def end_offsets(self, topic: str) -> list[int]:
        return self.cluster.end_offsets(topic)

    def offset_at(self, topic: str, partition: int, time: float) -> int:
        """See the port; to the millisecond. Timestamps are not before the events' times (see ``records.py``), so the
        first event of this time lies at the cluster's answer or behind it."""
        end = self._ends(topic, partition)[partition]
        offset = self.cluster.offset_at(topic, partition, milliseconds(time))
        while offset is not None and offset < end:
            found = self._readers.read(topic, partition, offset, end, 500)
            if not found:
                return end
            for record in found:
                if milliseconds(record.time) >= milliseconds(time):
                    return record.offset
            offset = found[-1].offset + 1
        return end

    def committed(self, group: str, topic: str) -> dict[int, int]:
        return self.cluster.committed(group, topic)

    def close(self) -> None:
        with self._lock:
            opened = list(self._opened)
        for each in opened:
            with suppress(LogError):  # a group that cannot be left now takes us out by itself
                each.close()
        self._appender.close()
        self._readers.close()
        self.cluster.close()
