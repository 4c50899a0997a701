"""The embedded log: the log port on one SQLite file, shared by all processes of a machine; no server.

::

    append_soon ─▶ writer thread ─▶ log.db ◀─ poll: PRAGMA data_version, or ``news`` in the writer's own process
    commit, join ─▶    (sqlite/writer.py)        each consumer, and each ``read``, on a connection of its own

Durable means that SQLite has synced its write-ahead log (``synchronous = FULL``). A kill at any moment leaves
whole transactions, and the kernel frees the writers' lock.
"""

from __future__ import annotations

import json
import math
import os
import queue
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from everloop.errors import LogError
from everloop.log.base import NewRecord, Position, Record, checked_size
from everloop.log.sqlite import groups, retention
from everloop.log.sqlite.consumer import EmbeddedConsumer
from everloop.log.sqlite.database import BLOCK_BITS, Database, block_id, offset_of, row_id
from everloop.log.sqlite.groups import Member
from everloop.log.sqlite.writer import Transaction, Writer
from everloop.topics import TOPICS

SESSION_SECONDS = 4.0  # without a heartbeat, after which a member's partitions go to the others
POLL_SECONDS = 600.0  # without a poll, after which a member counts as hung: its heartbeats end
CLEAN_EVERY = 60.0
FETCH_BYTES = 32 * 1_048_576  # of values in one poll or read, so that memory stays bounded


class EmbeddedLog:
    """See :class:`everloop.log.base.Log`. ``session`` (seconds) must be the same in all processes of a file."""

    def __init__(
        self,
        path: str | Path,
        *,
        partitions: int = 4,
        max_record_bytes: int = 1_048_576,
        retention_seconds: float = math.inf,
        max_bytes: int | None = None,
        session: float = SESSION_SECONDS,
    ) -> None:
        self.database = Database(Path(path), max_bytes)
        self.session = session
        self._new_partitions = partitions
        self._max_record_bytes = max_record_bytes
        self._retention = retention_seconds
        self._topics: dict[str, tuple[int, ...]] = {}
        self._polled: dict[str, float] = {}
        self._consumers: list[EmbeddedConsumer] = []
        self._lock = threading.Lock()
        self._readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        self._cleaned = -math.inf
        self._closed = False
        self.database.create()
        self.writer = Writer(self.database, self._chore, session / 4)

    def append(self, records: Sequence[NewRecord]) -> list[Position]:
        """All of the records or none."""
        return self.writer.wait(self.append_soon(records))

    def append_soon(self, records: Sequence[NewRecord]) -> Future[list[Position]]:
        size = sum(checked_size(record, self._max_record_bytes) for record in records)
        partitions = {topic: self.partition_ids(topic) for topic in {record.topic for record in records}}
        return self.writer.submit(lambda transaction: transaction.append(records, partitions), size)

    def consumer(
        self, group: str, topics: Sequence[str], *, start: str = "earliest", member: str = ""
    ) -> EmbeddedConsumer:
        if start not in ("earliest", "latest"):
            raise LogError(f"start is 'earliest' or 'latest', not {start!r}")
        if not topics:
            raise LogError(f"a consumer of group {group!r} needs at least one topic")
        identity = f"{group}/{os.getpid()}/{secrets.token_hex(6)}"
        consumer = EmbeddedConsumer(self, Member(identity, group, member, tuple(dict.fromkeys(topics))), start)
        with self._lock:
            self._consumers.append(consumer)
        self.alive(identity)
        return consumer

    def read(self, topic: str, partition: int, offset: int = 0, max_records: int = 500) -> list[Record]:
        with self.reading() as reader:
            return self.fetch(reader, self._partition_id(topic, partition), topic, partition, offset, max_records)

    def fetch(
        self, reader: sqlite3.Connection, partition: int, topic: str, number: int, offset: int, max_records: int
    ) -> list[Record]:
        """Records of the partition with this id, from ``offset`` on: at least one if there is any, up to 32 MB."""
        rows = reader.execute(
            "SELECT id, key, value, headers, time FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
            (row_id(partition, max(0, offset)), row_id(partition + 1, 0), max_records),
        )
        records: list[Record] = []
        size = 0
        for row, key, value, headers, when in rows:
            records.append(
                Record(topic, number, offset_of(row), key, value, json.loads(headers) if headers else {}, when)
            )
            size += len(value or b"")
            if size > FETCH_BYTES:
                break
        rows.close()
        return records

    def partitions(self, topic: str) -> int:
        return len(self.partition_ids(topic))

    def partition_ids(self, topic: str) -> tuple[int, ...]:
        """The ids of a topic's partitions, by number; the topic is made if it is new."""
        known = self._topics.get(topic)
        if known is None:
            known = self._find(topic) or self.writer.do(lambda t: self._create(t, topic))
            self._topics[topic] = known
        return known

    def _find(self, topic: str) -> tuple[int, ...]:
        with self.reading() as reader:
            return _partition_ids(reader, topic)

    def _create(self, transaction: Transaction, topic: str) -> tuple[int, ...]:
        connection = transaction.connection
        declared = TOPICS.get(topic)
        count = self._new_partitions if declared is None or declared.partitioned else 1
        compacted = declared is not None and declared.compacted
        row = (topic, count, compacted)
        if connection.execute("INSERT OR IGNORE INTO topics VALUES (?, ?, ?)", row).rowcount:
            connection.executemany(
                "INSERT INTO partitions (topic, number) VALUES (?, ?)", [(topic, number) for number in range(count)]
            )
        return _partition_ids(connection, topic)

    def _partition_id(self, topic: str, partition: int) -> int:
        ids = self.partition_ids(topic)
        if not 0 <= partition < len(ids):
            raise LogError(f"topic {topic!r} has partitions 0 to {len(ids) - 1}, not {partition}")
        return ids[partition]

    def end_offsets(self, topic: str) -> list[int]:
        self.partition_ids(topic)
        with self.reading() as reader:
            rows = reader.execute("SELECT next FROM partitions WHERE topic = ? ORDER BY number", (topic,))
            return [int(row[0]) for row in rows]

    def offset_at(self, topic: str, partition: int, time: float) -> int:
        """See the port. Blocks whose newest record is older are skipped, so one block at most is read."""
        number = self._partition_id(topic, partition)
        with self.reading() as reader:
            (end,) = reader.execute("SELECT next FROM partitions WHERE id = ?", (number,)).fetchone()
            block = reader.execute(
                "SELECT id FROM blocks WHERE id >= ? AND id < ? AND newest >= ? ORDER BY id LIMIT 1",
                (block_id(number, 0), block_id(number + 1, 0), time),
            ).fetchone()
            if block is None:
                return int(end)
            first = block[0] << BLOCK_BITS
            row = reader.execute(
                "SELECT min(id) FROM records WHERE id >= ? AND id < ? AND time >= ?",
                (first, row_id(number + 1, 0), time),
            ).fetchone()
            return int(end) if row[0] is None else offset_of(row[0])

    def committed(self, group: str, topic: str) -> dict[int, int]:
        self.partition_ids(topic)
        query = (
            "SELECT p.number, o.next FROM offsets o JOIN partitions p ON p.id = o.partition"
            " WHERE o.grp = ? AND p.topic = ?"
        )
        with self.reading() as reader:
            return {int(number): int(offset) for number, offset in reader.execute(query, (group, topic))}

    def close(self) -> None:
        with self._lock:
            self._closed = True
            consumers = list(self._consumers)
        for consumer in consumers:
            consumer.close()
        self.writer.close()
        while True:
            try:
                self._readers.get_nowait().close()
            except queue.Empty:
                return

    def alive(self, member: str) -> None:
        """A consumer of this process polls: its heartbeats go on."""
        self._polled[member] = time.monotonic()

    def forget(self, consumer: EmbeddedConsumer, member: str) -> None:
        self._polled.pop(member, None)
        with self._lock:
            self._consumers.remove(consumer)

    def _chore(self, transaction: Transaction) -> None:
        """Heartbeats of this process's consumers; and retention, by whichever process finds it due."""
        now = time.monotonic()
        polling = [member for member, polled in list(self._polled.items()) if now - polled < POLL_SECONDS]
        groups.beat(transaction.connection, polling, now)
        if math.isfinite(self._retention) and now - self._cleaned > CLEAN_EVERY:
            more = retention.clean(transaction.connection, transaction.now - self._retention)
            self._cleaned = -math.inf if more else now

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A reading connection for the length of one call."""
        if self._closed:
            raise LogError(f"the log {self.database.path} is closed")
        try:
            connection = self._readers.get_nowait()
        except queue.Empty:
            connection = self.database.reader()
        try:
            yield connection
        except sqlite3.Error as error:
            raise self.database.explain(error) from error
        finally:
            self._readers.put(connection)


def _partition_ids(connection: sqlite3.Connection, topic: str) -> tuple[int, ...]:
    rows = connection.execute("SELECT id FROM partitions WHERE topic = ? ORDER BY number", (topic,))
    return tuple(int(row[0]) for row in rows)
