"""What the gateway adds: latency and requests a second over calling the same upstream directly, capture on.

``wrk`` makes the load, a stub that answers 256 tokens stands behind (``_upstream``; with ids and log-probabilities to
the gateway, which asks for them), and the gateway runs as its own process with its defaults. Answers come whole and as
streams; the time of a stream is that to its last byte. LiteLLM's proxy stands beside it (``_litellm``), before the same
stub and with as many workers as the gateway has processes. Rounds of all take turns, so that each sees the same
machine; medians over rounds are shown. One more round notes the id of every acknowledged call.

The run fails unless the log holds as many whole calls as were acknowledged, none twice, and every noted one is, once
and whole, in the store that the assembler makes of that log afterwards.

``--beside nothing`` leaves LiteLLM out, as ``--quick`` does by itself. ``--log kafka`` measures the same on a broker
that is started for it and shares the cores: the gateway's spool is drained while requests come, and what it holds at
the end of the load is printed, beside the embedded log's kept result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from everloop.event import Call, Event
from everloop.home import Home
from everloop.log import connect
from everloop.wire import decode

from benchmarks import _cpu, _litellm
from benchmarks._litellm import litellm
from benchmarks._report import RESULTS, Aim, aim, loads, parser, publish
from benchmarks._report import load as load_now
from benchmarks._services import environment, process, service
from benchmarks._upstream import TOKENS
from benchmarks._wrk import Load, Round
from pipelines.store import Store
from services.broker.process import Broker
from services.gateway.keys import Keys

CONNECTIONS = (1, 16, 64)
ROUNDS, SECONDS = 3, 4
QUICK_ROUNDS, QUICK_SECONDS = 3, 2
DEADLINE = 300.0


class Side(NamedTuple):
    """Something that answers at ``url``. ``pid``: of its first process; of the stub nobody asks."""

    name: str
    url: str
    load: Load
    pid: int | None = None


@contextmanager
def upstream() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-m", "benchmarks._upstream"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait(10)


def measure(sides: Sequence[Side], rounds: int, seconds: int) -> tuple[list[dict[str, Any]], int]:
    """A row for each side, kind of answer and number of connections; and how many calls the gateway acknowledged.

    The first side is the bare upstream, the second one the gateway.
    """
    acknowledged = 0
    for side in sides:
        for stream in (False, True):  # the first ones warm everything up
            side.load.first(side.url, stream=stream)
            warmed = side.load.run(side.url, 16, 3, stream=stream).requests
            acknowledged += warmed if side is sides[1] else 0
    rows: list[dict[str, Any]] = []
    for stream in (False, True):
        for connections in CONNECTIONS:
            taken = [
                [side.load.run(side.url, connections, seconds, stream=stream) for side in sides] for _ in range(rounds)
            ]
            acknowledged += sum(each[1].requests for each in taken)
            for at, side in enumerate(sides):
                head = {"answer": "stream" if stream else "whole", "connections": connections, "through": side.name}
                rows.append(head | _row([(each[0], each[at]) for each in taken], side.pid if at else None))
    return rows, acknowledged


def _row(pairs: list[tuple[Round, Round]], pid: int | None) -> dict[str, Any]:
    """Of rounds (direct, through one side), taken in turn. ``pid`` None: this is the bare upstream itself."""

    def middle(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    row = {
        "requests/s": middle([its.rate for _, its in pairs]),
        "best requests/s": middle([max(its.rate for _, its in pairs)]),
        "p50 ms": middle([its.p50 for _, its in pairs]),
        "p99 ms": middle([its.p99 for _, its in pairs]),
    }
    if pid is None:
        return row
    return row | {
        "added p50 ms": middle([its.p50 - direct.p50 for direct, its in pairs]),
        "added p99 ms": middle([its.p99 - direct.p99 for direct, its in pairs]),
        "least added p99 ms": middle([min(its.p99 - direct.p99 for direct, its in pairs)]),
        "memory MB": round(_cpu.resident(_cpu.family(pid))),
    }


@contextmanager
def log_of(kind: str, folder: Path, home: Home) -> Iterator[str]:
    """The URL of a log of this kind."""
    if kind == "sqlite":
        yield f"sqlite:///{home.root / 'log.db'}"
        return
    broker = Broker(folder / "broker", tied=True)
    broker.start()
    try:
        yield f"kafka://{broker.address}"
    finally:
        broker.stop()


def wait_for_spool(gateway: str) -> tuple[int, float]:
    """(events in the spool, seconds until it was empty); none on the embedded log. Raises SystemExit."""
    began = time.monotonic()
    first = -1
    while (waiting := _in_spool(gateway)) or first < 0:
        first = waiting if first < 0 else first
        if time.monotonic() - began > DEADLINE:
            raise SystemExit(f"after {DEADLINE:g} s {waiting} events are still in the spool")
        time.sleep(0.5)
    return first, time.monotonic() - began


def _in_spool(gateway: str) -> int:
    with urllib.request.urlopen(f"{gateway}/status", timeout=10) as answer:
        return int(json.loads(answer.read())["spool"].get("records", 0))


def check_log(url: str, home: Home, acknowledged: int) -> int:
    """How many whole calls the log holds. Raises SystemExit where one that was acknowledged is missing or twice."""
    log = connect(url)
    calls: set[str] = set()
    records = 0
    for partition in range(log.partitions("events")):
        offset = 0
        while found := log.read("events", partition, offset):
            for record in found:
                call = decode(Event, record.value or b"", home.blobs).payload
                if isinstance(call, Call) and call.error is None:
                    records += 1
                    calls.add(call.id)
                    if call.tokens is None or len(call.tokens.completion) != TOKENS or not call.tokens.checked:
                        raise SystemExit(f"call {call.id} is in the log without its {TOKENS} token ids")
            offset = found[-1].offset + 1
    log.close()
    if records != len(calls) or len(calls) < acknowledged:
        raise SystemExit(f"{acknowledged} calls were acknowledged; the log has {len(calls)}, in {records} records")
    return len(calls)


def check_store(url: str, home: Home, engine: str, noted: list[str], calls: int) -> None:
    """Let the assembler make the store, and find every noted call there once. Raises SystemExit where one is not."""
    with closing(Store(home.root / "store")) as store, service("assembler", home, engine, log=url):
        end = time.monotonic() + DEADLINE
        while (found := _in_store(store)) < calls:
            if time.monotonic() > end:
                raise SystemExit(f"after {DEADLINE:g} s only {found} of {calls} calls are in the store")
            time.sleep(1)
        stored = [str(row["call"]) for row in store.rows("SELECT call FROM turns WHERE error IS NULL")]
        missing = set(noted) - set(stored)
        if missing or len(stored) != len(set(stored)):
            twice = len(stored) - len(set(stored))
            raise SystemExit(f"{len(missing)} acknowledged calls are not in the store, {twice} are there twice")


def _in_store(store: Store) -> int:
    (row,) = store.rows("SELECT count(*) AS n FROM turns WHERE error IS NULL")
    return int(row["n"])


def main() -> int:
    options, began = _options(), load_now()
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if options.quick else (ROUNDS, SECONDS)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        home = Home(Path(folder) / "home")
        load = Load(Path(folder), Keys(home.root / "keys.db").create("default"))
        direct = running.enter_context(upstream())
        url = running.enter_context(log_of(options.log, Path(folder), home))
        command = (sys.executable, "-m", "services.gateway")
        with process("gateway", command, environment(home, direct, url), home) as gateway:
            processes = len(_cpu.family(gateway.pid))
            sides = [Side("nothing", direct, load), Side("gateway", gateway.url, load, gateway.pid)]
            with ExitStack() as beside:
                if options.beside == "litellm":
                    proxy = beside.enter_context(litellm(direct, Path(folder) / "litellm", processes))
                    sides.append(Side("LiteLLM", proxy.url, Load(Path(folder) / "litellm", proxy.key), proxy.pid))
                rows, acknowledged = measure(sides, rounds, seconds)
            noted = Path(folder) / "calls"
            acknowledged += load.run(gateway.url, 16, 2, noted).requests
            waited = wait_for_spool(gateway.url)
        ids = noted.read_text().split()
        calls = check_log(url, home, max(acknowledged, len(ids)))
        check_store(url, home, direct, ids, calls)
    notes = [
        f"medians of {rounds} rounds of {seconds} s each; wrk, stub, gateway and what is beside it share the cores",
        f"the gateway is {processes} processes (event loop; sealing and log)",
        f"{acknowledged} calls acknowledged, {calls} in the log; {len(ids)} noted by id, all in the store once",
    ]
    if options.beside == "litellm":
        notes.append(f"LiteLLM {_litellm.version()}: {processes} workers of uvicorn, no database, records nothing")
    if options.log == "kafka":
        notes.append(f"{waited[0]} events were in the spool at the end of the load, none {waited[1]:.0f} s later")
    name = "gateway" if options.log == "sqlite" else "gateway-kafka"
    aims = aims_of(rows) if options.log == "sqlite" else _times(rows, notes)
    notes.append(loads(began))
    publish(name, rows, aims, quick=options.quick, part=options.beside == "nothing", notes=notes)
    return 0


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--log", choices=("sqlite", "kafka"), default="sqlite", help="the log behind the gateway")
    made.add_argument("--beside", choices=("litellm", "nothing"), help="what else is measured; litellm by default")
    options = made.parse_args()
    alone = options.quick or options.log == "kafka"
    options.beside = options.beside or ("nothing" if alone else "litellm")
    return options


def _times(rows: list[dict[str, Any]], notes: list[str]) -> list[Aim]:
    """How many times the requests of this log the embedded one's last full run had."""
    kept = RESULTS / "gateway.json"
    if not kept.exists():
        notes.append("no result on the embedded log to compare with: run this without --log first")
        return []
    before = json.loads(kept.read_text())["rows"]
    return [
        aim(
            f"requests/s of the embedded log over these, {connections} connections",
            1.2,
            round(
                _of(before, "gateway", connections)["requests/s"] / _of(rows, "gateway", connections)["requests/s"], 3
            ),
            most=True,
        )
        for connections in CONNECTIONS
    ]


def aims_of(rows: list[dict[str, Any]]) -> list[Aim]:
    """The aims, of whole answers; those beside LiteLLM where it was measured."""
    ours = _of(rows, "gateway", 16)
    aims = [
        aim("requests/s at 16 connections", 3000, ours["requests/s"]),
        aim("added p50 at 1 connection, ms", 1.0, _of(rows, "gateway", 1)["added p50 ms"], most=True),
    ]
    if any(row["through"] == "LiteLLM" for row in rows):
        theirs = _of(rows, "LiteLLM", 16)
        times, part = ours["requests/s"] / theirs["requests/s"], ours["added p99 ms"] / theirs["added p99 ms"]
        aims += [
            aim("times LiteLLM's requests/s at 16 connections", 25, round(times, 1)),
            aim("part of LiteLLM's added p99 at 16 connections", 0.05, round(part, 3), most=True),
        ]
    return aims


def _of(rows: list[dict[str, Any]], through: str, connections: int) -> dict[str, Any]:
    its = (row for row in rows if row["through"] == through and row["answer"] == "whole")
    return next(row for row in its if row["connections"] == connections)


if __name__ == "__main__":
    sys.exit(main())
