"""Appending: one thread and one idempotent producer, which is thrown away when it is wedged.

::

    submit ─▶ queue (bounded in bytes) ─▶ this thread ─▶ KafkaProducer.send ─▶ its I/O thread ─▶ broker
       ▲                                       │ looks every half second        │ callbacks, one a record
       └── the future ◀── fails what is older than the deadline    resolves ◀───┘ once all are acknowledged

The queue keeps the order that ``submit`` was called in, and the producer that of a partition. A batch of which
nothing is known at its deadline fails, and with it all that the producer holds: the producer is closed so that it
sends none of it any more. Whether the broker has some of it is not known then, so some of it may be written.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from kafka import KafkaProducer
from kafka import errors as kafka_errors

from everloop.errors import LogError
from everloop.log.base import NewRecord, Position
from everloop.log.kafka.clients import Clients, Unreachable, abandon
from everloop.log.kafka.records import message

LOOK_SECONDS = 0.5
RETRY_SECONDS = 0.2
SETTLE_SECONDS = 2.0
CLOSE_SECONDS = 5.0


class Batch:
    """One ``append``: its records, when it began, and what was acknowledged of it."""

    def __init__(self, records: Sequence[NewRecord], size: int) -> None:
        self.records = records
        self.size = size
        self.began = time.monotonic()
        self.future: Future[list[Position]] = Future()
        self._positions: list[Position | None] = [None] * len(records)
        self._missing = len(records)

    def acknowledged(self, index: int, position: Position) -> None:
        """Called by the producer's I/O thread alone."""
        self._positions[index] = position
        self._missing -= 1
        if not self._missing:
            with suppress(InvalidStateError):
                self.future.set_result([found for found in self._positions if found is not None])

    def fail(self, error: LogError) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Appender:
    """See the module. ``deadline`` (seconds): of each batch. ``max_bytes``: of all that wait."""

    def __init__(
        self, clients: Clients, partitions: Callable[[str], int], *, deadline: float = 30.0, max_bytes: int = 67_108_864
    ) -> None:
        self._clients = clients
        self._partitions = partitions
        self._deadline = deadline
        self._max_bytes = max_bytes
        self._queue: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._sent: dict[Batch, None] = {}  # in the producer's hands, oldest first
        self._bytes = 0
        self._lock = threading.Lock()
        self._producer: KafkaProducer | None = None
        self._spoiled = False  # by a refusal: kafka-python would tell it of the batches that come next as well
        self._thread: threading.Thread | None = None
        self._closed = False
        self.rebuilds = 0  # producers thrown away because of a refusal, or because nothing was acknowledged

    def submit(self, records: Sequence[NewRecord], size: int) -> Future[list[Position]]:
        """Does not wait. ``size``: bytes of the records. Raises LogError where too much waits already."""
        batch = Batch(records, size)
        if not records:
            batch.future.set_result([])
            return batch.future
        with self._lock:
            if self._closed:
                raise LogError("the log is closed")
            if self._bytes and self._bytes + size > self._max_bytes:
                raise LogError(
                    f"{self._bytes:,} bytes wait for {self._clients.address} already, so nothing was written: "
                    "try again later"
                )
            self._bytes += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kafka-appender", daemon=True)
                self._thread.start()
        batch.future.add_done_callback(lambda _: self._done(batch))
        self._queue.put(batch)
        return batch.future

    def wait(self, future: Future[list[Position]]) -> list[Position]:
        """The result of ``submit``; bounded in time whatever becomes of the thread."""
        try:
            return future.result(self._deadline + 15.0)
        except TimeoutError:
            raise self._late() from None

    def _done(self, batch: Batch) -> None:
        with self._lock:
            self._bytes -= batch.size
            self._sent.pop(batch, None)

    def _run(self) -> None:
        while True:
            try:
                batch = self._queue.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                self._look()
                continue
            if batch is None:
                return
            self._look()
            try:
                self._send(batch)
            except LogError as error:
                batch.fail(error)
            except Exception as error:
                batch.fail(self._clients.explain(error, "appending"))
                self._rebuild()

    def _look(self) -> None:
        """Give up where the oldest batch that was sent has waited for too long."""
        with self._lock:
            oldest = next(iter(self._sent), None)
        if oldest is not None and time.monotonic() - oldest.began > self._deadline:
            self._rebuild()

    def _rebuild(self) -> None:
        """Throw the producer away with all that it holds; the next batch makes a new one."""
        producer, self._producer = self._producer, None
        self._spoiled = False
        with self._lock:
            given_up = list(self._sent)
        for batch in given_up:
            batch.fail(self._late())
        if producer is not None:
            self.rebuilds += not self._closed
            abandon(producer)

    def _late(self) -> LogError:
        return LogError(
            f"{self._clients.address} has not acknowledged within {self._deadline:g} s; some of these records may be "
            "written: try again (their ids make that harmless)"
        )

    def _send(self, batch: Batch) -> None:
        producer = self._connected(batch)
        qualified = self._clients.address.qualified
        counts = {}
        for topic in {record.topic for record in batch.records}:
            self._partitions(topic)  # makes it where it is missing
            counts[topic] = len(producer.partitions_for(qualified(topic)))  # the producer takes no other number
        with self._lock:
            self._sent[batch] = None
        for index, record in enumerate(batch.records):
            sent = producer.send(**message(record, qualified(record.topic), counts[record.topic])._asdict())
            sent.add_callback(self._acknowledged, batch, index, record.topic)
            sent.add_errback(self._refused, batch, record.topic)

    def _connected(self, batch: Batch) -> KafkaProducer:
        """The producer, made where there is none; tried until the batch's deadline while nothing answers."""
        if self._spoiled:
            self._settle()
            self._rebuild()
        while self._producer is None:
            left = batch.began + self._deadline - time.monotonic()
            if left <= 0 or self._closed:
                raise self._late()
            try:
                self._producer = self._clients.producer()
            except Unreachable:
                if time.monotonic() + RETRY_SECONDS > batch.began + self._deadline:
                    raise
                time.sleep(RETRY_SECONDS)
        return self._producer

    def _settle(self) -> None:
        """Wait a while for what was sent before a refusal."""
        end = time.monotonic() + SETTLE_SECONDS
        while self._sent and time.monotonic() < end:
            time.sleep(0.01)

    @staticmethod
    def _acknowledged(batch: Batch, index: int, topic: str, metadata: Any) -> None:
        batch.acknowledged(index, Position(topic, metadata.partition, metadata.offset))

    def _refused(self, batch: Batch, topic: str, error: BaseException) -> None:
        closed = isinstance(error, kafka_errors.IllegalStateError)
        self._spoiled = not closed
        batch.fail(self._late() if closed else self._clients.explain(error, f"appending to {topic!r}"))

    def close(self) -> None:
        """Finish what is under way, for a few seconds at most, and let go; what is left then fails."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        self._queue.put(None)
        if thread is not None:
            thread.join(CLOSE_SECONDS)
        end = time.monotonic() + CLOSE_SECONDS
        while self._sent and time.monotonic() < end:
            time.sleep(0.01)
        self._rebuild()
