"""The one thread of a process that writes the embedded log: group commit.

::

    append, commit, join …  ──Job──▶ queue ──▶ writer thread ──one transaction──▶ log.db
      waits on its future ◀── resolved after COMMIT ──┘ └── notifies ``news``: consumers of this process wake

Callers never touch the writing connection. While one transaction waits for the disk, the next jobs gather, so
that the cost of making them durable is shared. Consumers of other processes see the commit by polling.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from everloop.errors import LogError
from everloop.log.base import NewRecord, Position
from everloop.log.sqlite.database import Database, WriteLock, block_id, row_id

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_JOBS = 2048
MAX_BYTES = 8 * 1_048_576
MAX_WAITING_BYTES = 128 * 1_048_576
STALLED_SECONDS = 15.0  # of one transaction, after which new work is refused instead of queued
WAIT_SECONDS = 30.0
LINGER_SECONDS = 0.001  # where callers come together: time for those just answered to join the next transaction
LINGER_SHARE = 0.1


class Transaction:
    """One group commit in the making. Rows are gathered, and written together at its end."""

    def __init__(self, connection: sqlite3.Connection, now: float) -> None:
        self.connection = connection
        self.now = now
        self._next: dict[int, int] = {}
        self._rows: list[tuple[int, str, float, str | None, bytes | None]] = []
        self._newest: dict[int, float] = {}

    def append(self, records: Sequence[NewRecord], partitions: dict[str, tuple[int, ...]]) -> list[Position]:
        """Give each record its offset. ``partitions`` has the partition ids of each topic, by number."""
        return [self._append(record, partitions[record.topic]) for record in records]

    def _append(self, record: NewRecord, ids: tuple[int, ...]) -> Position:
        number = record.partition(len(ids))
        partition = ids[number]
        offset = self._next.get(partition)
        if offset is None:
            (offset,) = self.connection.execute("SELECT next FROM partitions WHERE id = ?", (partition,)).fetchone()
        self._next[partition] = offset + 1
        when = record.time or self.now
        headers = json.dumps(dict(record.headers)) if record.headers else None
        self._rows.append((row_id(partition, offset), record.key, when, headers, record.value))
        block = block_id(partition, offset)
        self._newest[block] = max(when, self._newest.get(block, when))
        return Position(record.topic, number, offset)

    def flush(self) -> None:
        """Write the gathered rows."""
        if not self._rows:
            return
        execute = self.connection.executemany
        execute("INSERT INTO records (id, key, time, headers, value) VALUES (?, ?, ?, ?, ?)", self._rows)
        execute("UPDATE partitions SET next = ? WHERE id = ?", [(n, p) for p, n in self._next.items()])
        execute(
            "INSERT INTO blocks (id, newest, appended) VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE"
            " SET newest = max(newest, excluded.newest), appended = max(appended, excluded.appended)",
            [(block, newest, self.now) for block, newest in self._newest.items()],
        )


class Job(NamedTuple):
    """Something to do inside a transaction. It checks first and writes then: a LogError leaves nothing behind."""

    run: Callable[[Transaction], Any]
    future: Future[Any]
    size: int


class Writer:
    """Runs jobs in group commits, and a chore every so often. ``news`` is notified after each commit."""

    def __init__(self, database: Database, chore: Callable[[Transaction], None], chore_seconds: float) -> None:
        self._database = database
        self._chore = chore
        self._chore_seconds = chore_seconds
        self._jobs: deque[Job] = deque()
        self._waiting_bytes = 0
        self._closed = False
        self._began = math.inf
        self._arrived = threading.Condition()
        self.news = threading.Condition()
        self._lock = WriteLock(database.path)
        self._connection: sqlite3.Connection | None = None
        self._thread = threading.Thread(target=self._run, name="everloop-log-writer", daemon=True)
        self._thread.start()

    def submit(self, run: Callable[[Transaction], T], size: int = 0) -> Future[T]:
        """Have ``run`` done in the next transaction; the future resolves once that is durable."""
        job = Job(run, Future(), size)
        with self._arrived:
            if self._closed:
                raise LogError(f"the log {self._database.path} is closed")
            stalled = time.monotonic() - self._began
            if stalled <= STALLED_SECONDS and self._waiting_bytes + size <= MAX_WAITING_BYTES:
                self._jobs.append(job)
                self._waiting_bytes += size
                self._arrived.notify()
                return job.future
            held_up = self._held_up(stalled)
            given_up = self._take_back() if stalled > STALLED_SECONDS else []
        for waiting in given_up:
            waiting.future.set_exception(LogError(held_up))
        raise LogError(held_up)

    def _held_up(self, stalled: float) -> str:
        return (
            f"the log {self._database.path} is held up for {max(0, stalled):.0f} s, by its disk or by another process,"
            f" with {self._waiting_bytes >> 20} MB waiting: nothing was written; try again later"
        )

    def _take_back(self) -> list[Job]:
        """What waits behind a transaction that stalls, so that its callers hear of it too."""
        jobs = [job for job in self._jobs if job.future.set_running_or_notify_cancel()]
        self._jobs.clear()
        self._waiting_bytes = 0
        return jobs

    def do(self, run: Callable[[Transaction], T]) -> T:
        """As :meth:`submit`, and wait for what ``run`` returned."""
        return self.wait(self.submit(run))

    def wait(self, future: Future[T]) -> T:
        """The result of a job. Raises LogError where it does not come; the message says whether it may come later."""
        try:
            return future.result(WAIT_SECONDS)
        except TimeoutError:
            state = "nothing was written" if future.cancel() else "it may be written yet; ids make a retry harmless"
            raise LogError(
                f"the log {self._database.path} gave no answer for {WAIT_SECONDS:g} s, held up by its disk or by"
                f" another process: {state}"
            ) from None

    def close(self, timeout: float = 30) -> None:
        """Finish what waits, then stop."""
        with self._arrived:
            self._closed = True
            self._arrived.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            jobs = self._take(due)
            if time.monotonic() >= due:
                jobs.append(Job(self._chore, Future(), 0))
                due = time.monotonic() + self._chore_seconds
            if jobs:
                self._began = time.monotonic()
                self._write(jobs)
                took, self._began = time.monotonic() - self._began, math.inf
                if len(jobs) > 1:
                    time.sleep(min(LINGER_SECONDS, took * LINGER_SHARE))
            elif self._closed:
                break
        with self._lock.held():  # the last connection's checkpoint is a write too
            if self._connection is not None:
                self._connection.close()
        self._lock.close()

    def _take(self, due: float) -> list[Job]:
        """The jobs of the next transaction: those that wait, up to a limit; none when the chore is due."""
        taken: list[Job] = []
        size = 0
        with self._arrived:
            if not self._jobs and not self._closed:
                self._arrived.wait(max(0.0, due - time.monotonic()))
            while self._jobs and len(taken) < MAX_JOBS and size < MAX_BYTES:
                job = self._jobs.popleft()
                size += job.size
                if job.future.set_running_or_notify_cancel():
                    taken.append(job)
            self._waiting_bytes -= size
        return taken

    def _write(self, jobs: list[Job]) -> None:
        try:
            with self._lock.held():
                outcomes = self._commit(jobs)
        except Exception as error:
            if not isinstance(error, sqlite3.Error | OSError):
                logger.exception("the log's writer failed")
            explained = self._database.explain(error)
            outcomes = [explained] * len(jobs)
        with self.news:
            self.news.notify_all()
        for job, outcome in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)

    def _commit(self, jobs: list[Job]) -> list[Any]:
        """Do the jobs in one transaction: all of them are durable on return, but those with a LogError of their own."""
        if self._connection is None:
            self._connection = self._database.writer()
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            transaction = Transaction(connection, time.time())
            outcomes = [_attempt(job, transaction) for job in jobs]
            transaction.flush()
            connection.execute("COMMIT")
        except BaseException:
            self._abandon(connection)
            raise
        return outcomes

    def _abandon(self, connection: sqlite3.Connection) -> None:
        """Roll back; where even that fails, the next transaction starts on a new connection."""
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):
                connection.close()
            self._connection = None


def _attempt(job: Job, transaction: Transaction) -> Any:
    try:
        return job.run(transaction)
    except LogError as error:
        return error
