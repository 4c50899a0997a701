"""Runs a stream handler on the log. Where one process has all partitions, the steps of a batch in this order:

1. read: poll the log; a newly assigned partition starts at the state's own offset, which overrides the group's
2. handle the batch (:mod:`services.unit`)
3. append outputs and dead letters; durable
4. commit changes of the state and offsets in one transaction of ``state/<handler>.db``
5. commit the offsets to the log, for display

Killed before 4, the batch is handled again from the same state and gives the same outputs (at least once, with
idempotent effects); killed after it, it is done. What does not pass leaves :meth:`Stream.run`, and the process ends.

On Kafka processes can share the partitions of a handler: :func:`share` then takes :mod:`services.faust_worker`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everloop.errors import LogError, RecordTooLarge
from everloop.home import Home
from everloop.log.base import Consumer, Log, NewRecord, Record, TopicPartition
from everloop.log.embedded import EmbeddedLog
from everloop.stream import Handled, Handler
from everloop.wire import BlobStore

from services.retry import Retry, Stopping
from services.state import StateStore, owned
from services.unit import AGE, DEAD, LAG, RECORDS, WAITING, Behind, Tally, Unit

if TYPE_CHECKING:
    from services.faust_worker import FaustWorker
    from services.service import Service

__all__ = ["AGE", "DEAD", "LAG", "RECORDS", "Retry", "StateStore", "Stream", "attach", "run_handler", "share"]

logger = logging.getLogger(__name__)
REPORT_EVERY = 0.5  # seconds between commits to the log, which only display reads
POLL_SECONDS = 0.5
IDLE_EVERY = 1.0  # seconds between flushes while no record comes


class Stream:
    """One handler, bound to a log: ``run`` in a thread; ``status``, ``lag`` and ``trouble`` from any.

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
        self._next: dict[TopicPartition, int] = {}  # the next offset to handle: what the state's offsets say
        self._unread: dict[TopicPartition, int] = {}  # the next offset to read: ahead of it within a batch
        self._reported: dict[TopicPartition, int] = {}
        self._report_due = 0.0
        self._idle_due = 0.0
        self._tally = Tally(handler.name, stuck_after)
        self._behind = Behind(log)
        self._state: StateStore
        self._unit: Unit
        self._consumer: Consumer
        LAG.labels(self.name).set_function(self._shown_lag)
        WAITING.labels(self.name).set_function(self._shown_wait)

    def run(self, *, until_idle: bool = False) -> None:
        """Handle records until ``stop`` is set (``until_idle``: or until there is none left).

        Raises what did not pass by itself; nothing of that batch is committed, so end the process.
        """
        with owned(self._path, self._stop) as mine:
            if not mine:
                return
            self._tally.moved()
            self._tally.running = True
            self._patience = 0.0 if until_idle else POLL_SECONDS
            self._state = StateStore(self._path)
            self._unit = self._new_unit()
            # The lock says that no other process runs this handler, so its predecessor's membership is void.
            self._consumer = self._log.consumer(self.name, self.handler.topics, member=self.name)
            try:
                self._loop(until_idle)
            except Stopping:
                logger.info("%s: stopped between two tries; the next start handles this batch again", self.name)
            finally:
                self._tally.running = False
                self._state.close()
                self._close_consumer()

    def _new_unit(self) -> Unit:
        return Unit(
            self.handler,
            self._state,
            self._write,
            self._tally,
            stop=self._stop,
            clock=self._clock,
            blobs=self._blobs,
            retry=self._retry,
        )

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
        self._tally.moved()
        if not records and self._tally.progress < self._idle_due:
            self._report()
            return Handled(0, 0, 0)
        self._idle_due = self._tally.progress + IDLE_EVERY
        handled = self._unit.take(records)
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
        records = self._unit.attempt("reading", lambda: self._consumer.poll(max_records, timeout))
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

    def _write(self, new: Sequence[NewRecord], offsets: Mapping[TopicPartition, int]) -> None:
        """Steps 3 and 4 of the module's list."""
        if new:
            self._unit.attempt("appending", lambda: self._log.append(new), permanent=(RecordTooLarge,))
        if offsets or self._state.changed:
            self._unit.attempt("committing state", lambda: self._state.commit(offsets))
        self._next.update(offsets)

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
        return sum(self._behind(dict(self._next)).values())

    def _shown_lag(self) -> float:
        """For metrics, which are asked for also while the log is closed."""
        try:
            return self.lag()
        except LogError:
            return math.nan

    def _shown_wait(self) -> float:
        """As ``_shown_lag``: how old the oldest record is that is not handled yet."""
        return math.nan if math.isnan(self._shown_lag()) else self._behind.waited(self._clock())

    def trouble(self) -> str | None:
        """For liveness: see :meth:`services.unit.Tally.trouble`."""
        return self._tally.trouble(self.lag)

    @property
    def handled(self) -> int:
        """Records, dead letters included, since the start."""
        return self._tally.handled

    def handlers(self) -> dict[int | None, Handler]:
        """The handlers that run here, by the partition that each has; None: all of them."""
        return {None: self.handler}

    def status(self) -> dict[str, Any]:
        offsets = {f"{topic}/{partition}": offset for (topic, partition), offset in sorted(self._next.items())}
        return self._tally.status(self.lag(), offsets)


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
    """Run a handler as a loop of a service, alone on all partitions, with its liveness and status."""
    stream = Stream(handler, log, home.folder("state"), stop=service.stop, blobs=home.blobs, **options)
    _bind(service, stream)
    return stream


def share(
    service: Service, make: Callable[[], Handler], log: Log, home: Home, *, at_once: int = 500, **options: Any
) -> Stream | FaustWorker:
    """As ``attach``; on Kafka with a handler and a state of its own for each partition, and as many processes as
    are started share the partitions. ``at_once`` bounds a batch there: what flushing one takes, a rebalance waits for,
    up to 3 s."""
    from services.service import collect_seldom  # not for those who serve nothing

    collect_seldom()
    if isinstance(log, EmbeddedLog):
        return attach(service, make(), log, home, **options)
    from services.faust_worker import FaustWorker  # not for those who need no Faust: it takes a second

    worker = FaustWorker(make, log, home, stop=service.stop, max_records=at_once, **options)
    _bind(service, worker)
    return worker


def _bind(service: Service, runner: Stream | FaustWorker) -> None:
    service.loop(runner.name, runner.run)
    service.check(runner.name, runner.trouble)
    service.describe(runner.name, runner.status)
