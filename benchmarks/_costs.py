"""What each step costs: processor time by event, from the kernel's count of each process, and bytes by episode.

On a real broker in a temporary folder, by the platform's own processes, each at a backlog, which is how they work
where capacity matters. Two loads:

- model calls through the gateway by ``wrk``, a stub behind it, 16 connections;
- episodes appended to the log as the gateway seals them: two calls of 256 tokens, then a thumb; assembled, scored and
  learned from, archived, folded, and drawn into a batch.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from everloop import wire
from everloop.config import TrainConfig
from everloop.event import Call, CallTokens, Event, FeedbackGiven, Message
from everloop.feedback import Feedback, FeedbackKind
from everloop.home import Home
from everloop.log import Log, NewRecord, connect
from everloop.topics import EVENTS

from benchmarks import _cpu
from benchmarks._services import Running, environment, process
from benchmarks._upstream import TOKENS
from benchmarks._wrk import Load
from benchmarks.gateway import upstream
from pipelines.batch import select
from pipelines.compaction import compact
from pipelines.store import Store
from services.broker.process import Broker
from services.gateway.keys import Keys

EPISODES, QUICK_EPISODES, WARM = 4000, 1000, 60
SCORED, QUICK_SCORED = 600, 150
CALLS = 2  # of an episode
SECONDS, QUICK_SECONDS = 10, 4
DEADLINE = 400.0
TEXT = "my card payment transfer was declined pending refund account cash exchange rate top up fee limit"
WORDS = TEXT.split()
Row = dict[str, Any]


def measure(folder: Path, *, quick: bool = False) -> list[Row]:
    """A row for each step: ``step``, ``per`` (of what), ``us`` (processor time); and for each place: ``bytes``."""
    broker = Broker(folder / "broker", tied=True)
    broker.start()
    try:
        rows = gateway(folder, broker, QUICK_SECONDS if quick else SECONDS)
        rows += assembling(folder, broker, QUICK_EPISODES if quick else EPISODES)
        return rows + scoring(folder, broker, QUICK_SCORED if quick else SCORED)
    finally:
        broker.stop()


def _cost(step: str, per: str, seconds: float, count: int) -> Row:
    return {"step": step, "per": per, "us": round(1e6 * seconds / count, 1), "bytes": None}


def _size(place: str, size: int, episodes: int) -> Row:
    return {"step": place, "per": "episode", "us": None, "bytes": round(size / episodes)}


def gateway(folder: Path, broker: Broker, seconds: int) -> list[Row]:
    """A call through the gateway, until its event is on the broker."""
    home, url = Home(folder / "gateway"), f"kafka://{broker.address}/gateway"
    load = Load(folder, Keys(home.folder() / "keys.db").create("default"))
    command = (sys.executable, "-m", "services.gateway")
    with upstream() as engine, process("gateway", command, environment(home, engine, url), home) as its:
        log = connect(url)
        done = load.run(its.url, 16, 2).requests
        _until("the events of the first calls", lambda: sum(log.end_offsets(EVENTS.name)) >= done)
        serving, writing = [its.pid], [pid for pid in _cpu.family(its.pid) if pid != its.pid]
        parts = {"gateway: serving": serving, "gateway: scribe": writing}
        before = {name: _cpu.seconds(pids) for name, pids in parts.items()}
        began = sum(log.end_offsets(EVENTS.name))
        load.run(its.url, 16, seconds)
        _until("an empty spool", lambda: _quiet(lambda: sum(log.end_offsets(EVENTS.name))))
        calls = sum(log.end_offsets(EVENTS.name)) - began
        log.close()
        return [_cost(name, "event", _cpu.seconds(pids) - before[name], calls) for name, pids in parts.items()]


class Step:
    """A worker of a handler: its processor time and how much it handled, since the last look."""

    def __init__(self, name: str, running: Running) -> None:
        self.name, self._running = name, running
        self._seen = (0.0, 0)

    def drained(self, least: int) -> bool:
        """Whether it has handled so many since the last look, and all that there is."""
        return self._handled() >= self._seen[1] + least and _quiet(self._handled) and self._numbers()["lag"] == 0

    def spent(self) -> tuple[float, int]:
        """(seconds, records)"""
        now = _cpu.seconds([self._running.pid]), self._handled()
        before, self._seen = self._seen, now
        return now[0] - before[0], now[1] - before[1]

    def _numbers(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self._running.url}/status", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)[self.name]
        return found

    def _handled(self) -> int:
        name = f'everloop_handler_records_total{{handler="{self.name}"}} '
        with urllib.request.urlopen(f"{self._running.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return int(float(next((line for line in lines if line.startswith(name)), " 0").split()[-1]))


def assembling(folder: Path, broker: Broker, episodes: int) -> list[Row]:
    """From events to episodes, alone with the broker; then what is there into Parquet."""
    name = "assembling"
    home, settings = _home(folder, broker, name)
    assert broker.pid is not None
    rows: list[Row] = []
    with _running(broker, name, home, settings, ("assemble",)) as (log, steps):
        for what, events in (("call", list(calls("ep", episodes))), ("feedback", list(thumbs("ep", episodes)))):
            busy = _cpu.seconds([broker.pid])
            ((spent, count),) = _feed(log, steps, events)
            if count != len(events):
                raise SystemExit(f"assemble handled {count} of {len(events)} events")
            rows.append(_cost(f"assemble: {what}", "event", spent, count))
            rows.append(_cost(f"broker: {what} taken and assembled", "event", _cpu.seconds([broker.pid]) - busy, count))
    rows += archive(home, settings, broker.pid)
    return rows + sizes(home, broker, name, episodes + WARM)


def scoring(folder: Path, broker: Broker, episodes: int) -> list[Row]:
    """From episodes to scores, and a batch of them."""
    name = "scoring"
    home, settings = _home(folder, broker, name)
    assert broker.pid is not None
    rows: list[Row] = []
    with _running(broker, name, home, settings, ("assemble", "score")) as (log, steps):
        for what, events in (("call", list(calls("ep", episodes))), ("feedback", list(thumbs("ep", episodes)))):
            _, (spent, versions) = _feed(log, steps, events)
            rows.append(_cost(f"score: {what}", "version", spent, versions))
    archive(home, settings, broker.pid)
    scored = ("log: scores", "log: everloop-state-score", "store: scores")
    return rows + batch(home) + [row for row in sizes(home, broker, name, episodes + WARM) if row["step"] in scored]


def _home(folder: Path, broker: Broker, name: str) -> tuple[Home, dict[str, str]]:
    home = Home(folder / name)
    return home, environment(home, "http://127.0.0.1:9", f"kafka://{broker.address}/{name}")


@contextmanager
def _running(
    broker: Broker, name: str, home: Home, settings: dict[str, str], steps: Sequence[str]
) -> Iterator[tuple[Log, list[Step]]]:
    """The workers of these steps, warm: every model is loaded, every topic made."""
    with ExitStack() as running:
        log = connect(f"kafka://{broker.address}/{name}")
        running.callback(log.close)
        working = [running.enter_context(_worker(step, settings, home)) for step in steps]
        _feed(log, working, [*calls("warm", WARM), *thumbs("warm", WARM)])
        yield log, working


def _feed(log: Log, steps: Sequence[Step], events: Sequence[NewRecord]) -> list[tuple[float, int]]:
    """What each step spent on them."""
    for step in steps:
        step.spent()
    for first in range(0, len(events), 100):
        log.append(events[first : first + 100])
    assembling, *others = steps
    _until("the last event assembled", lambda: assembling.drained(len(events)))
    for step in others:
        _until(f"the last record of {step.name}", lambda step=step: step.drained(1))
    return [step.spent() for step in steps]


@contextmanager
def _worker(step: str, settings: dict[str, str], home: Home) -> Iterator[Step]:
    command = (sys.executable, "-m", "benchmarks._worker", step, step)
    with process(step, command, settings, home) as running:
        yield Step(step, running)


def calls(name: str, episodes: int) -> Iterator[NewRecord]:
    """First calls of all episodes, then the second ones: they do not meet in a batch."""
    for seq in range(CALLS):
        for number in range(episodes):
            chance = random.Random(f"{name}{seq}{number}")
            said = " ".join(chance.choices(WORDS, k=60)), " ".join(chance.choices(WORDS, k=200))
            yield _event(name, number, seq, _call(f"{name}-{number}-{seq}", *said, chance))


def _call(name: str, asked: str, answer: str, chance: random.Random) -> Call:
    prompt, completion = (chance.choices(range(32_000), k=many) for many in (80, TOKENS))
    return Call(
        id=name,
        messages=(Message(role="user", content=asked),),
        output=Message(role="assistant", content=answer),
        finish_reason="stop",
        tokens=CallTokens(prompt=prompt, completion=completion, logprobs=[-chance.random() for _ in completion]),
    )


def thumbs(name: str, episodes: int) -> Iterator[NewRecord]:
    """One for the first call of each episode."""
    for number in range(episodes):
        value = 1.0 if number % 3 else -1.0
        word = Feedback(
            id=f"{name}-{number}", kind=FeedbackKind.THUMB, value=value, time=time.time(), call=f"{name}-{number}-0"
        )
        yield _event(name, number, None, FeedbackGiven(feedback=word))


def _event(name: str, number: int, seq: int | None, payload: Call | FeedbackGiven) -> NewRecord:
    event = Event(
        id=f"{payload.kind}-{name}-{number}-{seq}",
        tenant="default",
        policy="assistant",
        episode=f"ep_{name}-{number}",
        subject=f"customer-{number}",
        seq=seq,
        time=time.time(),
        payload=payload,
    )
    return NewRecord(EVENTS.name, event.key, wire.encode(event), {"schema": "Event", "id": event.id}, event.time)


def archive(home: Home, settings: dict[str, str], broker: int) -> list[Row]:
    """Every topic into Parquet, by the assembler's own process for it; counted from its first word on."""
    command = (sys.executable, "-m", "services.assembler.filing")
    filing = subprocess.Popen(command, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert filing.stdin is not None
    assert filing.stdout is not None
    try:
        first, busy, begun = _records(filing.stdout.readline()), _cpu.seconds([filing.pid]), _cpu.seconds([broker])
        seen = [first]
        end = time.monotonic() + DEADLINE
        while not (seen[-1] and seen[-3:] == [seen[-1]] * 3) and time.monotonic() < end:
            seen.append(_records(filing.stdout.readline()))
        spent, asked = _cpu.seconds([filing.pid]) - busy, _cpu.seconds([broker]) - begun
    finally:
        filing.stdin.close()
        filing.wait(60)
    records = max(1, seen[-1] - first)
    began = time.process_time()
    compact(home.root / "store", grace=0, min_files=2)
    return [
        _cost("archive", "record", spent, records),
        _cost("archive: fold", "record", time.process_time() - began, seen[-1]),
        _cost("broker: read by the archive", "record", asked, records),
    ]


def _records(line: str) -> int:
    return int(json.loads(line)["archive"]["records"])


def batch(home: Home) -> list[Row]:
    """A batch as a training run draws it, of all there is."""
    store = Store(home.root / "store", blobs=home.blobs)
    began = time.process_time()
    drawn = select(store, "default", "assistant", TrainConfig(), minimum=1)
    return [_cost("batch selection", "call in the batch", time.process_time() - began, len(drawn.items))]


def sizes(home: Home, broker: Broker, prefix: str, episodes: int) -> list[Row]:
    """Bytes of an episode, by topic and by table. What is written anew for each version counts as often."""
    topics: dict[str, int] = {}
    for file in (broker.folder / "data").glob(f"{prefix}.*/*.log"):
        topic = file.parent.name.removeprefix(f"{prefix}.").rpartition("-")[0]
        topics[topic] = topics.get(topic, 0) + file.stat().st_size
    tables = {
        table.name: sum(file.stat().st_size for file in table.rglob("*.parquet"))
        for table in sorted((home.root / "store").iterdir())
        if table.is_dir()
    }
    named = [(f"log: {name}", size) for name, size in sorted(topics.items())]
    named += [(f"store: {name}", size) for name, size in tables.items()]
    return [_size(name, size, episodes) for name, size in named if size >= episodes]


def _quiet(number: Any, seconds: float = 2.5) -> bool:
    """Whether it stays as it is for a while."""
    before = number()
    time.sleep(seconds)
    return bool(before == number())


def _until(what: str, condition: Any) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"{what} did not come within {DEADLINE:g} s")
        time.sleep(0.1)
