"""What the gateway adds: latency and requests a second over calling the same upstream directly, capture on.

``wrk`` makes the load, a stub that answers 256 token ids with log-probabilities stands behind (``_upstream``), and
the gateway runs as its own process with its defaults. Rounds with and without the gateway take turns, so that both
see the same machine; medians over rounds are shown. One more round notes the id of every acknowledged call.

The run fails unless the log holds as many whole calls as were acknowledged, none twice, and every noted one is, once
and whole, in the store that the assembler makes of that log afterwards.

``--log kafka`` measures the same on a broker that is started for it and shares the cores: the gateway's spool is
drained while requests come, and what it holds at the end of the load is printed, beside the embedded log's kept result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from everloop.event import Call, Event
from everloop.home import Home
from everloop.log import connect
from everloop.wire import decode

from benchmarks._report import RESULTS, Aim, aim, loads, parser, publish
from benchmarks._report import load as load_now
from benchmarks._services import service
from benchmarks._upstream import TOKENS
from pipelines.store import Store
from services.broker.process import Broker
from services.gateway.keys import Keys

CONNECTIONS = (1, 16, 64)
ROUNDS, SECONDS = 5, 5
QUICK_ROUNDS, QUICK_SECONDS = 3, 3
DEADLINE = 300.0
BODY = {
    "model": "assistant",
    "messages": [
        {"role": "system", "content": "You answer a bank's customers. Name the topic of the message."},
        {"role": "user", "content": "My card has not arrived yet, and I ordered it two weeks ago. What can I do?"},
    ],
}
SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer %(key)s"
wrk.body = [[%(body)s]]
local file = os.getenv("CALLS") and io.open(os.getenv("CALLS"), "a")
if file then
  response = function(status, headers)
    if status == 200 then file:write(headers["X-Everloop-Call"], "\\n") file:flush() end
  end
end
done = function(summary, latency)
  local errors = summary.errors
  io.write(string.format('{"requests":%%d,"microseconds":%%d,"refused":%%d,"broken":%%d,"p50":%%f,"p99":%%f}\\n',
    summary.requests, summary.duration, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


class Round(NamedTuple):
    """One run of ``wrk``. Latencies in milliseconds."""

    requests: int
    rate: float
    p50: float
    p99: float


def find_wrk() -> str:
    """Where ``wrk`` is; installed where it can be. Exits, saying how, where it cannot."""
    apt = shutil.which("apt-get")
    if shutil.which("wrk") is None and apt and os.geteuid() == 0:
        print("installing wrk (apt-get install wrk) …", flush=True)
        subprocess.run([apt, "install", "--yes", "--quiet", "wrk"], stdout=subprocess.DEVNULL, check=False)
    found = shutil.which("wrk")
    if found is None:
        raise SystemExit(
            "benchmarks.gateway needs 'wrk', which makes load without taking much of the machine: a load generator in "
            "Python measures itself. Install it: apt-get install wrk (Debian, Ubuntu), brew install wrk (macOS)"
        )
    return found


@contextmanager
def upstream() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-m", "benchmarks._upstream"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait(10)


class Load:
    """Runs ``wrk`` with one script against one URL or another."""

    def __init__(self, folder: Path, key: str) -> None:
        self._wrk = find_wrk()
        self._script = folder / "request.lua"
        self._script.write_text(SCRIPT % {"key": key, "body": json.dumps(BODY)})

    def run(self, url: str, connections: int, seconds: int, calls: Path | None = None) -> Round:
        """Raises SystemExit where any answer was not 200."""
        command = [self._wrk, "-t1", f"-c{connections}", f"-d{seconds}s", f"-s{self._script}"]
        environment = {**os.environ} | ({"CALLS": str(calls)} if calls else {})
        out = subprocess.run(
            [*command, f"{url}/v1/chat/completions"], env=environment, capture_output=True, text=True, check=True
        ).stdout
        said = json.loads(out.splitlines()[-1])
        if said["refused"] or said["broken"] or not said["requests"]:
            raise SystemExit(f"not every request was answered: {said}")
        rate = said["requests"] / (said["microseconds"] / 1e6)
        return Round(said["requests"], rate, said["p50"] / 1000, said["p99"] / 1000)


def measure(load: Load, direct: str, gateway: str, rounds: int, seconds: int) -> tuple[list[dict[str, Any]], int]:
    """A row for each number of connections, and how many calls the gateway acknowledged in all."""
    acknowledged = load.run(gateway, 16, 2).requests  # the first ones warm everything up
    load.run(direct, 16, 1)
    rows = []
    for connections in CONNECTIONS:
        pairs = []
        for _ in range(rounds):
            pairs.append((load.run(direct, connections, seconds), load.run(gateway, connections, seconds)))
        acknowledged += sum(through.requests for _, through in pairs)
        rows.append(_row(connections, pairs))
    return rows, acknowledged


def _row(connections: int, pairs: list[tuple[Round, Round]]) -> dict[str, Any]:
    def middle(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    return {
        "connections": connections,
        "direct requests/s": middle([direct.rate for direct, _ in pairs]),
        "gateway requests/s": middle([through.rate for _, through in pairs]),
        "best requests/s": middle([max(through.rate for _, through in pairs)]),
        "added p50 ms": middle([through.p50 - direct.p50 for direct, through in pairs]),
        "added p99 ms": middle([through.p99 - direct.p99 for direct, through in pairs]),
        "least added p99 ms": middle([min(through.p99 - direct.p99 for direct, through in pairs)]),
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
        key = Keys(home.root / "keys.db").create("default")
        load = Load(Path(folder), key)
        direct = running.enter_context(upstream())
        url = running.enter_context(log_of(options.log, Path(folder), home))
        with service("gateway", home, direct, log=url) as gateway:
            rows, acknowledged = measure(load, direct, gateway, rounds, seconds)
            noted = Path(folder) / "calls"
            acknowledged += load.run(gateway, 16, 2, noted).requests
            waited = wait_for_spool(gateway)
        ids = noted.read_text().split()
        calls = check_log(url, home, max(acknowledged, len(ids)))
        check_store(url, home, direct, ids, calls)
    notes = [
        f"medians of {rounds} rounds of {seconds} s each; wrk, stub and gateway share the cores",
        f"{acknowledged} calls acknowledged, {calls} in the log; {len(ids)} noted by id, all in the store once",
    ]
    if options.log == "kafka":
        notes.append(f"{waited[0]} events were in the spool at the end of the load, none {waited[1]:.0f} s later")
    name = "gateway" if options.log == "sqlite" else "gateway-kafka"
    aims = _aims(rows) if options.log == "sqlite" else _times(rows, notes)
    notes.append(loads(began))
    publish(name, rows, aims, quick=options.quick, notes=notes)
    return 0


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--log", choices=("sqlite", "kafka"), default="sqlite", help="the log behind the gateway")
    return made.parse_args()


def _times(rows: list[dict[str, Any]], notes: list[str]) -> list[Aim]:
    """How many times the requests of this log the embedded one's last full run had."""
    kept = RESULTS / "gateway.json"
    if not kept.exists():
        notes.append("no result on the embedded log to compare with: run this without --log first")
        return []
    before = {row["connections"]: row["gateway requests/s"] for row in json.loads(kept.read_text())["rows"]}
    return [
        aim(
            f"requests/s of the embedded log over these, {row['connections']} connections",
            1.2,
            round(before[row["connections"]] / row["gateway requests/s"], 3),
            most=True,
        )
        for row in rows
    ]


def _aims(rows: list[dict[str, Any]]) -> list[Aim]:
    (at_16,) = (row for row in rows if row["connections"] == 16)
    return [
        aim("requests/s at 16 connections", 2500, at_16["gateway requests/s"]),
        aim("added p99 at 16 connections, ms", 8, at_16["added p99 ms"], most=True),
    ]


if __name__ == "__main__":
    sys.exit(main())
