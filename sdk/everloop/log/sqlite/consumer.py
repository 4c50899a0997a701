"""A consumer of the embedded log: one member of a group, with its partitions and where it reads next in each."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from everloop.errors import LogError
from everloop.log.base import Record, TopicPartition
from everloop.log.sqlite import groups
from everloop.log.sqlite.groups import Claims, Member
from everloop.log.sqlite.writer import Transaction

if TYPE_CHECKING:
    from everloop.log.embedded import EmbeddedLog

BUSY_SECONDS = 0.004  # between looks at the file while records come in
IDLE_SECONDS = 0.04  # and once there was none for a second: a sleeping consumer takes 0.4% of a core
Step = Callable[[sqlite3.Connection, Member, float, float], Claims]


class EmbeddedConsumer:
    """See :class:`everloop.log.base.Consumer`. Made by ``EmbeddedLog.consumer``; not thread-safe."""

    def __init__(self, log: EmbeddedLog, member: Member, start: str) -> None:
        self._log = log
        self._member = member
        self._start = start
        self._names: dict[int, TopicPartition] = {
            partition: (topic, number)
            for topic in member.topics
            for number, partition in enumerate(log.partition_ids(topic))
        }
        self._ids = {name: partition for partition, name in self._names.items()}
        self._claims: Claims = {}
        self._next: dict[int, int] = {}
        self._turn = 0
        self._epoch = -1
        self._seen = -1
        self._looked = 0.0
        self._last_record = 0.0
        self._closed = False
        self._reader = log.database.reader()
        self._take_part(groups.join)

    def _take_part(self, step: Step = groups.settle) -> None:
        """Join or settle in a transaction, and read on from where the group stands for what is newly ours."""
        log, member = self._log, self._member

        def run(transaction: Transaction) -> tuple[int, Claims, dict[int, int]]:
            connection = transaction.connection
            claims = step(connection, member, time.monotonic(), log.session)
            new = [p for p, epoch in claims.items() if self._claims.get(p) != epoch]
            starts = groups.start_offsets(connection, member.group, new, self._start)
            return groups.epoch_of(connection, member.group), claims, starts

        self._epoch, self._claims, starts = log.writer.do(run)
        self._next = {p: starts[p] if p in starts else self._next[p] for p in self._claims}
        self._looked = time.monotonic()
        self._seen = -1

    def poll(self, max_records: int = 500, timeout: float = 0.5) -> list[Record]:
        self._check_open()
        self._log.alive(self._member.id)
        deadline = time.monotonic() + timeout
        while True:
            try:
                records = self._look(max_records)
            except sqlite3.Error as error:
                raise self._log.database.explain(error) from error
            now = time.monotonic()
            if records:
                self._last_record = now
                return records
            if now >= deadline:
                return []
            pause = min(IDLE_SECONDS, max(BUSY_SECONDS, (now - self._last_record) * IDLE_SECONDS))
            with self._log.writer.news:
                self._log.writer.news.wait(min(pause, deadline - now))

    def _look(self, max_records: int) -> list[Record]:
        """What there is to read now; cheap where nothing was committed since the last look."""
        (version,) = self._reader.execute("PRAGMA data_version").fetchone()
        overdue = time.monotonic() - self._looked > self._log.session / 2
        if version == self._seen and not overdue:
            return []
        if self._group_changed(overdue):
            self._take_part()
        records = self._fetch(max_records)
        self._seen = -1 if records else version
        return records

    def _group_changed(self, overdue: bool) -> bool:
        if groups.epoch_of(self._reader, self._member.group) != self._epoch:
            return True
        if not overdue:
            return False
        self._looked = time.monotonic()
        return bool(groups.expired(self._reader, self._member.group, self._looked, self._log.session))

    def _fetch(self, max_records: int) -> list[Record]:
        """Records of our partitions: an equal part of ``max_records`` each, the rest to those that have more."""
        waiting = [p for p, end in self._ends().items() if end > self._next[p]]
        self._turn += 1
        first = self._turn % len(waiting) if waiting else 0
        records: list[Record] = []
        for index, partition in enumerate(waiting[first:] + waiting[:first]):
            share = -(-(max_records - len(records)) // (len(waiting) - index))
            found = self._log.fetch(self._reader, partition, *self._names[partition], self._next[partition], share)
            if found:
                self._next[partition] = found[-1].offset + 1
            records += found
        return records

    def _ends(self) -> dict[int, int]:
        marks = ",".join("?" * len(self._claims))
        query = f"SELECT id, next FROM partitions WHERE id IN ({marks}) ORDER BY id"
        return {int(p): int(end) for p, end in self._reader.execute(query, tuple(self._claims))}

    def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        self._check_open()
        if not offsets:
            return
        wanted = {self._id(name): offset for name, offset in offsets.items()}
        self._log.writer.do(
            lambda transaction: groups.commit(transaction.connection, self._member, self._claims, wanted)
        )

    def seek(self, partition: TopicPartition, offset: int) -> None:
        wanted = self._id(partition)
        if wanted not in self._claims:
            raise LogError(f"{partition[0]}/{partition[1]} is not assigned to this consumer: see assignment()")
        self._next[wanted] = max(0, offset)
        self._seen = -1

    def position(self, partition: TopicPartition) -> int:
        wanted = self._id(partition)
        if wanted not in self._claims:
            raise LogError(f"{partition[0]}/{partition[1]} is not assigned to this consumer: see assignment()")
        return self._next[wanted]

    def _id(self, name: TopicPartition) -> int:
        try:
            return self._ids[name]
        except KeyError:
            raise LogError(f"this consumer does not read {name[0]}/{name[1]}") from None

    def assignment(self) -> frozenset[TopicPartition]:
        return frozenset(self._names[p] for p in self._claims)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._log.forget(self, self._member.id)
        self._reader.close()
        self._log.writer.do(
            lambda transaction: groups.remove(transaction.connection, self._member.group, [self._member.id])
        )

    def _check_open(self) -> None:
        if self._closed:
            raise LogError("this consumer is closed")
