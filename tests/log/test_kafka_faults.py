"""The broker goes away: killed, frozen. What was acknowledged is there, calls end in bounded time, and it recovers."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from everloop.errors import LogError
from everloop.log import NewRecord
from everloop.log.base import Position
from everloop.log.kafka.declared import Keeping
from everloop.log.kafka.log import KafkaLog
from everloop.log.kafka.settings import Access, Address

from services.broker.process import Broker

pytestmark = pytest.mark.kafka
Until = Callable[..., Any]


@pytest.fixture
def opened(own: Broker, request: pytest.FixtureRequest) -> Iterator[Callable[..., KafkaLog]]:
    made: list[KafkaLog] = []
    prefix = f"test{abs(hash(request.node.name)) % 10**8}"

    def open_it(**options: Any) -> KafkaLog:
        made.append(KafkaLog(Address((own.address,), prefix), Access(), Keeping(), **options))
        return made[-1]

    yield open_it
    for log in made:
        log.close()


def ids(log: KafkaLog) -> list[str]:
    found: list[str] = []
    for partition in range(log.partitions("events")):
        offset = 0
        while records := log.read("events", partition, offset):
            found += [record.headers["id"] for record in records]
            offset = records[-1].offset + 1
    return found


def new(number: int, size: int = 100) -> NewRecord:
    return NewRecord("events", f"k{number % 7}", b"x" * size, {"id": str(number)})


def keep_appending(log: KafkaLog, stop: threading.Event) -> tuple[threading.Thread, list[str]]:
    """A thread that appends with tries anew, as a caller would, and the ids it was told are durable."""
    told: list[str] = []

    def run() -> None:
        number = 0
        while not stop.is_set():
            try:
                log.append([new(number)])
            except LogError:
                continue
            told.append(str(number))
            number += 1

    thread = threading.Thread(target=run)
    thread.start()
    return thread, told


def check_nothing_is_lost(log: KafkaLog, told: list[str]) -> None:
    there = ids(log)
    assert set(told) <= set(there)
    print(f"acknowledged {len(told)}, in the log {len(there)}, unique {len(set(there))}")


def test_a_broker_that_was_killed_and_came_back(own: Broker, opened: Callable[..., KafkaLog], until: Until) -> None:
    log, stop = opened(), threading.Event()
    thread, told = keep_appending(log, stop)
    until(lambda: len(told) > 50)
    own.kill()
    before = len(told)
    own.start()
    back = time.monotonic()
    until(lambda: len(told) > before + 20, deadline=60)
    print(f"first acknowledged {time.monotonic() - back:.1f} s after the broker was back")
    stop.set()
    thread.join()
    there = ids(log)
    assert len(there) == len(set(there)), "nothing failed, so nothing was tried again"
    check_nothing_is_lost(log, told)


def test_a_frozen_broker_ends_appends_in_time_and_recovers_by_itself(
    own: Broker, opened: Callable[..., KafkaLog], until: Until
) -> None:
    log = opened(deadline=3.0)
    log.append([new(-1)])
    own.freeze()
    try:
        began = time.monotonic()
        with pytest.raises(LogError, match="not acknowledged within 3 s"):
            log.append([new(-2)])
        assert time.monotonic() - began < 30
        waiting = [log.append_soon([new(-3)]) for _ in range(5)]
        until(lambda: all(future.done() for future in waiting), deadline=60)
        assert all(isinstance(future.exception(), LogError) for future in waiting)
    finally:
        own.thaw()
    until(lambda: _accepted(log, 1), deadline=30)
    assert {"-1", "1"} <= set(ids(log))


def _accepted(log: KafkaLog, number: int) -> bool:
    try:
        log.append([new(number)])
    except LogError:
        return False
    return True


def fill(log: KafkaLog, futures: list[Future[list[Position]]]) -> None:
    for number in range(20_000):
        futures.append(log.append_soon([new(number, 20_000)]))


def resident() -> int:
    """Bytes of this process's memory that lie in RAM now: the most that ever did say nothing where that was before."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_bounded_while_the_broker_is_frozen(
    own: Broker, opened: Callable[..., KafkaLog], until: Until
) -> None:
    log = opened()
    log.append([new(-1)])
    own.freeze()
    before = resident()
    futures: list[Future[list[Position]]] = []
    try:
        with pytest.raises(LogError, match="try again later"):
            fill(log, futures)
        assert 3000 < len(futures) < 3400, "64 MB of 20 KB"
        grown = resident() - before
        print(f"memory grew by {grown / 1e6:.0f} MB for 64 MB of records")
        assert grown < 200e6
    finally:
        own.thaw()
    until(lambda: all(future.done() for future in futures), deadline=60)
    told = [str(n) for n, future in enumerate(futures) if future.exception() is None]
    check_nothing_is_lost(log, told)


def test_an_append_without_a_broker_waits_for_it(own: Broker, opened: Callable[..., KafkaLog]) -> None:
    opened().append([new(0)])
    log = opened()
    own.stop()
    soon = log.append_soon([new(1)])
    own.start()
    assert soon.result(40)
    assert set(ids(log)) == {"0", "1"}


def test_a_consumer_reads_on_after_the_broker_was_away(
    own: Broker, opened: Callable[..., KafkaLog], until: Until
) -> None:
    log = opened()
    log.append([new(n) for n in range(20)])
    consumer = log.consumer("g", ["events"], member="worker")
    read: list[str] = []

    def poll() -> int:
        try:
            read.extend(record.headers["id"] for record in consumer.poll(timeout=0.2))
        except LogError as error:
            print(error)
        return len(set(read))

    until(lambda: poll() == 20)
    own.kill()
    poll()
    own.start()
    log.append([new(n) for n in range(20, 40)])
    until(lambda: poll() == 40, deadline=40)
    consumer.commit({("events", p): end for p, end in enumerate(log.end_offsets("events"))})
    assert sum(log.committed("g", "events").values()) == 40


def test_a_log_is_closed_in_time_while_the_broker_is_frozen(own: Broker, opened: Callable[..., KafkaLog]) -> None:
    log = opened()
    log.append([new(0)])
    log.consumer("g", ["events"])
    own.freeze()
    try:
        soon = log.append_soon([new(1)])
        began = time.monotonic()
        log.close()
        assert time.monotonic() - began < 45
        assert isinstance(soon.exception(1), LogError)
        with pytest.raises(LogError, match="closed"):
            log.append([new(2)])
    finally:
        own.thaw()


def test_questions_are_answered_as_soon_as_a_broker_that_was_killed_is_back(
    own: Broker, opened: Callable[..., KafkaLog]
) -> None:
    log = opened()
    log.append([new(0)])
    ends = log.end_offsets("events")
    own.kill()
    own.start()
    assert log.end_offsets("events") == ends
