"""Runs a stream handler on the log. The steps of a batch, in this order:

1. read: poll the log; a newly assigned partition starts at the state's own offset, which overrides the group's
2. handle each record inside a savepoint, then flush; a record that can never be taken becomes a dead letter
3. append outputs and dead letters; durable
4. commit changes of the state and offsets in one transaction of ``state/<handler>.db``
5. commit the offsets to the log, for display

Killed before 4, the batch is handled again from the same state and gives the same outputs (at least once, with
idempotent effects); killed after it, it is done. What may pass by itself is tried again with backoff; then the
error leaves :meth:`Stream.run`, nothing of the batch is committed, and the process ends, to be started anew. A
record on which three processes gave up, for a reason inside the program, becomes a dead letter too.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everloop.errors import ContractError, LogError, RecordTooLarge, ServingError
from everloop.home import Home
from everloop.log.base import Consumer, Log, NewRecord, Record, TopicPartition
from everloop.stream import Handled, Handler
from everloop.wire import BlobStore
from prometheus_client import Counter, Gauge, Histogram

from services.dead_letters import dead_letter
from services.retry import Retry, Stopping
from services.state import StateStore, owned

if TYPE_CHECKING:
    from services.service import Service

__all__ = ["Retry", "StateStore", "Stream", "attach", "run_handler"]

logger = logging.getLogger(__name__)
SURROUNDINGS = (OSError, MemoryError, sqlite3.Error, LogError, ServingError)
"""Errors of the machine and of other services: they say nothing about the record, however long they last."""
GIVE_UP_AFTER = 3  # processes that failed on a record for another reason
REPORT_EVERY = 0.5  # seconds between commits to the log, which only display reads
POLL_SECONDS = 0.5
IDLE_EVERY = 1.0  # seconds between flushes while no record comes

RECORDS = Counter("everloop_handler_records", "Records handled, dead letters included", ["handler"])
OUTPUTS = Counter("everloop_handler_outputs", "Records appended, dead letters included", ["handler"])
DEAD = Counter("everloop_handler_dead_letters", "Records that could not be taken", ["handler"])
RETRIES = Counter("everloop_handler_retries", "Failed tries that were repeated", ["handler"])
LAG = Gauge("everloop_handler_lag_records", "Records not handled yet", ["handler"])
AGE = Gauge("everloop_handler_progress_age_seconds", "Since the last record, or look at an empty log", ["handler"])
SECONDS = Histogram(
    "everloop_handler_record_seconds",
    "One record in the handler, retries included",
    ["handler"],
    buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)


class Stream:
    """One handler, bound to a log: ``run`` in a thread; ``status``, ``lag``, ``age`` and ``trouble`` from any.

    ``linger`` (seconds) gathers records into a larger batch before ``flush``, ``max_records`` bounds it. Partitions
    that the state has not seen are read from their beginning, so that a state that was deleted is built anew.
    """

    def __init__(
        self,
        handler: Handler,
        log: Log,
        state_folder: Path,
        *,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.time,
        blobs: BlobStore | None = None,
        max_records: int = 500,
        linger: float = 0.0,
        retry: Retry = Retry(),  # noqa: B008 (immutable)
        stuck_after: float = 300.0,
    ) -> None:
        self.handler = handler
        self.name = handler.name
        self._log = log
        self._path = state_folder / f"{handler.name}.db"
        self._blobs = blobs or BlobStore(state_folder.parent / "blobs")
        self._stop = stop or threading.Event()
        self._clock = clock
        self._max_records = max_records
        self._linger = linger
        self._patience = POLL_SECONDS
        self._retry = retry
        self._stuck_after = stuck_after
        self._next: dict[TopicPartition, int] = {}  # the next offset to handle: what the state's offsets say
        self._unread: dict[TopicPartition, int] = {}  # the next offset to read: ahead of it within a batch
        self._reported: dict[TopicPartition, int] = {}
        self._report_due = 0.0
        self._idle_due = 0.0
        self._running = False
        self._progress = time.monotonic()
        self._dead_letters = 0
        self.handled = 0  # records, dead letters included, since the start
        self._last_cause = ""
        self._state: StateStore
        self._consumer: Consumer
        self._seconds = SECONDS.labels(self.name)  # looked up once: each record is timed
        self._failed = RETRIES.labels(self.name).inc
        LAG.labels(self.name).set_function(self._shown_lag)
        AGE.labels(self.name).set_function(self.age)

    def run(self, *, until_idle: bool = False) -> None:
        """Handle records until ``stop`` is set (``until_idle``: or until there is none left).

        Raises what did not pass by itself; nothing of that batch is committed, so end the process.
        """
        with owned(self._path, self._stop) as mine:
            if not mine:
                return
            self._progress, self._running = time.monotonic(), True
            self._patience = 0.0 if until_idle else POLL_SECONDS
            self._state = StateStore(self._path)
            # The lock says that no other process runs this handler, so its predecessor's membership is void.
            self._consumer = self._log.consumer(self.name, self.handler.topics, member=self.name)
            try:
                self._loop(until_idle)
            except Stopping:
                logger.info("%s: stopped between two tries; the next start handles this batch again", self.name)
            finally:
                self._running = False
                self._state.close()
                self._close_consumer()

    def _loop(self, until_idle: bool) -> None:
        while not self._stop.is_set():
            handled = self.step()
            if until_idle and not handled.records and not self.lag():
                break
        self._report(now=True)

    def _close_consumer(self) -> None:
        try:
            self._consumer.close()
        except LogError as error:
            logger.warning("%s: could not leave its group: %s", self.name, error)

    def step(self) -> Handled:
        """Read and handle one batch; where there is nothing to read, flush about once a second."""
        records = self._read()
        self._progress = time.monotonic()
        if not records and self._progress < self._idle_due:
            self._report()
            return Handled(0, 0, 0)
        self._idle_due = self._progress + IDLE_EVERY
        handled = self._handle_batch(records)
        self._report()
        return handled

    def _read(self) -> list[Record]:
        records = self._poll(self._max_records, self._patience)
        end = time.monotonic() + self._linger
        while records and len(records) < self._max_records and not self._stop.is_set():
            left = end - time.monotonic()
            if left <= 0:
                break
            records += self._poll(self._max_records - len(records), left)
        return records

    def _poll(self, max_records: int, timeout: float) -> list[Record]:
        records = self._attempt("reading", lambda: self._consumer.poll(max_records, timeout))
        assigned = self._consumer.assignment()
        new = assigned - self._next.keys()
        for gone in self._next.keys() - assigned:
            del self._next[gone]
        if new:
            known = self._state.offsets()
            for partition in new:
                self._next[partition] = self._unread[partition] = known.get(partition, 0)
                self._consumer.seek(partition, self._next[partition])
        return [record for record in records if record[:2] not in new and self._is_next(record)]

    def _is_next(self, record: Record) -> bool:
        """Whether it was not read before: a member that was taken for dead reads on from its reported offsets."""
        partition = (record.topic, record.partition)
        if partition not in self._next or record.offset < self._unread[partition]:
            return False
        self._unread[partition] = record.offset + 1
        return True

    def _handle_batch(self, records: list[Record]) -> Handled:
        """Steps 2 to 4 of the module's list; one record at a time where an output is too large for the log."""
        try:
            return self._try_batch(records)
        except RecordTooLarge as error:
            self._state.discard()
            if not records:
                raise
            if len(records) == 1:
                return self._commit(records, [], self._bury(records[0], error))
        done = [self._handle_batch([record]) for record in records]
        return Handled(*(sum(counts) for counts in zip(*done, strict=True)))

    def _try_batch(self, records: list[Record]) -> Handled:
        outputs: list[NewRecord] = []
        letters: list[NewRecord] = []
        taken = 0
        for record in records:
            if self._stop.is_set():
                break
            self._handle(record, outputs, letters)
            taken += 1
            self._progress = time.monotonic()
        outputs += self._attempt("flush", self._flush)
        return self._commit(records[:taken], outputs, letters)

    def _handle(self, record: Record, outputs: list[NewRecord], letters: list[NewRecord]) -> None:
        def step() -> list[NewRecord]:
            with self._state.savepoint():
                return self.handler.handle(self._state, record, self._clock())

        with self._seconds.time():
            try:
                outputs += self._attempt(f"{record.topic}/{record.partition}/{record.offset}", step)
            except ContractError as error:
                letters += self._bury(record, error)
            except Stopping:
                raise
            except Exception as error:
                if isinstance(error, SURROUNDINGS) or self._state.count_failure(record.position) < GIVE_UP_AFTER:
                    raise
                letters += self._bury(record, error)

    def _flush(self) -> list[NewRecord]:
        with self._state.savepoint():
            return self.handler.flush(self._state, self._clock())

    def _bury(self, record: Record, error: Exception) -> list[NewRecord]:
        """The dead letter of a record; none for one that is a dead letter itself, or it would never end."""
        DEAD.labels(self.name).inc()
        self._dead_letters += 1
        self._last_cause = f"{type(error).__name__}: {error}"
        position = f"{record.topic}/{record.partition}/{record.offset}"
        logger.error("%s: %s becomes a dead letter: %s", self.name, position, self._last_cause)
        return dead_letter(self.name, record, error, self._clock(), self._blobs)

    def _commit(self, records: list[Record], outputs: list[NewRecord], letters: list[NewRecord]) -> Handled:
        new = [*outputs, *letters]
        if new:
            self._attempt("appending", lambda: self._log.append(new), permanent=(RecordTooLarge,))
        offsets = {(record.topic, record.partition): record.offset + 1 for record in records}
        if offsets or self._state.changed:
            self._attempt("committing state", lambda: self._state.commit(offsets))
        self._next.update(offsets)
        RECORDS.labels(self.name).inc(len(records))
        self.handled += len(records)
        OUTPUTS.labels(self.name).inc(len(new))
        return Handled(len(records), len(outputs), len(letters))

    def _attempt(self, what: str, step: Callable[[], Any], permanent: tuple[type[Exception], ...] = ()) -> Any:
        return self._retry.call(
            f"{self.name}: {what}",
            step,
            self._stop,
            permanent=(ContractError, *permanent),
            failed=self._failed,
        )

    def _report(self, now: bool = False) -> None:
        """Step 5. A partition that another member took meanwhile is that one's to report; the state decides."""
        if self._next == self._reported or (time.monotonic() < self._report_due and not now):
            return
        self._report_due = time.monotonic() + REPORT_EVERY
        try:
            self._consumer.commit(self._next)
            self._reported = dict(self._next)
        except LogError as error:
            logger.warning("%s: offsets not shown in the log: %s", self.name, error)

    def lag(self) -> int:
        """Records of the assigned partitions that are not handled yet."""
        ends = {topic: self._log.end_offsets(topic) for topic in self.handler.topics}
        return sum(max(0, ends[topic][partition] - offset) for (topic, partition), offset in list(self._next.items()))

    def _shown_lag(self) -> float:
        """For metrics, which are asked for also while the log is closed."""
        try:
            return self.lag()
        except LogError:
            return math.nan

    def age(self) -> float:
        """Seconds since the last record was done, or the log was found empty; 0 while another process runs it."""
        return time.monotonic() - self._progress if self._running else 0.0

    def trouble(self) -> str | None:
        """For liveness: one sentence where the handler has not moved for ``stuck_after`` seconds."""
        if self.age() < self._stuck_after:
            return None
        return f"handler {self.name} has not moved for {self.age():.0f} s with {self.lag()} records to go"

    def status(self) -> dict[str, Any]:
        offsets = {f"{topic}/{partition}": offset for (topic, partition), offset in sorted(self._next.items())}
        return {
            "lag": self.lag(),
            "progress_age": round(self.age(), 3),
            "dead_letters": self._dead_letters,
            "last_cause": self._last_cause,
            "offsets": offsets,
        }


def run_handler(
    handler: Handler,
    log: Log,
    state_folder: Path,
    *,
    stop: threading.Event | None = None,
    until_idle: bool = False,
    **options: Any,
) -> Stream:
    """Run a handler in this thread (see :class:`Stream` for the options); returns it once it has stopped."""
    stream = Stream(handler, log, state_folder, stop=stop, **options)
    stream.run(until_idle=until_idle)
    return stream


def attach(service: Service, handler: Handler, log: Log, home: Home, **options: Any) -> Stream:
    """Run a handler as a loop of a service, with its liveness and status."""
    stream = Stream(handler, log, home.folder("state"), stop=service.stop, blobs=home.blobs, **options)
    service.loop(handler.name, stream.run)
    service.check(handler.name, stream.trouble)
    service.describe(handler.name, stream.status)
    return stream
