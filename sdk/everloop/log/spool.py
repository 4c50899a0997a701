"""The spool before a log that may be away: records of one topic are durable here first, and are handed on in order.

::

    append_soon ─▶ Room ─▶ group commit (sqlite/writer.py), synced ─▶ the future: acknowledged
                                      │ wakes
    drain (one thread): window ◀── events.db ──▶ target.append_soon ──all acknowledged──▶ deleted here
                          └────────── tried again, the same one ◀── LogError

The embedded log's file and writer, with one partition: what came first is handed on first, whoever wrote it. One
drainer of a file at a time; the kernel frees a dead one's lock, and the next begins with what was left. A window that
was handed on and not deleted (a kill between the two) is handed on again: its ids are the same.

What the target never takes because of its size is set aside in the file, and tried once more at the next start: it
stops nobody. Whatever else the target refuses waits here until it is mended, and :meth:`Spool.state` says why.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from everloop.errors import EverloopError, LogError, LogFull, LogRefused, RecordTooLarge
from everloop.log.base import NewRecord, Position, Record, checked_size
from everloop.log.embedded import EmbeddedLog
from everloop.log.sqlite.database import PAGE_BYTES, block_id, row_id
from everloop.log.sqlite.writer import Transaction

logger = logging.getLogger(__name__)
WINDOW = 500  # records handed on at once; of their bytes, what the embedded log reads at once
GATHER = 0.1  # seconds for which the next window fills: fewer and larger ones cost much less
IDLE = 1.0
PAUSE = 1.0  # between two tries
QUIET = 5.0  # seconds without an acknowledgement after which it is said
HUNG = 120.0  # and after which the target is not coming back: it gives up by itself before
FINISH = 3.0  # at a stop, for what is left and goes through
RESERVE = 67_108_864  # bytes that stay free, on the disk or in the file: deleting and checkpoints need some
ASIDE = "undeliverable"
SPOOLED = "spooled"
"""Header, here alone: when the record was acknowledged, seconds since 1970."""


class Target(Protocol):
    """A log as far as the spool needs it. ``rebuilds``: clients that it threw away."""

    @property
    def rebuilds(self) -> int: ...

    def append_soon(self, records: Sequence[NewRecord]) -> Future[list[Position]]: ...


class Hung(EverloopError):
    """The target gave neither an acknowledgement nor an error: end the process."""


@dataclass(frozen=True)
class SpoolState:
    """``bytes``: of the file, without free pages. ``oldest``: seconds that the first one waits.

    ``drained``: records, by this process. ``aside``: records that the target finds too large. ``refused``: what a
    person has to mend; ``away``: what is said while the target does not answer.
    """

    records: int = 0
    bytes: int = 0
    oldest: float = 0.0
    drained: int = 0
    rebuilds: int = 0
    aside: int = 0
    refused: str | None = None
    away: str | None = None


class Room:
    """Whether a record fits below the cap and on the disk. Used inside transactions, by the writer's thread."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._transaction: Transaction | None = None
        self._gathered = 0  # in this transaction, which writes its rows at its end

    def take(self, transaction: Transaction, size: int) -> None:
        """Raises LogFull."""
        if transaction is not self._transaction:
            self._transaction, self._gathered = transaction, 0
        used, free = file_bytes(transaction.connection)
        held = used + self._gathered
        if held + size > self._max_bytes:
            raise LogFull(
                f"the spool {self._path} holds {held:,} bytes that the log does not take now, and log.spool_bytes "
                f"allows {self._max_bytes:,}; nothing was written"
            )
        if shutil.disk_usage(self._path.parent).free + free < RESERVE:
            raise LogFull(f"less than {RESERVE >> 20} MB are free on the disk of {self._path}; nothing was written")
        self._gathered += size


def file_bytes(connection: sqlite3.Connection) -> tuple[int, int]:
    """(in use, free for what comes next): the file stays as large as it ever was."""
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    return (pages - free) * PAGE_BYTES, free * PAGE_BYTES


class Spool:
    """See the module. ``topic``: of every record, which goes by its key. :meth:`drain` runs in a thread of its own."""

    def __init__(self, path: Path, target: Target, topic: str, *, max_record_bytes: int, max_bytes: int) -> None:
        self._path = path
        self._target = target
        self._topic = topic
        self._max_record_bytes = max_record_bytes
        self._held = EmbeddedLog(path, partitions=1, max_record_bytes=max_record_bytes)
        self._ids = {name: self._held.partition_ids(name) for name in (topic, ASIDE)}
        self._room = Room(path, max_bytes)
        self._arrived = threading.Event()
        self._stop = threading.Event()
        self._finish_by = 0.0
        self._drained = 0
        self._refused: str | None = None
        self._away: str | None = None

    def append_soon(self, records: Sequence[NewRecord]) -> Future[list[Position]]:
        """As the log's; the positions are the spool's."""
        size = sum(checked_size(record, self._max_record_bytes) for record in records)
        now = f"{time.time():.3f}"
        marked = [record._replace(headers={**record.headers, SPOOLED: now}) for record in records]

        def write(transaction: Transaction) -> list[Position]:
            self._room.take(transaction, size)
            return transaction.append(marked, self._ids)

        written = self._held.writer.submit(write, size)
        written.add_done_callback(lambda _: self._arrived.set())
        return written

    def drain(self) -> None:
        """Hand on what comes, until :meth:`stop`. Raises Hung; anything else that it raises is a mistake in it."""
        with self._alone() as mine:
            if mine:
                self._try_aside()
                while window := self._window():
                    self._deliver(window)
                    if len(window) < WINDOW:
                        self._stop.wait(GATHER)

    def stop(self) -> None:
        """The drainer ends soon: it hands on what is left as long as that goes well, for 3 s at most."""
        self._finish_by = time.monotonic() + FINISH
        self._stop.set()
        self._arrived.set()

    def close(self) -> None:
        """After the drainer has ended."""
        self._held.close()

    def state(self) -> SpoolState:
        """Read from the file, whoever wrote it. Raises LogError."""
        first = self._held.read(self._topic, 0, 0, 1)
        (end,) = self._held.end_offsets(self._topic)
        (partition,) = self._ids[ASIDE]
        with self._held.reading() as connection:
            used, _ = file_bytes(connection)
            query = "SELECT count(*) FROM records WHERE id BETWEEN ? AND ?"
            (aside,) = connection.execute(query, (row_id(partition, 0), row_id(partition + 1, 0) - 1)).fetchone()
        return SpoolState(
            records=end - first[0].offset if first else 0,
            bytes=used,
            oldest=max(0.0, time.time() - float(first[0].headers[SPOOLED])) if first else 0.0,
            drained=self._drained,
            rebuilds=self._target.rebuilds,
            aside=int(aside),
            refused=self._refused,
            away=self._away,
        )

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """True once this process is the only drainer; False where it was stopped before."""
        descriptor = os.open(f"{self._path}-drainer", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not (mine := _locked(descriptor)) and not self._stop.wait(0.05):
                pass
            yield mine
        finally:
            os.close(descriptor)

    def _window(self) -> list[Record]:
        """The first records, once there are any; empty at the end."""
        while not self._over():
            self._arrived.clear()
            found = self._held.read(self._topic, 0, 0, WINDOW)
            if found:
                return found
            if self._stop.is_set():
                break
            self._arrived.wait(IDLE)
        return []

    def _over(self) -> bool:
        """Whether to end now: stopped, and either late or not getting anywhere."""
        troubled = self._refused or self._away
        return self._stop.is_set() and (bool(troubled) or time.monotonic() > self._finish_by)

    def _deliver(self, window: Sequence[Record]) -> None:
        """Hand on and delete; returns without having done so only at the end."""
        while not self._over():
            try:
                if self._handed_on(window):
                    self._drop(window)
                    self._drained += len(window)
                return
            except RecordTooLarge as error:
                if len(window) == 1:
                    self._set_aside(window[0], error)
                else:  # one of them; each by itself, and in order
                    for record in window:
                        self._deliver([record])
                return
            except LogError as error:
                self._tell(error)
                self._stop.wait(PAUSE)

    def _handed_on(self, window: Sequence[Record]) -> bool:
        """Whether the target has acknowledged all; False: it is over before. Raises LogError, Hung."""
        future = self._target.append_soon([_as_new(record, self._topic) for record in window])
        began = time.monotonic()
        while not self._over():
            try:
                future.result(0.2)
            except TimeoutError:
                self._check(time.monotonic() - began)
                continue
            self._recovered()
            return True
        return False

    def _check(self, waited: float) -> None:
        if waited > HUNG:
            raise Hung(f"neither an acknowledgement nor an error for {waited:.0f} s")
        if waited > QUIET and self._away is None and self._refused is None:
            self._tell(LogError(f"nothing was acknowledged for {QUIET:g} s"))

    def _tell(self, error: LogError) -> None:
        """Say it where it is new: one line for each trouble."""
        before = self._refused or self._away
        self._refused, self._away = (str(error), None) if isinstance(error, LogRefused) else (None, str(error))
        if before is None or (self._refused and before != self._refused):
            logger.warning("events wait in the spool %s, requests are served: %s", self._path, error)

    def _recovered(self) -> None:
        if self._refused or self._away:
            logger.warning("events go from the spool %s to the log again", self._path)
        self._refused = self._away = None

    def _drop(self, window: Sequence[Record]) -> None:
        self._commit(lambda transaction: _delete(transaction, self._ids, window))

    def _set_aside(self, record: Record, error: RecordTooLarge) -> None:
        logger.error("an event (%s) is set aside in %s: %s", record.headers.get("id"), self._path, error)
        kept = NewRecord(ASIDE, record.key, record.value, record.headers, record.time)

        def move(transaction: Transaction) -> None:
            _delete(transaction, self._ids, [record])
            transaction.append([kept], self._ids)

        self._commit(move)

    def _commit(self, run: Callable[[Transaction], None]) -> None:
        """Durable on return; tried until then, or until the end."""
        while True:
            try:
                return self._held.writer.do(run)
            except LogError as error:  # the disk is full of other things, perhaps
                self._tell(error)
                if self._stop.wait(PAUSE):
                    return None

    def _try_aside(self) -> None:
        """Once: a person may have raised the limit."""
        offset = 0
        while records := self._held.read(ASIDE, 0, offset, WINDOW):
            for record in records:
                offset = record.offset + 1
                try:
                    if self._handed_on([record]):
                        self._drop([record])
                except RecordTooLarge as error:
                    logger.error("an event (%s) stays set aside: %s", record.headers.get("id"), error)
                except LogError as error:
                    self._tell(error)
                    return


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _as_new(record: Record, topic: str) -> NewRecord:
    headers = {name: text for name, text in record.headers.items() if name != SPOOLED}
    return NewRecord(topic, record.key, record.value, headers, record.time)


def _delete(transaction: Transaction, ids: dict[str, tuple[int, ...]], window: Sequence[Record]) -> None:
    (partition,) = ids[window[0].topic]
    first, last = window[0].offset, window[-1].offset
    delete = transaction.connection.execute
    delete("DELETE FROM records WHERE id BETWEEN ? AND ?", (row_id(partition, first), row_id(partition, last)))
    blocks = (block_id(partition, 0), block_id(partition, last))
    delete("DELETE FROM blocks WHERE id >= ? AND id < ?", blocks)
