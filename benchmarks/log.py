"""Events a second through the log and a handler, and milliseconds from an append until its result can be read.

On SQLite and on a real broker in a temporary folder, which shares the machine's cores with this process, which
produces, and with the workers. An event is a model call of 1 KB, sealed as the gateway seals it, two to an episode.
The workers are processes of their own with the platform's runner: on Kafka they share the partitions; on SQLite one
works and a second one stands by. Two steps:

- ``note``, as little as a handler can do: an entry of state for each episode, and a small output for each event;
- ``assemble``, the whole step as the platform runs it: decode, fold, make episode and trajectory anew, append both.

**events/s** counts from the first append of a backlog, produced as fast as the log takes it, to the moment when the
last of its events is committed: outputs, state and offset. **p50 and p99** are measured apart, at 200 events a second:
from the append to when another process has read the output (of assemble: the episode with that call in it).
**worker** and **broker** are processor time for each event of the backlog.

The run fails unless every event was handled: its output is in the log, from ``note`` exactly once.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from everloop import wire
from everloop.episode import Episode
from everloop.event import Call, Event, Message
from everloop.home import Home
from everloop.log import Log, NewRecord, Record, connect
from everloop.topics import EPISODES, EVENTS

from benchmarks import _cpu
from benchmarks._report import aim, load, loads, parser, publish
from benchmarks._services import Running, environment, process
from services.broker.process import Broker

BACKLOG, QUICK_BACKLOG = 15_000, 6_000
RATE = 200.0  # events a second while latency is measured
SECONDS, QUICK_SECONDS = 10.0, 4.0
WARM = 400
APART = 1000  # events between the two of an episode
AT_ONCE, OUTSTANDING = 50, 40  # events of an append, appends under way
TEXT = "My card payment was declined, and I do not know why. " * 16
DEADLINE = 300.0


class Case(NamedTuple):
    """One row."""

    backend: str
    partitions: int
    workers: int
    step: str


CASES = [
    *(
        Case(log, partitions, workers, "note")
        for log in ("SQLite", "Kafka")
        for partitions in (1, 4)
        for workers in (1, 2)
    ),
    Case("SQLite", 4, 1, "assemble"),
    Case("Kafka", 4, 1, "assemble"),
    Case("Kafka", 4, 2, "assemble"),
]
WHOLE_STEP = [Case("Kafka", 4, workers, "assemble") for workers in (1, 2)]
TO_A_HANDLER = Case("SQLite", 4, 1, "note")
WHOLE_STEP_ON_SQLITE = Case("SQLite", 4, 1, "assemble")


def event(name: str, number: int) -> NewRecord:
    """The numbered event of a load: a call of about 1 KB, in an episode with the one ``APART`` before or behind it."""
    block, place = divmod(number, 2 * APART)
    call = Call(
        id=f"{name}-{number}",
        messages=(Message(role="user", content=f"{number}: {TEXT}"),),
        output=Message(role="assistant", content="declined_card_payment"),
        finish_reason="stop",
    )
    made = Event(
        id=call.id,
        tenant="default",
        policy="assistant",
        episode=f"ep_{name}-{block}-{place % APART}",
        seq=place // APART,
        time=time.time(),
        payload=call,
    )
    return NewRecord(EVENTS.name, made.key, wire.encode(made), {"schema": "Event", "id": made.id}, made.time)


class Workers:
    """The processes that handle; what they say of themselves."""

    def __init__(self, step: str, running: Sequence[Running]) -> None:
        self._name = f'everloop_handler_records_total{{handler="{step}"}} '
        self._running = running
        self.pids = [one.pid for one in running]

    def handled(self) -> int:
        """Events that are committed, since the start."""
        return sum(self._handled(one.url) for one in self._running)

    def _handled(self, url: str) -> int:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return int(float(next((line for line in lines if line.startswith(self._name)), " 0").split()[-1]))

    def until(self, count: int) -> float:
        """Seconds on a monotonic clock when so many are handled. Raises SystemExit where that does not come."""
        end = time.monotonic() + DEADLINE
        while (found := self.handled()) < count:
            if time.monotonic() > end:
                raise SystemExit(f"after {DEADLINE:g} s only {found} of {count} events are handled")
            time.sleep(min(1.0, max(0.05, (count - found) / 10_000)))  # answering takes the workers' time
        return time.monotonic()


@contextmanager
def working(case: Case, home: Home, url: str) -> Iterator[Workers]:
    """The case's workers, ready."""
    with ExitStack() as running:
        settings = environment(home, "http://127.0.0.1:9", url) | {"EVERLOOP_LOG__PARTITIONS": str(case.partitions)}
        started = []
        for number in range(case.workers):
            name = f"worker-{number}"
            command = (sys.executable, "-m", "benchmarks._worker", name, case.step)
            started.append(running.enter_context(process(name, command, settings, home)))
        yield Workers(case.step, started)


def produce(log: Log, name: str, numbers: Sequence[int]) -> float:
    """Append as fast as the log takes it; when the last was acknowledged."""
    under_way: deque[Any] = deque()
    for first in range(0, len(numbers), AT_ONCE):
        if len(under_way) >= OUTSTANDING:
            under_way.popleft().result()
        under_way.append(log.append_soon([event(name, number) for number in numbers[first : first + AT_ONCE]]))
    for one in under_way:
        one.result()
    return time.monotonic()


class Reader:
    """Another process's view: reads outputs as they come, in a thread, and notes when each event was in one."""

    def __init__(self, log: Log, ids: Callable[[Record], list[str]]) -> None:
        self.seen: dict[str, float] = {}
        self._ids = ids
        self._log = log
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Reader:
        self._thread.start()
        self._ready.wait(DEADLINE)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        consumer = self._log.consumer("reader", [EPISODES.name], start="latest")
        while len(consumer.assignment()) < self._log.partitions(EPISODES.name):
            consumer.poll(timeout=0.1)
        self._ready.set()
        while not self._stop.is_set():
            records = consumer.poll(timeout=0.2)
            now = time.monotonic()
            for record in records:
                for one in self._ids(record):
                    self.seen.setdefault(one, now)
        consumer.close()


def noted(record: Record) -> list[str]:
    return [record.headers["id"]]


def assembled(record: Record) -> list[str]:
    return [turn.call.id for turn in wire.decode(Episode, record.value or b"").turns]


READ = {"note": noted, "assemble": assembled}


def latencies(log: Log, step: str, count: int) -> list[float]:
    """Milliseconds of each event at the fixed rate."""
    sent: dict[str, float] = {}
    with Reader(log, READ[step]) as reader:
        began = time.monotonic()
        for number in range(count):
            time.sleep(max(0.0, began + number / RATE - time.monotonic()))
            one = event("slow", number)
            sent[one.headers["id"]] = time.monotonic()
            log.append_soon([one])
        end = time.monotonic() + DEADLINE
        while sent.keys() - reader.seen.keys():
            if time.monotonic() > end:
                raise SystemExit(f"after {DEADLINE:g} s {len(sent.keys() - reader.seen.keys())} outputs are missing")
            time.sleep(0.05)
        return [1000 * (reader.seen[one] - at) for one, at in sent.items()]


def check(log: Log, step: str, wanted: set[str]) -> None:
    """Raises SystemExit where an event has no output, or ``note`` gave two."""
    found: Counter[str] = Counter()
    for partition in range(log.partitions(EPISODES.name)):
        offset = 0
        while records := log.read(EPISODES.name, partition, offset, 2000):
            found.update(one for record in records for one in READ[step](record))
            offset = records[-1].offset + 1
    missing = wanted - found.keys()
    twice = sum(count > 1 for count in found.values()) if step == "note" else 0
    if missing or twice:
        raise SystemExit(f"of {len(wanted)} events {len(missing)} were not handled, and {twice} more than once")


def measure(case: Case, home: Home, url: str, broker: int | None, backlog: int, seconds: float) -> dict[str, Any]:
    """One row of the table."""
    numbers = range(backlog)
    with working(case, home, url) as workers:
        log = connect(url, partitions=case.partitions)
        produce(log, "warm", range(WARM))
        workers.until(WARM)
        shared = [broker] if broker else []
        before = _cpu.seconds(workers.pids), _cpu.seconds(shared)
        began = time.monotonic()
        produced = produce(log, "fast", numbers)
        handled = workers.until(WARM + backlog)
        cost = _cpu.seconds(workers.pids) - before[0], _cpu.seconds(shared) - before[1]
        slow = latencies(log, case.step, round(RATE * seconds))
        ids = {
            f"{name}-{at}"
            for name, many in (("warm", WARM), ("fast", backlog), ("slow", len(slow)))
            for at in range(many)
        }
        check(log, case.step, ids)
        log.close()
    return {
        **case._asdict(),
        "appended/s": round(backlog / (produced - began)),
        "events/s": round(backlog / (handled - began)),
        "worker us": round(1e6 * cost[0] / backlog),
        "broker us": round(1e6 * cost[1] / backlog) if broker else None,
        "p50 ms": round(statistics.median(slow), 1),
        "p99 ms": round(statistics.quantiles(slow, n=100)[98], 1),
    }


def main() -> int:
    options, began = parser(__doc__ or "").parse_args(), load()
    backlog, seconds = (QUICK_BACKLOG, QUICK_SECONDS) if options.quick else (BACKLOG, SECONDS)
    rows = []
    with tempfile.TemporaryDirectory(prefix="ev-log-") as folder:
        broker = Broker(Path(folder) / "broker", tied=True)
        broker.start()
        try:
            for number, case in enumerate(CASES):
                home = Home(Path(folder) / f"home-{number}")
                here = f"kafka://{broker.address}/case{number}", broker.pid
                url, pid = here if case.backend == "Kafka" else (f"sqlite:///{home.folder() / 'log.db'}", None)
                rows.append(measure(case, home, url, pid, backlog, seconds))
                print(rows[-1], file=sys.stderr)
        finally:
            broker.stop()
    rate = {Case(*(row[name] for name in Case._fields)): row["events/s"] for row in rows}
    aims = [
        *(
            aim(f"events/s through the whole assemble step on Kafka, workers: {case.workers}", 3000, rate[case])
            for case in WHOLE_STEP
        ),
        aim("events/s to a small handler (note) on SQLite", 5000, rate[TO_A_HANDLER]),
        aim("events/s through the whole assemble step on SQLite", 5000, rate[WHOLE_STEP_ON_SQLITE]),
    ]
    notes = [
        f"a backlog of {backlog:,} events, then {seconds:g} s at {RATE:g}/s",
        "producer, workers and broker share the cores",
        "every event was handled; by note exactly once",
        loads(began),
    ]
    publish("log", rows, aims, quick=options.quick, notes=notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
