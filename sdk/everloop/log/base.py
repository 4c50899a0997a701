"""The log port: ordered, durable records by topic and partition. Two backends: SQLite here, Kafka on a cluster.

Promises, held for every backend by ``tests/ports/test_log.py``:

- A record is durable when :meth:`Log.append` returns (or its future resolves), and never before.
- Records of one key keep their order: same topic and key (or ``route``), same partition.
- A group reads at least once. Two consumers of a group share its partitions; neither gets the other's.
- A committed offset is the next one to read, and survives restarts.
- Offsets count up; there may be gaps. A read that finds nothing has reached the end.
- ``value`` None is a tombstone: the key has no value any more.

All calls are blocking and thread-safe; asyncio code calls :meth:`Log.append_soon`, or a thread.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from everloop.errors import LogError, RecordTooLarge


class NewRecord(NamedTuple):
    topic: str
    key: str
    value: bytes | None
    headers: Mapping[str, str] = {}
    time: float = 0.0
    """Event time, seconds since 1970, kept to the millisecond; 0: the backend sets its own."""
    route: str = ""
    """Decides the partition in place of the key; a key must always come by the same route. Not kept."""

    def partition(self, partitions: int) -> int:
        """Which one of so many it belongs to."""
        return partition_of(self.route or self.key, partitions)


class Position(NamedTuple):
    topic: str
    partition: int
    offset: int


class Record(NamedTuple):
    topic: str
    partition: int
    offset: int
    key: str
    value: bytes | None
    headers: Mapping[str, str]
    time: float

    @property
    def position(self) -> Position:
        return Position(self.topic, self.partition, self.offset)


TopicPartition = tuple[str, int]


def partition_of(key: str, partitions: int) -> int:
    """The partition of a key: CRC-32 modulo the number of partitions, the same in every process."""
    return zlib.crc32(key.encode()) % partitions


def checked_size(record: NewRecord, largest: int) -> int:
    """The size of a record in bytes. Raises RecordTooLarge above ``largest``, LogError where its time is none."""
    if not math.isfinite(record.time) or record.time < 0:
        raise LogError(f"a record's time must be finite seconds since 1970, not {record.time!r}")
    size = len(record.key.encode()) + len(record.value or b"")
    size += sum(len(name) + len(text) for name, text in record.headers.items())
    if size > largest:
        raise RecordTooLarge(
            f"a record for {record.topic!r} has {size:,} bytes, the log takes {largest:,}"
            " (log.max_record_bytes): put the body in the blob store and send the reference"
        )
    return size


class Consumer(Protocol):
    """One member of a group. Not thread-safe."""

    def poll(self, max_records: int = 500, timeout: float = 0.5) -> list[Record]:
        """Records of the assigned partitions, in offset order within each; waits up to ``timeout`` s for the first."""

    def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Store the next offset to read of each partition. Raises LogError where the partition is no longer ours."""

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Read next from ``offset`` (an embedded state's offset overrides the committed one)."""

    def position(self, partition: TopicPartition) -> int:
        """The next offset that a poll gives or looks at: past what it has found to be a gap. Raises LogError where
        the partition is not assigned. At the partition's end nothing is left to read: what ``lag`` 0 means."""

    def assignment(self) -> frozenset[TopicPartition]:
        """The partitions that this member reads now."""

    def close(self) -> None:
        """Leave the group; its partitions go to the others at once."""


class Log(Protocol):
    """A durable log. ``everloop.log.connect(url)`` opens one."""

    def append(self, records: Sequence[NewRecord]) -> list[Position]:
        """Write records; durable on return, in the order given within a key.

        Where it raises, some of the records may be written: trying again is harmless, since every record has an id.
        Raises RecordTooLarge (then nothing is written), LogFull, LogError; in bounded time, also without a broker.
        """

    def append_soon(self, records: Sequence[NewRecord]) -> Future[list[Position]]:
        """As ``append``, without blocking: group-committed with others; the future resolves once durable."""

    def consumer(self, group: str, topics: Sequence[str], *, start: str = "earliest", member: str = "") -> Consumer:
        """Join a group. ``start`` ("earliest" or "latest") holds where the group has no committed offset.

        ``member`` is a name of its own in the group: whoever joins with it takes the place of the one before at
        once, so that a restarted process does not wait for the session of its predecessor to end.
        """

    def read(self, topic: str, partition: int, offset: int = 0, max_records: int = 500) -> list[Record]:
        """Records from an offset on, outside any group: tails, replays, tests."""

    def partitions(self, topic: str) -> int:
        """How many partitions a topic has; it is created as declared in ``everloop.topics`` if it is new."""

    def end_offsets(self, topic: str) -> list[int]:
        """Where each partition ends: no record that can be read is at or beyond it."""

    def offset_at(self, topic: str, partition: int, time: float) -> int:
        """The first offset whose record has this event time or a later one; the end if there is none."""

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """Committed offsets by partition: what ``lag`` is computed from."""

    def close(self) -> None: ...
