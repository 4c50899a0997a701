"""Two tenants with two policies each through the whole loop: what one of them leaves never reaches another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.processes, pytest.mark.models, pytest.mark.mlflow, pytest.mark.ray]
EVERLOOP = [sys.executable, "-m", "everloop.cli.main"]
PAIRS = [("north", "alpha"), ("north", "beta"), ("south", "alpha"), ("south", "beta")]
COUNTS = {pair: 12 + 4 * at for at, pair in enumerate(PAIRS)}
HEAD = """
home = "{root}/home"
cache = "{root}/cache"
[gateway]
port = 0
[serving]
port = 0
threads = 1
[services]
assembler_port = 0
reward_port = 0
learner_port = 0
releaser_port = 0
"""
POLICY = """
[tenants.{tenant}.policies.{policy}]
base = "{base}"
max_tokens = 6
temperature = 1.0
[tenants.{tenant}.policies.{policy}.train]
recipe = "{root}/short.toml"
min_scored = 4000
"""
RECIPE = """
[reward]
source = "feedback"
[optimizer]
epochs = 1
"""


class Platform:
    def __init__(self, root: Path, base: Path) -> None:
        config = root / "everloop.toml"
        (root / "short.toml").write_text(RECIPE)
        parts = (POLICY.format(tenant=t, policy=p, base=base, root=root) for t, p in PAIRS)
        config.write_text(HEAD.format(root=root) + "".join(parts))
        clean = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
        self.environment = {**clean, "EVERLOOP_CONFIG": str(config), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*EVERLOOP, "up", "--json"], env=self.environment, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.ready: dict[str, Any] = json.loads(self.process.stdout.readline())

    def client(self, tenant: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.ready["url"], api_key=self.ready["keys"][tenant], max_retries=0)

    def does(self, *words: str) -> str:
        done = subprocess.run([*EVERLOOP, *words], env=self.environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def rows(self, query: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.does("sql", "--json", query).splitlines()]


@pytest.fixture
def platform(tmp_path: Path, untrained: Path) -> Iterator[Platform]:
    made = Platform(tmp_path, untrained)
    yield made
    made.process.send_signal(signal.SIGINT)
    try:
        made.process.wait(30)
    except subprocess.TimeoutExpired:
        made.process.kill()
        made.process.wait()


def talk(client: openai.OpenAI, policy: str, number: int) -> tuple[str, str]:
    """(response id, policy version) of one rated call by customer ``number``."""
    raw = client.chat.completions.with_raw_response.create(
        model=policy, messages=[{"role": "user", "content": f"question {number}"}], user=f"customer-{number}"
    )
    response = raw.parse().id
    word = {"response_id": response, "kind": "thumb", "value": 1 if number % 2 else -1}
    client.post("/feedback", body=word, cast_to=object)
    return response, raw.headers["X-Everloop-Policy-Version"]


def test_nothing_crosses(platform: Platform, tmp_path: Path, until: Callable[..., Any]) -> None:
    clients = {tenant: platform.client(tenant) for tenant in ("north", "south")}
    responses = {}
    for (tenant, policy), count in COUNTS.items():
        for number in range(count):
            responses[tenant, policy], version = talk(clients[tenant], policy, number)
            assert version == "base"

    # One tenant neither rates nor calls what is another's.
    word = {"response_id": responses["south", "alpha"], "kind": "thumb", "value": 1}
    with pytest.raises(openai.NotFoundError):
        clients["north"].post("/feedback", body=word, cast_to=object)

    counted = "select tenant, policy, count(*) n, count(thumb) rated from turns group by all order by all"
    expected = [{"tenant": t, "policy": p, "n": n, "rated": n} for (t, p), n in COUNTS.items()]
    until(lambda: platform.rows(counted) == expected, 60, every=0.5)
    people = platform.rows("select subject, count(distinct tenant) tenants from turns group by subject")
    assert {row["tenants"] for row in people} == {1}, "a customer of both tenants has another pseudonym in each"

    def labels() -> dict[str, int]:
        rewards = json.loads(platform.does("status", "--json"))["services"]["scorer"]["rewards"]
        return {name: said["labels"] for name, said in rewards.items()}

    until(lambda: labels() == {f"{t}/{p}": n for (t, p), n in COUNTS.items()}, 60, every=0.5)

    platform.does("retrain", "--policy", "north/alpha", "--wait")
    (run,) = platform.rows("select tenant, policy, batch, adapter from runs")
    assert (run["tenant"], run["policy"]) == ("north", "alpha")
    batch = pq.read_table(tmp_path / "home" / "batches" / f"{run['batch']}.parquet")
    theirs = platform.rows("select episode from turns where tenant = 'north' and policy = 'alpha'")
    assert set(batch.column("episode").to_pylist()) == {row["episode"] for row in theirs}

    platform.does("release", "promote", run["adapter"], "--policy", "north/alpha", "--reason", "looked at it")
    versions = {(t, p): talk(clients[t], p, 99)[1] for t, p in PAIRS}
    assert versions == {pair: run["adapter"] if pair == ("north", "alpha") else "base" for pair in PAIRS}
