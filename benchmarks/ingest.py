"""Episodes a second from the SDK to durable, and to queryable in SQL; the same episodes into MLflow's tracing.

The whole path runs as it does in production: agents in processes of their own with the SDK, the gateway's
``/v1/events`` with its log, and the assembler that makes episodes and Parquet of them beside it. An episode is one
model call with its whole prompt and answer, and the end: two events. It is durable once the gateway has
acknowledged it, queryable once ``SELECT … FROM episodes`` counts it. MLflow writes one trace with two spans for each
into a SQLite store, and counts as done once it has flushed.

The run fails unless every acknowledged episode is in the store, whole and once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from everloop.home import Home

from benchmarks._report import aim, parser, publish
from benchmarks._services import service
from pipelines.store import Store
from services.gateway.keys import Keys

EPISODES, QUICK_EPISODES = 20_000, 6_000
MLFLOW_EPISODES, QUICK_MLFLOW_EPISODES = 300, 100
AGENTS = 2
SYSTEM = "You answer a bank's customers. Name the topic of the message, then call the tool that routes it. " * 3
DEADLINE = 300.0
NO_ENGINE = "http://127.0.0.1:9"  # no model is asked

AGENT = """
import json, sys, time
import everloop
from benchmarks.ingest import episode
url, key, first, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
everloop.configure(url=url, api_key=key, max_queue_bytes=1 << 29, strict=True)
print("ready", flush=True)
sys.stdin.readline()
began = time.time()
for number in range(first, first + count):
    messages, output = episode(number)
    with everloop.record(f"run-{number}", policy="assistant", subject=f"customer-{number % 500}") as one:
        one.call(messages, output, model="elsewhere", finish_reason="stop", latency=0.2)
said = time.time()
flushed = everloop.flush(300)
durable = time.time()
stats = everloop.stats()
print(json.dumps({"began": began, "said": said, "durable": durable, "flushed": flushed, "dropped": stats.dropped}))
"""

TRACING = """
import json, sys, time
import mlflow
from benchmarks.ingest import episode
mlflow.set_tracking_uri(sys.argv[1])
mlflow.set_experiment("ingest")
def trace(number):
    messages, output = episode(number)
    with mlflow.start_span(f"run-{number}") as whole:
        whole.set_inputs({"subject": f"customer-{number % 500}"})
        with mlflow.start_span("call", span_type="CHAT_MODEL") as call:
            call.set_inputs({"messages": messages})
            call.set_outputs(output)
        whole.set_outputs(output)
trace(0)  # opens the store
mlflow.flush_trace_async_logging()
began = time.time()
for number in range(1, 1 + int(sys.argv[2])):
    trace(number)
mlflow.flush_trace_async_logging()
print(json.dumps({"seconds": time.time() - began}))
"""


def episode(number: int) -> tuple[list[dict[str, str]], dict[str, str]]:
    """(prompt, answer) of the numbered episode: about 500 bytes of text."""
    asked = f"Message {number}: my card payment of {number % 97} pounds was declined, and I do not know why."
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]
    return messages, {"role": "assistant", "content": f"declined_card_payment, case {number}"}


class Measured(NamedTuple):
    said: float
    durable: float
    queryable: float


def ingest(episodes: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        home = Home(Path(folder))
        url = running.enter_context(service("gateway", home, NO_ENGINE, answers="/healthz"))
        running.enter_context(service("assembler", home, NO_ENGINE))
        key = Keys(home.root / "keys.db").create("default")
        share = episodes // AGENTS
        agents = [_agent(url, key, n * share, share) for n in range(AGENTS)]
        for agent in agents:
            assert agent.stdout is not None
            agent.stdout.readline()
        for agent in agents:
            assert agent.stdin is not None
            agent.stdin.write("go\n")
            agent.stdin.flush()
        store = Store(home.root / "store")
        queryable = _until_queryable(store, share * AGENTS)
        said = [_result(agent) for agent in agents]
        _check(store, share * AGENTS)
        began = min(one["began"] for one in said)
        return Measured(
            max(one["said"] for one in said) - began,
            max(one["durable"] for one in said) - began,
            queryable - began,
        )


def _agent(url: str, key: str, first: int, count: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", AGENT, url, key, str(first), str(count)]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _result(agent: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = agent.communicate(timeout=DEADLINE)
    said: dict[str, Any] = json.loads(out.splitlines()[-1])
    if not said["flushed"] or said["dropped"]:
        raise SystemExit(f"the SDK did not deliver everything: {said}")
    return said


def _until_queryable(store: Store, episodes: int) -> float:
    """When SQL first counted every episode as complete. Looks twice a second: looking costs what it measures."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        (row,) = store.rows("SELECT count(*) AS n FROM episodes WHERE complete")
        if row["n"] >= episodes:
            return time.time()
        time.sleep(0.5)
    raise SystemExit(f"after {DEADLINE:g} s only {row['n']} of {episodes} episodes can be queried")


def _check(store: Store, episodes: int) -> None:
    (row,) = store.rows("""
        SELECT (SELECT count(*) FROM episodes WHERE complete AND turns = 1) AS episodes,
               (SELECT count(DISTINCT prompt) FROM turns) AS prompts, (SELECT count(*) FROM events) AS events
    """)
    expected = {"episodes": episodes, "prompts": episodes, "events": 2 * episodes}
    if row != expected:
        raise SystemExit(f"what was acknowledged is not what is in the store: {row}, expected {expected}")


def mlflow_seconds(episodes: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", TRACING, f"sqlite:///{folder}/mlflow.db", str(episodes)]
        # In its folder, since that is where MLflow puts artifacts.
        own = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"MLflow's tracing failed:\n{done.stderr[-2000:]}")
        return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def _row(what: str, episodes: int, seconds: float) -> dict[str, Any]:
    return {"path": what, "episodes": episodes, "seconds": round(seconds, 2), "episodes/s": episodes / seconds}


def main() -> int:
    options = parser(__doc__ or "").parse_args()
    episodes = QUICK_EPISODES if options.quick else EPISODES
    traced = QUICK_MLFLOW_EPISODES if options.quick else MLFLOW_EPISODES
    measured = ingest(episodes)
    seconds = mlflow_seconds(traced)
    rows = [
        _row("agent's own time in the SDK", episodes, measured.said),
        _row("SDK to durable", episodes, measured.durable),
        _row("SDK to queryable in SQL", episodes, measured.queryable),
        _row("MLflow tracing, SQLite, until flushed", traced, seconds),
    ]
    durable, mlflow = episodes / measured.durable, traced / seconds
    aims = [
        aim("episodes/s from the SDK to durable", 2600, durable),
        aim("times MLflow's rate", 100, durable / mlflow),
    ]
    notes = [f"{AGENTS} agents, two events an episode; the assembler archived on the same cores meanwhile"]
    publish("ingest", rows, aims, quick=options.quick, notes=notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
