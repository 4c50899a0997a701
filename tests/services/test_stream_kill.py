"""kill -9 a real process that runs a handler, at each point of a batch: nothing is lost, nothing counts twice."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from everloop.home import Home
from everloop.log import Log, NewRecord, connect

from services.stream import StateStore

pytestmark = pytest.mark.processes

PROGRAM = '''
import signal, sys, threading, time
from pathlib import Path
from everloop.log import NewRecord, connect
from services.state import StateStore
from services.stream import Stream

home, point, after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
reached = 0

def at(here):
    """Say that this point is reached, and stay there: the test kills this process here."""
    global reached
    reached += here == point
    if here == point and reached == after:
        print("at", here, flush=True)
        signal.pause()

class Counting:
    name, topics = "counting", ("events",)
    def handle(self, state, record, now):
        count = int(state.get(record.key) or b"0") + 1
        state.put(record.key, str(count).encode())
        at("handle")
        return [NewRecord("episodes", record.key, str(count).encode(), {"id": record.headers["id"]})]
    def flush(self, state, now):
        at("flush")
        return []

class Pausing(Stream):
    def _read(self):
        records = super()._read()
        if records: at("read")
        return records

log = connect(f"sqlite:///{home}/log.db")
append, commit = log.append, StateStore.commit
def append_and_pause(records):
    positions = append(records)
    at("write")
    return positions
def commit_and_pause(self, offsets):
    commit(self, offsets)
    at("commit")
log.append = append_and_pause
StateStore.commit = commit_and_pause
Pausing(Counting(), log, home / "state", max_records=20).run(until_idle=True)
log.close()
print("done", flush=True)
'''
RECORDS = 90
KEYS = 7


@pytest.fixture
def log(home: Home) -> Iterator[Log]:
    log = connect(f"sqlite:///{home.root}/log.db")
    log.append([NewRecord("events", f"k{i % KEYS}", b"", {"id": f"e{i}"}) for i in range(RECORDS)])
    yield log
    log.close()


def run(home: Home, point: str, after: int) -> str:
    """Run the program; where it comes to ``point`` for the ``after``-th time, kill it there."""
    command = [sys.executable, "-c", PROGRAM, str(home.root), point, str(after)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    said = process.stdout.readline().strip()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return said


def check(log: Log, state: Path) -> None:
    values = defaultdict(set)
    for partition in range(log.partitions("episodes")):
        for record in log.read("episodes", partition, max_records=10_000):
            values[record.headers["id"]].add((record.key, record.value))
    assert set(values) == {f"e{i}" for i in range(RECORDS)}, "nothing is lost"
    assert {len(said) for said in values.values()} == {1}, "what is said twice is the same"
    store = StateStore(state / "counting.db")
    counts = [int(value) for _, value in store.scan("k")]
    offsets = store.offsets()
    store.close()
    assert sum(counts) == RECORDS, "nothing counts twice"
    assert sum(offsets.values()) == RECORDS


@pytest.mark.parametrize(("point", "after"), [("read", 2), ("handle", 33), ("flush", 2), ("write", 2), ("commit", 1)])
def test_a_handler_killed_at_a_point_goes_on(home: Home, log: Log, point: str, after: int) -> None:
    assert run(home, point, after) == f"at {point}"
    assert run(home, "nowhere", 1) == "done"
    check(log, home.folder("state"))


def test_a_handler_killed_again_and_again_comes_to_the_end(home: Home, log: Log) -> None:
    points = [("write", 2), ("commit", 1), ("write", 1)]
    said = [run(home, point, after) for point, after in points]
    assert said == [f"at {point}" for point, _ in points]
    assert run(home, "nowhere", 1) == "done"
    check(log, home.folder("state"))
