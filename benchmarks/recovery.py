"""Seconds from a kill -9 of worker, broker and gateway until events are handled again, and until none waits any more.

On a real broker in a temporary folder: the gateway and the assembler run under the supervisor of ``everloop up``, and
clients ask the gateway without pause, before, meanwhile and afterwards; a stub stands for the engine. What is killed:

- ``worker``: the one assembler; the supervisor starts it anew;
- ``one of two workers``: the same with a second worker beside it, which takes its partitions over;
- ``broker``: started again at once on what it had on disk, and that is counted too;
- ``gateway``: with its scribe; the supervisor starts it anew.

**first** counts from the kill until an event that was acknowledged after it is handled, in every partition that the
killed process had (of broker and gateway: in all): its episode can be read from the log by another process.
**backlog** counts until the last event is handled that had to wait for longer than a second. **silence** is the
longest time for which no request was answered. Each try begins on services that were just started, and the load goes
on until everything is handled.

The run fails unless every call that was acknowledged is in the store, once.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from everloop import wire
from everloop.episode import Episode
from everloop.errors import LogError
from everloop.home import Home
from everloop.log import connect, partition_of
from everloop.topics import EPISODES

from benchmarks._report import Aim, aim, load, loads, parser, publish
from benchmarks._services import environment, process
from benchmarks.gateway import upstream
from pipelines.store import Store
from services.broker.process import Broker
from services.gateway.keys import Keys

TRIES, QUICK_TRIES = 5, 2
PARTITIONS = 4
CLIENTS, RATE = 4, 80.0  # requests a second of all of them
BEFORE, SETTLED = 3.0, 2.0  # seconds of load before a kill, and after all is handled
WAITED = 1.0  # seconds from acknowledged to handled, above which an event counts as backlog
LOOK = 0.05
DEADLINE = 120.0
WORKER, ONE_OF_TWO, BROKER, GATEWAY = "worker", "one of two workers", "broker", "gateway"
KINDS = (WORKER, ONE_OF_TWO, BROKER, GATEWAY)


class Acknowledged(NamedTuple):
    """A call that the gateway answered; ``time`` is of a monotonic clock, in seconds."""

    call: str
    partition: int
    time: float


class Recovered(NamedTuple):
    """Seconds from the kill; see the module."""

    first: float
    backlog: float
    silence: float


class Load:
    """Clients that ask at a fixed rate; who is refused asks again. ``acknowledged`` grows."""

    def __init__(self, url: str, key: str) -> None:
        self.acknowledged: list[Acknowledged] = []
        self._where = urlsplit(url)
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    @contextmanager
    def flowing(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def _ask(self, client: int) -> None:
        connection = http.client.HTTPConnection(str(self._where.hostname), self._where.port, timeout=10)
        number, due = 0, time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            number, due = number + 1, max(due + CLIENTS / RATE, time.monotonic() - 0.2)
            words = [{"role": "user", "content": f"{client}-{number}-{time.time()}: where is my card?"}]
            try:
                connection.request("POST", "/v1/chat/completions", _body(words), self._headers)
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                continue
            if answer.status == 200:
                episode = str(answer.headers["X-Everloop-Episode"])
                partition = partition_of(f"default/{episode}", PARTITIONS)
                self.acknowledged.append(Acknowledged(answer.headers["X-Everloop-Call"], partition, time.monotonic()))


def _body(messages: list[dict[str, str]]) -> bytes:
    return json.dumps({"model": "assistant", "messages": messages}).encode()


class Watch:
    """Reads episodes from the log as they come and notes when each call was in one. ``handled`` grows."""

    def __init__(self, url: str) -> None:
        self.handled: dict[str, float] = {}
        self._log = connect(url)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._log.close()

    def _watch(self) -> None:
        following: dict[int, int] = {}
        while not self._stop.wait(LOOK):
            try:
                for partition in range(self._log.partitions(EPISODES.name)):
                    following[partition] = self._read(partition, following.get(partition, 0))
            except LogError:  # no broker: look again
                continue

    def _read(self, partition: int, offset: int) -> int:
        while records := self._log.read(EPISODES.name, partition, offset):
            now = time.monotonic()
            for record in records:
                for turn in wire.decode(Episode, record.value or b"").turns:
                    self.handled.setdefault(turn.call.id, now)
            offset = records[-1].offset + 1
        return offset


class Installation:
    """One home on one broker; what runs is started anew for each try."""

    def __init__(self, folder: Path, broker: Broker, engine: str) -> None:
        self.home, self.broker = Home(folder / "home"), broker
        self.url = f"kafka://{broker.address}/recovery"
        self.key = Keys(self.home.folder() / "keys.db").create("default")
        self._environment = environment(self.home, engine, self.url) | {"EVERLOOP_LOG__PARTITIONS": str(PARTITIONS)}

    @contextmanager
    def running(self, kind: str) -> Iterator[None]:
        """Gateway and assembler, supervised; beside them a second worker where the kind has two."""
        command = (sys.executable, "-m", "benchmarks._supervised", "gateway", "assembler")
        with ExitStack() as stack:
            supervisor = subprocess.Popen(command, env=self._environment, stdout=subprocess.PIPE, text=True)
            stack.callback(_end, supervisor)
            assert supervisor.stdout is not None
            if supervisor.stdout.readline().strip() != "ready":
                raise SystemExit(f"the services did not start; see {self.home.root / 'logs'}")
            if kind == ONE_OF_TWO:
                its = (sys.executable, "-m", "benchmarks._worker", "second", "assemble")
                stack.enter_context(process("second", its, self._environment, self.home))
            share = PARTITIONS // (2 if kind == ONE_OF_TWO else 1)
            until("every worker its partitions", lambda: len(self.partitions_of("assembler")) == share)
            yield

    def announced(self, name: str) -> dict[str, Any]:
        """What a service says of itself in the home. Raises OSError, ValueError where none runs."""
        found: dict[str, Any] = json.loads((self.home.root / "run" / f"{name}.json").read_text())
        return found

    def partitions_of(self, name: str) -> set[int]:
        """Of the topic ``events``, that a worker has now."""
        try:
            with urllib.request.urlopen(f"{self.announced(name)['url']}/status", timeout=5) as answer:
                offsets = json.load(answer)["assemble"]["offsets"]
        except (OSError, ValueError, KeyError):
            return set()
        return {int(place.rpartition("/")[2]) for place in offsets}

    def kill(self, kind: str) -> tuple[float, set[int]]:
        """kill -9: when, and the partitions that are concerned. A broker is started again."""
        name = "gateway" if kind == GATEWAY else "assembler"
        every = set(range(PARTITIONS))
        concerned = every if kind in (BROKER, GATEWAY) else self.partitions_of(name)
        killed = time.monotonic()
        if kind == BROKER:
            self.broker.kill()
            self.broker.start()
        else:
            os.kill(self.announced(name)["pid"], signal.SIGKILL)
        return killed, concerned


def _end(supervisor: subprocess.Popen[str]) -> None:
    supervisor.terminate()
    supervisor.wait(60)


def until(what: str, condition: Callable[[], bool]) -> None:
    """Wait for it. Ends the benchmark where it does not come."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"the benchmark failed: {what} did not come within {DEADLINE:g} s")
        time.sleep(LOOK)


def attempt(kind: str, installation: Installation, watch: Watch) -> tuple[Recovered, list[Acknowledged]]:
    """One kill, and every call that was acknowledged around it, all of them handled."""
    with installation.running(kind):
        load = Load(installation.announced("gateway")["url"], installation.key)
        with load.flowing():
            time.sleep(BEFORE)
            killed, concerned = installation.kill(kind)
            until("a recovery", lambda: _settled(load.acknowledged, watch.handled, killed, concerned))
            time.sleep(SETTLED)
        until("the last episode", lambda: all(one.call in watch.handled for one in list(load.acknowledged)))
    return recovered(load.acknowledged, watch.handled, killed, concerned), load.acknowledged


def _settled(calls: Sequence[Acknowledged], handled: Mapping[str, float], killed: float, concerned: set[int]) -> bool:
    """Whether each partition has had an event since, and no event has waited for long."""
    since = list(calls)
    there = {one.partition for one in since if one.time > killed and one.call in handled}
    return concerned <= there and all(one.call in handled for one in since if one.time < time.monotonic() - WAITED)


def recovered(
    calls: Sequence[Acknowledged], handled: Mapping[str, float], killed: float, concerned: set[int]
) -> Recovered:
    """The seconds that count, from when each call was acknowledged and handled."""
    first = {partition: float("inf") for partition in concerned}
    late = killed
    for one in calls:
        at = handled[one.call]
        if one.time > killed and one.partition in first:
            first[one.partition] = min(first[one.partition], at)
        if at > killed and at - one.time > WAITED:
            late = max(late, at)
    slowest = max(first.values()) - killed
    answered = sorted(one.time for one in calls)
    silence = max(after - before for before, after in pairwise(answered) if after > killed)
    return Recovered(slowest, max(slowest, late - killed), silence)


def check(store: Store, acknowledged: Sequence[Acknowledged]) -> int:
    """How many calls the store has. Raises SystemExit where one that was acknowledged is not there, or twice."""
    wanted = {one.call for one in acknowledged}
    until("the store's last call", lambda: wanted <= set(_calls(store)))
    stored = _calls(store)
    if len(stored) != len(set(stored)):
        raise SystemExit(f"the benchmark failed: {len(stored) - len(set(stored))} calls are in the store twice")
    return len(stored)


def _calls(store: Store) -> list[str]:
    return [str(row["call"]) for row in store.rows("SELECT call FROM turns WHERE error IS NULL")]


def run(folder: Path, tries: int, kinds: Sequence[str] = KINDS) -> tuple[dict[str, list[Recovered]], str]:
    """Every kind as often, and what was found in the store."""
    found: dict[str, list[Recovered]] = {kind: [] for kind in kinds}
    acknowledged: list[Acknowledged] = []
    broker = Broker(folder / "broker", tied=True)
    with ExitStack() as running:
        broker.start()
        running.callback(broker.stop)
        installation = Installation(folder, broker, running.enter_context(upstream()))
        with Watch(installation.url) as watch:
            for kind in kinds * tries:
                one, calls = attempt(kind, installation, watch)
                found[kind].append(one)
                acknowledged += calls
                print(f"{kind}: {one}", file=sys.stderr)
        with installation.running(WORKER):
            stored = check(Store(installation.home.root / "store"), acknowledged)
    return found, f"{len(acknowledged)} calls acknowledged, every one in the store once; the store has {stored}"


def report(found: Mapping[str, Sequence[Recovered]]) -> tuple[list[dict[str, Any]], list[Aim]]:
    rows = []
    for kind, tries in found.items():
        row: dict[str, Any] = {"killed": kind, "tries": len(tries)}
        for what in Recovered._fields:
            seconds = [getattr(one, what) for one in tries]
            row |= {f"{what} median s": round(statistics.median(seconds), 1), f"worst {what} s": round(max(seconds), 1)}
        rows.append(row)
    worst = {kind: max(one.first for one in tries) for kind, tries in found.items()}
    aims = [
        aim("seconds from the kill of a worker to the first event handled, worst", 12, worst[WORKER], most=True),
        aim("the same, one of two workers", 12, worst[ONE_OF_TWO], most=True),
        aim("seconds from the kill of the broker to the first event handled, worst", 20, worst[BROKER], most=True),
    ]
    return rows, aims


def main() -> int:
    options, began = parser(__doc__ or "").parse_args(), load()
    with tempfile.TemporaryDirectory(prefix="ev-recovery-") as folder:
        found, stored = run(Path(folder), QUICK_TRIES if options.quick else TRIES)
    rows, aims = report(found)
    calls = f"{RATE:g} calls a second of 256 tokens by {CLIENTS} clients, all the while; {PARTITIONS} partitions"
    publish("recovery", rows, aims, quick=options.quick, notes=[calls, stored, loads(began)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
