"""Workers on the real broker: some in this process, some as processes of their own that can be killed at a point."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.errors import ContractError, LogError
from everloop.event import Call, Event, Message
from everloop.home import Home
from everloop.log import NewRecord, Record
from everloop.log.kafka.declared import Keeping
from everloop.log.kafka.log import KafkaLog
from everloop.log.kafka.settings import Access, Address
from everloop.stream import State

from services.broker.process import Broker
from services.faust_worker import FaustWorker
from services.retry import Retry

SESSION = 6.0  # the shortest that a broker allows
FAST = Retry(tries=3, first=0.001, longest=0.002)

PROGRAM = """
import logging, signal, sys, threading
from pathlib import Path
from everloop.home import Home
from everloop.log import connect
from everloop.log.kafka.fenced import FencedWriter
from services.faust_worker import FaustWorker
from services.partition import Partition
from services.state import StateStore
logging.basicConfig()  # why each partition failed, not only the first
sys.path.insert(0, sys.argv[5])
from conftest import SESSION, Counting

url, home, point, after = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
lock, reached = threading.Lock(), 0

def at(here):
    '''Say that this point is reached, and stay there until a line comes on the standard input.'''
    global reached
    with lock:
        reached += here == point
        mine = here == point and reached == after
    if mine:
        print("at", here, flush=True)
        sys.stdin.readline()

def pausing(owner, name, before="", behind=""):
    does = getattr(owner, name)
    def wrapped(*arguments, **more):
        at(before)
        given = does(*arguments, **more)
        at(behind)
        return given
    setattr(owner, name, wrapped)

pausing(FaustWorker, "run", before="run")
pausing(Partition, "take", before="read")
pausing(Counting, "handle", behind="transform")
pausing(FencedWriter, "_begin_and_send", behind="write")
pausing(FencedWriter, "write", behind="commit")
pausing(StateStore, "commit", behind="cache")
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
log = connect(url)
FaustWorker(Counting, log, Home(home), stop=stop, session=SESSION, max_records=20).run()
log.close()
"""


class Counting:
    """Counts records by key and says each count; takes no poison."""

    name, topics = "counting", ("events",)

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        count = int(state.get(record.key) or b"0") + 1
        state.put(record.key, str(count).encode())
        if record.value == b"poison":
            raise ContractError("poison cannot be counted")
        return [NewRecord("episodes", record.key, str(count).encode(), {"id": record.headers["id"]})]

    def flush(self, state: State, now: float) -> list[NewRecord]:
        return []


@pytest.fixture
def counting() -> type[Counting]:
    return Counting


class Running:
    """A worker in a thread of this process."""

    def __init__(self, worker: FaustWorker, stop: threading.Event) -> None:
        self.worker, self._stop = worker, stop
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.worker.run()
        except BaseException as error:
            self.failure = error

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()


@pytest.fixture
def work(log: KafkaLog) -> Iterator[Callable[..., Running]]:
    """Start a worker in a thread: ``work(folder, make=Counting, …)``; ``on`` another log of the same broker."""
    running: list[Running] = []

    def start(folder: Path, make: Callable[[], Any] = Counting, on: KafkaLog = log, **options: Any) -> Running:
        stop = threading.Event()
        worker = FaustWorker(make, on, Home(folder), stop=stop, **{"session": SESSION, "retry": FAST, **options})
        running.append(Running(worker, stop))
        return running[-1]

    yield start
    for each in running:
        each.stop()


Started = subprocess.Popen[str]


@pytest.fixture
def start(url: str) -> Iterator[Callable[..., Started]]:
    """Start a worker as a process: ``start(folder, point, after)``; it stops at the point for the n-th time.

    ``on``: the URL of another log; ``first``: a program that it runs before its own.
    """
    processes: list[Started] = []

    def run(folder: Path, point: str = "nowhere", after: int = 1, *, on: str = url, first: str = "") -> Started:
        arguments = [on, str(folder), point, str(after), str(Path(__file__).parent)]
        command = [sys.executable, "-u", "-c", first + PROGRAM, *arguments]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=Path.cwd())
        processes.append(process)
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGCONT)
            process.kill()
        process.communicate()


def group_of(log: KafkaLog) -> str:
    return log.clients.address.qualified("counting")


@pytest.fixture
def expel(log: KafkaLog) -> Callable[[], None]:
    """Put all members out of the group, as the broker does once their sessions end."""
    from kafka.admin import MemberToRemove

    def do() -> None:
        group = group_of(log)
        found = log.cluster.ask("looking", lambda admin: admin.describe_groups([group]))
        members = [MemberToRemove(member_id=m["member_id"]) for m in found[group]["members"]]
        if members:
            log.cluster.ask("expelling", lambda admin: admin.remove_group_members(group, members))

    return do


@pytest.fixture
def done(log: KafkaLog) -> Callable[[], int]:
    """How many of the events are handled and committed."""
    return lambda: sum(log.committed("counting", "events").values())


@pytest.fixture
def said(log: KafkaLog) -> Callable[[], dict[str, list[int]]]:
    """What was said by key, in order."""

    def by_key() -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for partition in range(log.partitions("episodes")):
            for record in log.read("episodes", partition, max_records=10_000):
                found.setdefault(record.key, []).append(int(record.value or b""))
        return found

    return by_key


PLANT = """
home = "{home}"
[log]
url = "kafka://{address}/{prefix}"
[services]
assembler_port = 0
[tenants.acme.policies.desk]
"""


def event(number: int, size: int) -> NewRecord:
    asked = Message(role="user", content="q" * size)
    call = Call(id=f"c{number}", messages=(asked,), output=Message(role="assistant", content="a"))
    made = Event(
        id=f"e{number}", tenant="acme", policy="desk", episode=f"ep_{number // 3}", time=1_760_000_000.0, payload=call
    )
    return NewRecord("events", made.key, wire.encode(made), {"id": made.id}, made.time)


class Plant:
    """A log that is appended to, and an assembler that is kept up."""

    def __init__(self, broker: Broker, home: Path, size: int = 100) -> None:
        Home(home).secret()
        prefix = secrets.token_hex(6)
        self.home, self._size = home, size
        (home / "everloop.toml").write_text(PLANT.format(home=home, address=broker.address, prefix=prefix))
        self.log = KafkaLog(Address((broker.address,), prefix), Access(), Keeping(), deadline=10.0)
        self.acknowledged: list[str] = []
        self.refused: list[str] = []
        self.starts = 0
        self._enough, self._stop = threading.Event(), threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._keep_up, self._feed)]
        for thread in self._threads:
            thread.start()

    def _keep_up(self) -> None:
        while not self._stop.is_set():
            self.starts += 1
            self._process = self.run("services.assembler")
            while self._process.poll() is None and not self._stop.wait(0.2):
                pass

    def run(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A process of the platform in this home; what it says goes into a file there."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
        environment |= {"EVERLOOP_CONFIG": str(self.home / "everloop.toml"), "OMP_NUM_THREADS": "1"}
        with (self.home / "said").open("ab") as said:
            command = [sys.executable, "-m", module, *arguments]
            return subprocess.Popen(command, env=environment, stdout=said, stderr=said)

    @property
    def pid(self) -> int:
        """Of the assembler that runs now."""
        assert self._process is not None
        return self._process.pid

    def _feed(self) -> None:
        for number in itertools.count():
            while not self._enough.is_set():
                try:
                    self.log.append([event(number, self._size)])
                    self.acknowledged.append(f"e{number}")
                    break
                except LogError as error:
                    self.refused.append(str(error))
            if self._enough.wait(0.005):
                return

    def stored(self) -> dict[str, int]:
        """Events in the store and among the turns of episodes, and how many of each have an id of their own."""
        from pipelines.store import Store  # which workers that import this file need not

        store = Store(self.home / "store")
        try:
            (events,) = store.sql("SELECT count(*) AS events, count(DISTINCT id) AS ids FROM events").to_pylist()
            (turns,) = store.sql("SELECT count(*) AS turns, count(DISTINCT call) AS calls FROM turns").to_pylist()
        finally:
            store.close()
        return {**events, **turns}

    def check(self, until: Callable[..., Any], deadline: float = 90.0) -> None:
        """Append no more; the store has all in the end, each event once."""
        self._enough.set()
        self._threads[1].join(60)
        whole = len(self.log_ids())
        until(lambda: set(self.stored().values()) == {whole}, deadline=deadline, every=0.5)
        print(
            f"acknowledged {len(self.acknowledged)}, in the store {self.stored()} of {whole} in the log;"
            f" refused {len(self.refused)}, the assembler was started {self.starts} times"
        )

    def log_ids(self) -> set[str]:
        found: list[str] = []
        for partition in range(4):
            offset = 0
            while records := self.log.read("events", partition, offset, 5000):
                found += [record.headers["id"] for record in records]
                offset = records[-1].offset + 1
        assert set(self.acknowledged) <= set(found)
        return set(found)

    def close(self) -> None:
        self._enough.set()
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.log.close()


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Callable[..., Plant]]:
    made: list[Plant] = []

    def build(broker: Broker, **options: Any) -> Plant:
        made.append(Plant(broker, tmp_path / "home", **options))
        return made[-1]

    yield build
    for one in made:
        one.close()
