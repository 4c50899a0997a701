"""The changelog of one partition's state on Kafka: what is written to it with each batch, and what is read back.

::

    records of a transaction, in order:   "/<key>" → value, or a tombstone     each entry that changed
                                          "mark"   → <next offset> <owner> <count>     the last of each transaction

The mark says how far the state is. Its owner is a name drawn for each writer, so no two commits have the same mark,
and a cache is that of the changelog where it has the newest one. Where it has an earlier one that is still there and
young, what follows it brings the cache up to date. An old one is not enough: compaction may keep it (where it stands
last in its segment) and take tombstones behind it, so that the cache would keep what was deleted.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from everloop.log.base import NewRecord, Record, TopicPartition
from everloop.log.kafka.declared import TOMBSTONE_SECONDS
from everloop.log.kafka.log import KafkaLog
from everloop.topics import CHANGELOG

MARK = "mark"
ENTRY = "/"
"""What the key of every entry of the state begins with."""
SOURCE = "source"
"""Header of a record: topic, partition and next offset of the records that the state is of."""
READ_AT_ONCE = 2000
FAR = 65_536  # offsets from the end, beyond which a mark is not looked for
YOUNG = TOMBSTONE_SECONDS / 2  # half of it is left for clocks that differ


class Written(NamedTuple):
    """What a transaction has for a changelog, each record with its partition, and the mark that it ends with."""

    placed: list[tuple[NewRecord, int]]
    mark: str


class Changelog:
    """That of the state of ``source`` for a handler. One thread."""

    def __init__(self, log: KafkaLog, handler: str, source: TopicPartition) -> None:
        self._log = log
        self._topic = CHANGELOG + handler
        self._source = source
        self._owner = secrets.token_hex(6)
        self._count = 0

    def written(self, changes: Mapping[str, bytes | None], follows: int) -> Written:
        """What to write for a state that changed, and is now of the records before the offset ``follows``."""
        self._count += 1
        mark = f"{follows} {self._owner} {self._count}"
        headers = {SOURCE: f"{self._source[0]}/{self._source[1]}/{follows}"}
        records = [NewRecord(self._topic, ENTRY + key, value, headers) for key, value in changes.items()]
        records.append(NewRecord(self._topic, MARK, mark.encode(), headers))
        return Written([(record, self._source[1]) for record in records], mark)

    def mark(self) -> str:
        """That of the last transaction; empty where there was none. It is among the last records, so read those."""
        end, back = self._log.end_offsets(self._topic)[self._source[1]], 16
        while True:
            start = max(0, end - back)
            marks = [record.value for record in self._read(start) if record.key == MARK and record.value]
            if marks or not start:
                return marks[-1].decode() if marks else ""
            back *= 16

    def next(self) -> int:
        """The offset that the newest mark tells; 0 where there is none."""
        return next_of(self.mark())

    def offset_of(self, mark: str) -> int | None:
        """Where a mark lies; None where it is not, or no longer, near the end, or tombstones behind it may be gone."""
        end, back = self._log.end_offsets(self._topic)[self._source[1]], 16
        while mark:
            start = max(0, end - back)
            for record in self._read(start):
                if record.key == MARK and record.value == mark.encode():
                    return record.offset if time.time() - record.time < YOUNG else None
            if not start or back >= FAR:
                break
            back *= 16
        return None

    def changes(self, after: int = -1) -> Iterator[tuple[str, bytes | None]]:
        """Every change that is kept behind an offset, oldest first: of those with one key the last counts."""
        for record in self._read(after + 1):
            if record.key.startswith(ENTRY):
                yield record.key.removeprefix(ENTRY), record.value

    def _read(self, start: int) -> Iterator[Record]:
        while found := self._log.read(self._topic, self._source[1], start, READ_AT_ONCE):
            yield from found
            start = found[-1].offset + 1


def next_of(mark: str) -> int:
    """The next offset that a mark tells."""
    return int(mark.split()[0]) if mark else 0


def writer_name(handler: str, source: TopicPartition) -> str:
    """Of the writer of a partition: whoever takes it fences whoever had it."""
    return f"{handler}-{source[0]}-{source[1]}"
