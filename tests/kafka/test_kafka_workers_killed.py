"""kill -9 a worker on the real broker at each step of a batch, take its disk, stop it past its session; freeze its
broker, and take it away."""

from __future__ import annotations

import secrets
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from everloop.log import NewRecord, connect
from everloop.log.kafka.log import KafkaLog
from everloop.topics import CHANGELOG

from services.broker.process import Broker

pytestmark = [pytest.mark.kafka, pytest.mark.processes]
Until = Callable[..., Any]
KEYS, EACH = 9, 12
WHOLE = {f"k{key}": list(range(1, EACH + 1)) for key in range(KEYS)}
NO_BROKERS = """
from aiokafka.conn import AIOKafkaConnection
send = AIOKafkaConnection.send
async def fenced(self, request, **more):
    answer = await send(self, request, **more)
    if hasattr(answer, "brokers"):
        answer.brokers = []
    return answer
AIOKafkaConnection.send = fenced
"""


def feed(log: KafkaLog, first: int = 0, last: int = EACH) -> None:
    log.append([NewRecord("events", f"k{k}", b"", {"id": f"{k}/{i}"}) for i in range(first, last) for k in range(KEYS)])


def state(log: KafkaLog) -> dict[str, int]:
    """The state that the changelog tells."""
    topic = CHANGELOG + "counting"
    records = [r for p in range(log.partitions(topic)) for r in log.read(topic, p, max_records=10_000)]
    return {r.key[1:]: int(r.value or b"") for r in records if r.key.startswith("/")}


def reaches(process: Any, point: str) -> None:
    line = process.stdout.readline().strip()
    assert line == f"at {point}", line or process.stderr.read()


def test_killed_at_every_step_nothing_is_lost_and_nothing_is_said_twice(
    log: KafkaLog, tmp_path: Path, start: Any, until: Until, done: Any, said: Any, expel: Any
) -> None:
    for round, point in enumerate(("read", "transform", "write", "commit", "cache", "write")):
        feed(log, 2 * round, 2 * round + 2)
        process = start(tmp_path, point)
        reaches(process, point)
        process.kill()
        process.wait()
        expel()
    start(tmp_path)
    until(lambda: done() == KEYS * EACH, deadline=30)
    assert said() == WHOLE
    assert state(log) == dict.fromkeys(WHOLE, EACH)
    counts = [count for its in said().values() for count in its]
    print(f"acknowledged {KEYS * EACH}, counted {len(counts)}, each once")


def test_another_goes_on_where_a_worker_stopped_whose_disk_is_lost(
    log: KafkaLog, tmp_path: Path, start: Any, until: Until, done: Any, said: Any
) -> None:
    feed(log, 0, 5)
    first = start(tmp_path / "first")
    until(lambda: done() == KEYS * 5, deadline=30)
    first.kill()
    first.wait()
    killed = time.monotonic()
    shutil.rmtree(tmp_path / "first")
    feed(log, 5, EACH)
    start(tmp_path / "second")
    until(lambda: done() > KEYS * 5, deadline=90)
    took = time.monotonic() - killed
    print(f"{took:.1f} s from the kill to the first record that the other committed")
    assert took < 40, "a session of 6 s, and a process that starts on busy cores"
    until(lambda: done() == KEYS * EACH, deadline=30)
    assert said() == WHOLE, "it counted on"


def test_a_worker_that_was_stopped_past_its_session_cannot_write(
    log: KafkaLog, tmp_path: Path, start: Any, until: Until, done: Any, said: Any
) -> None:
    feed(log, 0, 1)
    assert all(log.end_offsets("events"))
    zombie = start(tmp_path, "transform", KEYS + 9)
    until(lambda: done() == KEYS, deadline=60)  # it has all partitions: one that it still takes over fails otherwise
    feed(log, 1, EACH)
    reaches(zombie, "transform")
    zombie.send_signal(signal.SIGSTOP)
    start(tmp_path)
    until(lambda: done() == KEYS * EACH, deadline=90)
    before = log.end_offsets("episodes"), log.end_offsets(CHANGELOG + "counting")
    zombie.stdin.write("\n")
    zombie.stdin.flush()
    zombie.send_signal(signal.SIGCONT)
    _, why = zombie.communicate(timeout=30)
    assert "another process has taken the place" in why, why
    assert zombie.returncode == 1
    assert (log.end_offsets("episodes"), log.end_offsets(CHANGELOG + "counting")) == before, "it wrote nothing"
    assert said() == WHOLE


def test_a_worker_that_cannot_join_its_group_says_so_and_ends(
    log: KafkaLog, tmp_path: Path, start: Any, until: Until, done: Any
) -> None:
    """Answers that name no brokers, as one gives that was just thawed: it waited for ever, and could not be stopped."""
    feed(log)
    worker = start(tmp_path, first=NO_BROKERS)
    _, why = worker.communicate(timeout=60)
    assert worker.returncode == 1
    assert "LogError: counting: this worker gave up joining its group" in why, why
    start(tmp_path)
    until(lambda: done() == KEYS * EACH, deadline=60)


def test_a_worker_of_a_broker_that_thaws_goes_on_and_ends_once_that_is_gone(
    own: Broker, tmp_path: Path, start: Any, until: Until
) -> None:
    url = f"kafka://{own.address}/{secrets.token_hex(6)}"
    log = connect(url)
    try:
        feed(log)
        workers = [start(tmp_path, "run", on=url)]
        reaches(workers[0], "run")
        own.freeze()
        try:
            time.sleep(4.0)  # longer than the broker's session with its controller
            workers[0].stdin.write("\n")
            workers[0].stdin.flush()
        finally:
            own.thaw()

        def all_done() -> bool:
            """Who ends is started anew, as everywhere."""
            if workers[-1].poll() is not None:
                workers.append(start(tmp_path, on=url))
            return sum(log.committed("counting", "events").values()) == KEYS * EACH

        until(all_done, deadline=90, every=0.5)
        assert len(workers) < 5, "it does not end again and again"
        own.kill()
        gone = time.monotonic()
        workers[-1].terminate()
        workers[-1].communicate(timeout=20)
        print(f"started {len(workers)} times; {time.monotonic() - gone:.1f} s to end without a broker")
    finally:
        own.start()
        log.close()
