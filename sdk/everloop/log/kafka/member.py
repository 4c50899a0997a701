"""A consumer on Kafka: one member of a group, with what it has fetched and not yet handed out.

kafka-python hands out what came first, one partition after another. Here every partition has its own waiting line,
and a poll takes from all of them alike, so that a full partition does not hold the others up. A partition with
records in line is paused meanwhile, which bounds memory. When the group is shared out anew, the lines are void.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka import errors as kafka_errors

from everloop.errors import LogError
from everloop.log import base
from everloop.log.base import Record
from everloop.log.kafka import records
from everloop.log.kafka.fenced import Membership

if TYPE_CHECKING:
    from everloop.log.kafka.log import KafkaLog

JOIN_SECONDS = 3.0  # that the constructor waits for its partitions: more, where other members must be told first
SESSION_SECONDS = 6.0  # without a heartbeat, after which partitions go to the others; the least a broker allows
HEARTBEAT_SECONDS = 1.0
POLL_SECONDS = 300.0  # without a poll, after which a member counts as hung
REQUEST_SECONDS = 10.0
SETTLE_SECONDS = 1.0
"""That a poll waits while the group is shared out anew: one that ends before its join does begins another join, and
so on without end."""
ALL = 2**31 - 1
"""Of what was fetched, which is bounded in bytes. Asked for less, kafka-python keeps the rest of a partition, and
never gives it back where the partition is paused meanwhile."""


class Member:
    """See :class:`everloop.log.base.Consumer`. Made by ``KafkaLog.consumer``; not thread-safe."""

    def __init__(self, log: KafkaLog, group: str, topics: Sequence[str], start: str, name: str) -> None:
        self._log = log
        self._clients = log.clients
        self._group = log.clients.address.qualified(group)
        self._own_group = group
        self._topics = tuple(dict.fromkeys(topics))
        self._from_end = start == "latest"
        self._name = name
        self._lines: dict[TopicPartition, deque[Record]] = {}
        self._generation: object = None
        self._turn = 0
        self._closed = False
        for topic in self._topics:
            log.partitions(topic)
        self._kafka = self._joined()

    def _joined(self) -> KafkaConsumer:
        static = {"group_instance_id": self._log.clients.address.qualified(self._name)} if self._name else {}
        consumer = self._clients.consumer(
            group_id=self._group,
            session_timeout_ms=int(SESSION_SECONDS * 1000),
            heartbeat_interval_ms=int(HEARTBEAT_SECONDS * 1000),
            max_poll_interval_ms=int(POLL_SECONDS * 1000),
            **static,
        )
        self._kafka = consumer
        consumer.subscribe([self._clients.address.qualified(topic) for topic in self._topics])
        deadline = time.monotonic() + JOIN_SECONDS
        while not consumer.assignment() and time.monotonic() < deadline:
            self._fetch(0.1)
        return consumer

    def poll(self, max_records: int = 500, timeout: float = 0.5) -> list[Record]:
        self._check_open()
        self._fetch(0.0 if self._lines else timeout)
        return self._take(max_records)

    def _fetch(self, timeout: float) -> None:
        """Into the lines: what came of partitions that have none. Also what keeps us in the group."""
        consumer = self._kafka
        with self._clients.explained(f"polling as a member of the group {self._group!r}"):
            assigned = consumer.assignment()
            consumer.pause(*(assigned & self._lines.keys()))
            consumer.resume(*(assigned - self._lines.keys()))
            patience = max(timeout, SETTLE_SECONDS) if consumer._coordinator.need_rejoin() else timeout
            fetched = consumer.poll(timeout_ms=int(patience * 1000), max_records=ALL)
            new = self._shared_out_anew()
        own = self._clients.address.own
        for at, found in fetched.items():
            if at not in new:
                self._lines.setdefault(at, deque()).extend(records.record(read, own(at.topic)) for read in found)

    def _shared_out_anew(self) -> frozenset[TopicPartition]:
        """Partitions whose first records are not the ones to begin with, after the group was shared out anew."""
        generation = self._kafka.group_metadata().generation_id
        if generation == self._generation:
            return frozenset()
        self._generation = generation
        self._lines.clear()
        return self._begin_at_the_end() if self._from_end else frozenset()

    def _begin_at_the_end(self) -> frozenset[TopicPartition]:
        """Where the group has no offset yet it is set to the end, for good: a restart does not skip what came since."""
        new: dict[TopicPartition, int] = {}
        for topic in self._topics:
            known, ends = self._log.committed(self._own_group, topic), self._log.end_offsets(topic)
            name = self._clients.address.qualified(topic)
            new |= {TopicPartition(name, number): end for number, end in enumerate(ends) if number not in known}
        new = {at: end for at, end in new.items() if at in self._kafka.assignment()}
        if new:
            self._kafka.commit({at: OffsetAndMetadata(end, "", -1) for at, end in new.items()})
        for at, end in new.items():
            self._kafka.seek(at, end)
        return frozenset(new)

    def _take(self, max_records: int) -> list[Record]:
        """From all lines alike: an equal part each, the rest from those that have more."""
        waiting = sorted(self._lines)
        self._turn += 1
        first = self._turn % len(waiting) if waiting else 0
        taken: list[Record] = []
        for index, at in enumerate(waiting[first:] + waiting[:first]):
            line = self._lines[at]
            share = -(-(max_records - len(taken)) // (len(waiting) - index))
            taken += [line.popleft() for _ in range(min(share, len(line)))]
            if not line:
                del self._lines[at]
        return taken

    def membership(self) -> Membership:
        """As what a transaction commits for this member: see ``FencedWriter.write``."""
        its = self._kafka.group_metadata()
        return Membership(self._own_group, its.generation_id, its.member_id, its.group_instance_id)

    def commit(self, offsets: Mapping[base.TopicPartition, int]) -> None:
        self._check_open()
        if not offsets:
            return
        lost = sorted(set(offsets) - self.assignment())
        if lost:
            raise LogError(f"{lost[0][0]}/{lost[0][1]} no longer belongs to this consumer: nothing was committed")
        wanted = {self._at(at): OffsetAndMetadata(offset, "", -1) for at, offset in offsets.items()}
        try:
            self._kafka.commit(wanted, timeout_ms=int(REQUEST_SECONDS * 1000))
        except (kafka_errors.CommitFailedError, kafka_errors.FencedInstanceIdError) as error:
            raise LogError(
                f"the group {self._group!r} was shared out anew and this no longer belongs to this consumer: "
                "nothing was committed"
            ) from error
        except kafka_errors.KafkaError as error:
            raise self._clients.explain(error, f"committing offsets of the group {self._group!r}") from error

    def seek(self, partition: base.TopicPartition, offset: int) -> None:
        at = self._assigned(partition)
        self._lines.pop(at, None)
        self._kafka.seek(at, max(0, offset))

    def position(self, partition: base.TopicPartition) -> int:
        at = self._assigned(partition)
        if at in self._lines:
            return self._lines[at][0].offset
        with self._clients.explained(f"asking where {at.topic}/{at.partition} is read"):
            return int(self._kafka.position(at, timeout_ms=int(REQUEST_SECONDS * 1000)) or 0)

    def _assigned(self, partition: base.TopicPartition) -> TopicPartition:
        at = self._at(partition)
        if at not in self._kafka.assignment():
            raise LogError(f"{partition[0]}/{partition[1]} is not assigned to this consumer: see assignment()")
        return at

    def _at(self, partition: base.TopicPartition) -> TopicPartition:
        if partition[0] not in self._topics:
            raise LogError(f"this consumer does not read {partition[0]}/{partition[1]}")
        return TopicPartition(self._clients.address.qualified(partition[0]), partition[1])

    def assignment(self) -> frozenset[base.TopicPartition]:
        own = self._clients.address.own
        return frozenset((own(at.topic), at.partition) for at in self._kafka.assignment())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._log.forget(self)
        member_id = self._kafka.group_metadata().member_id
        with self._clients.explained(f"leaving the group {self._group!r}"):
            self._kafka.close(autocommit=False, timeout_ms=2000)
        if self._name and member_id:
            self._log.cluster.remove_member(self._group, member_id, self._clients.address.qualified(self._name))

    def _check_open(self) -> None:
        if self._closed:
            raise LogError("this consumer is closed")
