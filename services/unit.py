"""A batch of one handler against one state: what every runner does alike.

1. handle each record inside a savepoint, then flush; a record that can never be taken becomes a dead letter
2. hand outputs, dead letters and offsets to the runner's ``write``, which commits them with the state's changes

What may pass by itself is tried again with backoff; then the error leaves :meth:`Unit.take`, nothing of the batch is
committed, and the process ends, to be started anew. A record on which three processes gave up, for a reason inside
the program, becomes a dead letter too.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from everloop.errors import ContractError, LogError, RecordTooLarge, ServingError
from everloop.log.base import Log, NewRecord, Record, TopicPartition
from everloop.stream import Handled, Handler
from everloop.wire import BlobStore
from prometheus_client import Counter, Gauge, Histogram

from services.dead_letters import dead_letter
from services.retry import Retry, Stopping
from services.state import StateStore

logger = logging.getLogger(__name__)
SURROUNDINGS = (OSError, MemoryError, sqlite3.Error, LogError, ServingError)
"""Errors of the machine and of other services: they say nothing about the record, however long they last."""
GIVE_UP_AFTER = 3  # processes that failed on a record for another reason

RECORDS = Counter("everloop_handler_records", "Records handled, dead letters included", ["handler"])
OUTPUTS = Counter("everloop_handler_outputs", "Records appended, dead letters included", ["handler"])
DEAD = Counter("everloop_handler_dead_letters", "Records that could not be taken", ["handler"])
RETRIES = Counter("everloop_handler_retries", "Failed tries that were repeated", ["handler"])
LAG = Gauge("everloop_handler_lag_records", "Records not handled yet", ["handler"])
WAITING = Gauge(
    "everloop_handler_oldest_waiting_seconds",
    "Age of the oldest record that is not committed, by its time",
    ["handler"],
)
AGE = Gauge("everloop_handler_progress_age_seconds", "Since the last record, or look at an empty log", ["handler"])
SECONDS = Histogram(
    "everloop_handler_record_seconds",
    "One record in the handler, retries included",
    ["handler"],
    buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)
Write = Callable[[Sequence[NewRecord], Mapping[TopicPartition, int]], None]
"""Commits what a batch gave: its outputs, the state's changes, and the next offset of each partition."""


class Tally:
    """What the runner of a handler counts and shows, over all of its units. Thread-safe.

    ``stuck_after``: seconds without progress that mean trouble. ``running``: the runner says whether it runs here.
    Progress is the runner's, and that of each part (a partition with a unit of its own): the one that has stood still
    longest counts, so that none hides another.
    """

    def __init__(self, name: str, stuck_after: float) -> None:
        self.name = name
        self.running = False
        self.handled = 0  # records, dead letters included, since the start
        self.dead_letters = 0
        self.last_cause = ""
        self.progress = time.monotonic()  # when the last record was done, or there was none to do
        self._parts: dict[int, float] = {}  # the same of each part
        self.seconds = SECONDS.labels(name)  # looked up once: each record is timed
        self.retried = RETRIES.labels(name).inc
        self._stuck_after = stuck_after
        self._lock = threading.Lock()
        AGE.labels(name).set_function(self.age)

    def moved(self, part: int | None = None) -> None:
        """The runner has, or one of its parts."""
        if part is None:
            self.progress = time.monotonic()
        elif part in self._parts:
            self._parts[part] = time.monotonic()

    def divided(self, parts: Iterable[int]) -> None:
        """It has these parts from now on, and no others."""
        self._parts = dict.fromkeys(parts, time.monotonic())

    def age(self) -> float:
        """Seconds since the last record was done, or there was none to do; 0 while it does not run here."""
        oldest = min([self.progress, *self._parts.copy().values()])
        return time.monotonic() - oldest if self.running else 0.0

    def trouble(self, lag: Callable[[], int]) -> str | None:
        """For liveness: one sentence where the handler has not moved for ``stuck_after`` seconds."""
        if self.age() < self._stuck_after:
            return None
        return f"handler {self.name} has not moved for {self.age():.0f} s with {lag()} records to go"

    def status(self, lag: int, offsets: Mapping[str, int]) -> dict[str, Any]:
        return {
            "lag": lag,
            "progress_age": round(self.age(), 3),
            "dead_letters": self.dead_letters,
            "last_cause": self.last_cause,
            "offsets": dict(offsets),
        }

    def buried(self, cause: str) -> None:
        DEAD.labels(self.name).inc()
        with self._lock:
            self.dead_letters += 1
            self.last_cause = cause

    def committed(self, records: int, new: int) -> None:
        RECORDS.labels(self.name).inc(records)
        OUTPUTS.labels(self.name).inc(new)
        with self._lock:
            self.handled += records


class Unit:
    """One handler and its state; one thread. ``stop``: whoever waits for a next try, or has more records, gives up.

    ``part``: which one of the runner's parts it is; None: it is the only one.
    """

    def __init__(
        self,
        handler: Handler,
        state: StateStore,
        write: Write,
        tally: Tally,
        *,
        stop: threading.Event,
        clock: Callable[[], float],
        blobs: BlobStore,
        retry: Retry,
        part: int | None = None,
    ) -> None:
        self._handler = handler
        self._state = state
        self._write = write
        self._tally = tally
        self._stop = stop
        self._clock = clock
        self._blobs = blobs
        self._retry = retry
        self._part = part

    def attempt(self, what: str, step: Callable[[], Any], permanent: tuple[type[Exception], ...] = ()) -> Any:
        """The result of ``step``, tried again with backoff unless its error is permanent."""
        return self._retry.call(
            f"{self._tally.name}: {what}",
            step,
            self._stop,
            permanent=(ContractError, *permanent),
            failed=self._tally.retried,
        )

    def take(self, records: Sequence[Record]) -> Handled:
        """Handle a batch and commit it; one record at a time where an output is too large for the log."""
        try:
            return self._try_batch(records)
        except RecordTooLarge as error:
            self._state.discard()
            if not records:
                raise
            if len(records) == 1:
                return self._commit(records, [], self._bury(records[0], error))
        done = [self.take([record]) for record in records]
        return Handled(*(sum(counts) for counts in zip(*done, strict=True)))

    def _try_batch(self, records: Sequence[Record]) -> Handled:
        outputs: list[NewRecord] = []
        letters: list[NewRecord] = []
        taken = 0
        for record in records:
            if self._stop.is_set():
                break
            self._handle(record, outputs, letters)
            taken += 1
            self._tally.moved(self._part)
        outputs += self.attempt("flush", self._flush)
        return self._commit(records[:taken], outputs, letters)

    def _handle(self, record: Record, outputs: list[NewRecord], letters: list[NewRecord]) -> None:
        def step() -> list[NewRecord]:
            with self._state.savepoint():
                return self._handler.handle(self._state, record, self._clock())

        with self._tally.seconds.time():
            try:
                outputs += self.attempt(f"{record.topic}/{record.partition}/{record.offset}", step)
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
            return self._handler.flush(self._state, self._clock())

    def _bury(self, record: Record, error: Exception) -> list[NewRecord]:
        """The dead letter of a record; none for one that is a dead letter itself, or it would never end."""
        cause = f"{type(error).__name__}: {error}"
        self._tally.buried(cause)
        position = f"{record.topic}/{record.partition}/{record.offset}"
        logger.error("%s: %s becomes a dead letter: %s", self._tally.name, position, cause)
        return dead_letter(self._tally.name, record, error, self._clock(), self._blobs)

    def _commit(self, records: Sequence[Record], outputs: list[NewRecord], letters: list[NewRecord]) -> Handled:
        new = [*outputs, *letters]
        self._write(new, {(record.topic, record.partition): record.offset + 1 for record in records})
        self._tally.committed(len(records), len(new))
        return Handled(len(records), len(outputs), len(letters))


class Behind:
    """How many records of each partition are not handled yet, and how old the oldest is.

    On Kafka the last offsets may be of no record (a transaction's end has one), so a partition that seems to have
    more is looked into.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._empty: dict[TopicPartition, tuple[int, int]] = {}
        self._oldest: float | None = None

    def __call__(self, following: Mapping[TopicPartition, int]) -> dict[TopicPartition, int]:
        """By partition, from the next offset to handle of each."""
        ends = {topic: self._log.end_offsets(topic) for topic in {topic for topic, _ in following}}
        found = {at: self._look(at, offset, ends[at[0]][at[1]]) for at, offset in following.items()}
        self._oldest = min((first.time for _, first in found.values() if first is not None), default=None)
        return {at: count for at, (count, _) in found.items()}

    def waited(self, now: float) -> float:
        """Seconds since the time of the oldest record that was not handled at the last look; 0: there was none."""
        return 0.0 if self._oldest is None else max(0.0, now - self._oldest)

    def _look(self, at: TopicPartition, offset: int, end: int) -> tuple[int, Record | None]:
        """How many there are, and the first."""
        begin, until = self._empty.get(at, (-1, -1))
        start = until if begin == offset else offset
        if start >= end:
            return 0, None
        found = self._log.read(*at, start, 1)
        if found:
            return max(0, end - found[0].offset), found[0]
        self._empty[at] = (offset, end)
        return 0, None
