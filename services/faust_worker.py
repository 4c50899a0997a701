"""A handler on Kafka by Faust, which alone is imported here: membership of the group, and records.

::

    thread of the service: Faust's event loop ─┬─▶ a line for each partition ─▶ its task ───────────┐
                                               │      (bounded: Faust stops fetching it)            │ a batch at a time
    Faust's own thread: aiokafka ◀─────────────┘                                                    ▼
      heartbeats, fetching                                      threads: Partition.take (partition.py) ─▶ Kafka, cache

Handlers work in threads of their own, so heartbeats go on meanwhile. Faust commits no offsets and keeps no tables:
offsets are committed with what the records gave, and a partition knows from its state where to go on. So whatever
Faust delivers twice is skipped, and what it leaves out is read from the log.

At a rebalance each partition finishes the record it is at, flushes, commits, and lets go. Where that takes longer than
half a session, whoever has it next takes its writer's name, and this process ends: a batch must be no more than is
flushed in that time. What fails, or was fenced, ends the process before anything of its batch is committed; it is
started anew.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import faust
import uvloop
from everloop.errors import LogError
from everloop.home import Home
from everloop.log.base import TopicPartition
from everloop.log.kafka.log import KafkaLog
from everloop.log.kafka.records import record
from everloop.log.kafka.settings import Access
from everloop.stream import Handler
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from prometheus_client import Counter

from services.partition import Partition, check_changelog
from services.retry import Retry, Stopping
from services.state import own_folder
from services.unit import LAG, WAITING, Behind, Tally

logger = logging.getLogger(__name__)
SESSION_SECONDS = 6.0  # without a heartbeat, after which the others get the partitions; the least a broker allows
IDLE_SECONDS = 1.0  # between flushes of a partition while no record comes
QUIET = 5  # idle times in a row after which a partition that is behind is read from the log
THREADS = 64  # of a worker, made as they are needed: one for each of its partitions that is busy
LOOK_SECONDS = 1.0  # between looks at how far behind it is
LEAVE_SECONDS = 5.0  # that a worker which ends may take to leave the group: about then it would be put out anyway
CLOSE_SECONDS = 1.0  # and to close its connections, where the other side is silent
FULL_RECORDS, FULL_BYTES = 4000, 16_777_216  # of a line, above which Faust fetches no more for it

REBALANCES = Counter("everloop_handler_rebalances", "Times that partitions were shared out anew", ["handler"])


class ReadsCommitted(driver.AIOKafkaConsumerThread):
    """What is not committed, or never will be, is not read: Faust does that only with its own transactions."""

    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._isolation_level = "read_committed"
        return consumer

    async def on_thread_stop(self) -> None:
        """Leave the group in good order where that is done soon. Else what is still under way is given up: those are
        tasks of this thread, which end with it."""
        await _soon(super().on_thread_stop(), LEAVE_SECONDS)
        if self._consumer is not None:
            await _soon(self._consumer._client.close(), CLOSE_SECONDS)  # again, where the first did not get so far

    @property
    def given_up(self) -> BaseException | None:
        """Why it is not in its group and will not be: what sees to that has ended, or waits until this is heard.

        aiokafka says so to who fetches alone, which a worker without partitions does not. It ends on the answer of a
        broker that was just frozen: such a one knows of no brokers for a moment, itself included.
        """
        coordinator = getattr(self._consumer, "_coordinator", None)
        task: asyncio.Task[None] | None = getattr(coordinator, "_coordination_task", None)
        if task is not None and task.done() and not task.cancelled() and task.exception() is not None:
            return task.exception()
        waiting: BaseException | None = getattr(coordinator, "_pending_exception", None)
        return waiting


async def _soon(step: Coroutine[Any, Any, None], seconds: float) -> None:
    """A step of aiokafka's end. One that is cut short by a fetch that had just failed ends in a CancelledError of its
    own, and with that Faust's thread would end before it says so: whoever stops it would wait a minute for that."""
    with suppress(TimeoutError, asyncio.CancelledError):
        async with asyncio.timeout(seconds):
            await step


class _Consumer(driver.Consumer):
    _thread: ReadsCommitted

    @property
    def given_up(self) -> BaseException | None:
        return self._thread.given_up

    def _new_consumer_thread(self) -> ReadsCommitted:
        return ReadsCommitted(self, loop=self.loop, beacon=self.beacon)

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:
        """Gives Faust nothing: what was fetched goes to the lines at once. Faust would make four tasks of each record
        on its way to a channel, a sixth of a worker's time."""
        fetched, _ = await self._wait_next_records(timeout)
        if self.flow_active:
            for at, records in (fetched or {}).items():
                self.transport.deliver(at.partition, records)
        for nothing in ():
            yield nothing


ReadsCommitted.logger = _Consumer.logger = driver.logger  # else they speak as this module


class _Transport(driver.Transport):
    Consumer = _Consumer
    deliver: Callable[[int, list[Any]], None]
    """Takes what was fetched of a partition. On the event loop."""


class Line:
    """Messages of one partition that wait, with the task that serves it. On the event loop alone."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.partition: Partition | None = None
        self.stopping = False
        self.bytes = 0
        self._waiting: deque[Any] = deque()
        self._changed = asyncio.Event()

    def put(self, messages: list[Any]) -> None:
        self._waiting.extend(messages)
        self.bytes += sum(len(message.value or b"") for message in messages)
        self._changed.set()

    @property
    def full(self) -> bool:
        return len(self._waiting) >= FULL_RECORDS or self.bytes >= FULL_BYTES

    def stop(self) -> None:
        self.stopping = True
        if self.partition is not None:
            self.partition.stop.set()
        self._changed.set()

    async def take(self, most: int, linger: float) -> list[Any]:
        """Messages, once there are some, gathered for ``linger`` seconds; none after a while, or at a stop."""
        if not await self._change(IDLE_SECONDS):
            return []
        end = time.monotonic() + linger
        while len(self._waiting) < most and not self.stopping and (left := end - time.monotonic()) > 0:
            self._changed.clear()
            await self._change(left)
        taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
        self.bytes -= sum(len(message.value or b"") for message in taken)
        if not self._waiting and not self.stopping:
            self._changed.clear()
        return taken

    async def _change(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._changed.wait()
        except TimeoutError:
            return False


class FaustWorker:
    """One worker of a handler: ``run`` in a thread; ``status``, ``lag`` and ``trouble`` from any.

    ``make`` gives a handler for each partition that this worker has. ``linger`` (seconds) gathers records into a
    batch, ``max_records`` bounds it. ``session``: see :data:`SESSION_SECONDS`.
    """

    def __init__(
        self,
        make: Callable[[], Handler],
        log: KafkaLog,
        home: Home,
        *,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.time,
        max_records: int = 500,
        linger: float = 0.02,
        retry: Retry = Retry(),  # noqa: B008 (immutable)
        stuck_after: float = 300.0,
        session: float = SESSION_SECONDS,
    ) -> None:
        """Raises LogError where the cluster does not answer, or lacks a topic."""
        handler = make()
        (self._topic,) = handler.topics  # the state is of one topic's partition
        self.name = handler.name
        self._make = make
        self._log = log
        self._home = home
        self._stop = stop or threading.Event()
        self._clock = clock
        self._max_records, self._linger = max_records, linger
        self._retry = retry
        self._session = session
        self._tally = Tally(self.name, stuck_after)
        self._lines: dict[int, Line] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._behind = Behind(log)
        self._lag: dict[TopicPartition, int] | None = None  # None: not known
        self._rebalances = 0
        self._between = True  # partitions were taken from it, or never given to it, and it waits for those it gets
        self._failure: BaseException | None = None
        self._folder: Path
        self._app: Any
        check_changelog(log, self.name, self._topic)
        LAG.labels(self.name).set_function(lambda: math.nan if self._lag is None else self.lag())
        waited = lambda: math.nan if self._lag is None else self._behind.waited(self._clock())  # noqa: E731
        WAITING.labels(self.name).set_function(waited)

    def run(self) -> None:
        """Handle records until ``stop`` is set. Raises what did not pass by itself: end the process."""
        with own_folder(self._home.folder("state") / self.name) as folder:
            self._folder = folder
            self._tally.moved()
            self._tally.running = True
            try:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(self._main())
            finally:
                self._tally.running = False

    async def _main(self) -> None:
        # A partition that waits for its next try holds a thread: there must be more of them.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix=self.name))
        app = self._app = application(self._log, self.name, self._folder, self._session)
        app.transport.deliver = self._deliver
        app.on_partitions_assigned.connect(self._assigned)
        app.on_partitions_revoked.connect(self._revoked)
        app.topics.add(app.topic(self._topic_name, key_serializer="raw", value_serializer="raw", acks=False))
        looking = asyncio.create_task(self._guarded(self._look()))
        starting = asyncio.create_task(self._guarded(app.start()))  # it ends when partitions were given, if ever
        try:
            while not self._stop.is_set() and self._failure is None and app.crash_reason is None:
                self._failure = self._never_joins()
                await asyncio.sleep(0.05)
        finally:
            looking.cancel()
            starting.cancel()
            await self._let_go(list(self._lines), None)
            await app.stop()
        failure = self._failure or app.crash_reason
        if failure is not None:
            raise failure

    def _never_joins(self) -> LogError | None:
        why = self._app.consumer.given_up
        if why is None:
            return None
        return LogError(
            f"{self.name}: this worker gave up joining its group, so it has no partitions and would wait for ever: "
            f"{why!r}. It ends, to be started anew. A broker that was frozen or has just started does this for a "
            "moment; where it goes on, look at the broker's log, and at what this user may do"
        )

    async def _guarded(self, step: Coroutine[Any, Any, None]) -> None:
        try:
            await step
        except Exception as error:
            self._failure = self._failure or error

    @property
    def _topic_name(self) -> str:
        return self._log.clients.address.qualified(self._topic)

    def _deliver(self, number: int, messages: list[Any]) -> None:
        """Into the line of a partition; a full one is fetched no more until it is shorter."""
        line = self._lines.get(number)
        if line is not None and not line.stopping:
            line.put(messages)
            if line.full:
                self._app.consumer.on_buffer_full(TP(self._topic_name, number))

    async def _assigned(self, _: Any, assigned: Any, **more: Any) -> None:
        """Never waits: what comes for a partition without a line would have to be read from the log."""
        REBALANCES.labels(self.name).inc()
        self._rebalances += 1
        numbers = sorted(at.partition for at in assigned)
        logger.info("%s: partitions %s are ours", self.name, numbers)
        for line in self._lines.values():
            line.stop()
        self._lines = {number: Line(number) for number in numbers}
        self._tally.divided(numbers)
        self._between = False
        for number, line in self._lines.items():
            self._tasks[number] = asyncio.create_task(self._serve(line, self._tasks.get(number)))

    async def _revoked(self, _: Any, revoked: Any, **more: Any) -> None:
        self._between = True
        await self._let_go([at.partition for at in revoked], self._session / 2)
        self._tally.divided(self._lines)

    async def _let_go(self, numbers: Iterable[int], patience: float | None) -> None:
        """What is under way is finished; where that takes too long, the next owner fences it."""
        lines = [self._lines.pop(number) for number in list(numbers) if number in self._lines]
        for line in lines:
            line.stop()
        tasks = [self._tasks[line.number] for line in lines]
        if tasks:
            await asyncio.wait(tasks, timeout=patience)

    async def _serve(self, line: Line, before: asyncio.Task[None] | None) -> None:
        try:
            if before is not None:  # it still has the files
                await asyncio.wait([before])
            if not line.stopping:
                await self._serve_line(line)
        except Stopping:
            logger.info("%s: stopped between two tries; the next owner handles this batch again", self.name)
        except Exception as error:
            logger.error("%s: partition %d failed: %r", self.name, line.number, error)
            self._failure = self._failure or error

    async def _serve_line(self, line: Line) -> None:
        partition = line.partition = await asyncio.to_thread(self._take_over, line.number)
        quiet = 0
        try:
            if not line.stopping:
                await asyncio.to_thread(self._begin, partition)
            while not line.stopping:
                messages = await line.take(self._max_records, self._linger)
                if not line.full:
                    self._app.consumer.on_buffer_drop(TP(self._topic_name, line.number))
                quiet = 0 if messages else quiet + 1
                if not line.stopping:
                    await asyncio.to_thread(self._handle, partition, messages)
                if quiet >= QUIET and self._lag and self._lag.get(partition.source):
                    await asyncio.to_thread(self._find, partition)
        finally:
            await asyncio.to_thread(partition.close)

    def _begin(self, partition: Partition) -> None:
        """In a thread. What the group has got to already is handled first, where the state is older."""
        partition.catch_up(self._log.committed(self.name, self._topic).get(partition.source[1], 0))

    def _find(self, partition: Partition) -> None:
        """In a thread. The log has records that Faust has not delivered for a while."""
        logger.warning("%s: %s/%d has records that were not delivered: read from the log", self.name, *partition.source)
        partition.catch_up(self._log.end_offsets(self._topic)[partition.source[1]])

    def _take_over(self, number: int) -> Partition:
        """In a thread."""
        check_changelog(self._log, self.name, self._topic)  # partitions may have been added since
        return Partition(
            self._make(),
            self._log,
            (self._topic, number),
            self._folder,
            self._tally,
            clock=self._clock,
            blobs=self._home.blobs,
            retry=self._retry,
        )

    def _handle(self, partition: Partition, messages: list[Any]) -> None:
        """In a thread."""
        partition.take([record(message, self._topic) for message in messages])

    async def _look(self) -> None:
        """How far behind it is; that is also what tells progress while there is nothing to do.

        Progress of the worker is to have its partitions; what it does with each is that partition's.
        """
        while True:
            served = self._served()
            following = {line.partition.source: line.partition.next for line in served}
            settled = not self._between and len(served) == len(self._lines)
            try:
                found = await asyncio.to_thread(self._behind, following)
                self._lag = found if settled else None  # those that are still being taken over may have any number
                if settled:
                    self._tally.moved()
                for (_, number), waiting in found.items():
                    if not waiting:
                        self._tally.moved(number)
            except LogError as error:
                logger.warning("%s: its lag is not known: %s", self.name, error)
                self._lag = None
            await asyncio.sleep(LOOK_SECONDS)

    def _served(self) -> list[Any]:
        return [line for line in list(self._lines.values()) if line.partition is not None]

    @property
    def handled(self) -> int:
        """Records, dead letters included, since the start."""
        return self._tally.handled

    def handlers(self) -> dict[int | None, Handler]:
        """The handlers that run here, by the partition that each has."""
        return {line.number: line.partition.handler for line in self._served()}

    def lag(self) -> int:
        """Records of the partitions here that are not handled yet, as of about a second ago."""
        return sum((self._lag or {}).values())

    def trouble(self) -> str | None:
        """For liveness: see :meth:`services.unit.Tally.trouble`."""
        return self._tally.trouble(self.lag)

    def status(self) -> dict[str, Any]:
        offsets = {f"{self._topic}/{line.number}": line.partition.next for line in self._served()}
        return {**self._tally.status(self.lag(), offsets), "rebalances": self._rebalances}


def application(log: KafkaLog, handler: str, folder: Path, session: float) -> faust.App:
    """A Faust app that does nothing but belong to a group and read: no tables, no web server, no topics of its own."""
    clients = log.clients
    app = faust.App(
        clients.address.qualified(handler),
        broker=[f"kafka://{server}" for server in clients.address.servers],
        broker_client_id="everloop",
        broker_credentials=credentials(clients.access),
        broker_session_timeout=session,
        broker_heartbeat_interval=session / 8,
        broker_request_timeout=max(20.0, session),
        broker_commit_interval=86_400.0,
        broker_max_poll_interval=86_400.0,
        consumer_auto_offset_reset="earliest",
        consumer_max_fetch_size=max(1_048_576, log.max_record_bytes + 65_536),
        consumer_metadata_max_age_ms=30_000,
        topic_allow_declare=False,
        topic_disable_leader=True,
        stream_recovery_delay=0.0,
        stream_wait_empty=False,
        web_enabled=False,
        store="memory://",
        datadir=str(folder / "faust"),
        autodiscover=False,
    )
    app.transport = _Transport(app.conf.broker_consumer, app)
    return app


def credentials(access: Access) -> Any:
    """``[log]``'s access in Faust's words."""
    if access.security == "plaintext":
        return None
    if access.security == "tls":
        return faust.SSLCredentials(access.context())
    return faust.SASLCredentials(
        username=access.username,
        password=access.password,
        ssl_context=access.context(),
        mechanism="SCRAM-SHA-512",
    )
