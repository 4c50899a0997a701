"""The airline replay through running services: recorded episodes in, scores and their AUC out."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = ("gateway", "assembler", "scorer")
CONFIG = """\
home = "{home}"
cache = "{cache}"
[gateway]
port = 0
[services]
assembler_port = 0
reward_port = 0
[tenants.default.policies.airline]
base = "tiny-k2"
"""


@pytest.fixture
def running(tmp_path: Path, until: Callable[..., Any]) -> Iterator[tuple[Path, str]]:
    """(configuration, gateway's URL) of the services that a replay needs: nobody is asked, so there is no engine."""
    home, config = tmp_path / "home", tmp_path / "everloop.toml"
    config.write_text(CONFIG.format(home=home, cache=ROOT / ".everloop/cache"))
    with contextlib.ExitStack() as stack:
        for name in SERVICES:
            command = [sys.executable, "-m", f"services.{name}"]
            process = subprocess.Popen(command, env={**os.environ, "EVERLOOP_CONFIG": str(config)})
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
        announced = [home / "run" / f"{name}.json" for name in SERVICES]
        until(lambda: all(path.exists() for path in announced), deadline=90)
        yield config, json.loads(announced[0].read_text())["url"]


def everloop(*words: str) -> str:
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.processes
@pytest.mark.models
@pytest.mark.skipif(not os.environ.get("EVERLOOP_DATA"), reason="EVERLOOP_DATA is not set: nothing was replayed")
def test_recorded_episodes_are_assembled_scored_and_queried(running: tuple[Path, str]) -> None:
    config, url = running
    made = everloop("everloop.cli.main", "keys", "--config", str(config), "create")
    key = next(word for word in made.split() if word.startswith("ek_"))
    options = ["--url", url, "--key", key, "--policy", "airline", "--config", str(config), "--tasks", "4", "--block"]
    said = everloop("examples.airline_replay.replay", *options, "2")
    assert "AUC on the outcome of 8 episodes of 2 tasks" in said
    assert "number of tool calls" in said
    query = "select count(*) as n, sum(turns) as turns, sum(outcome) as solved, bool_and(complete) as c from episodes"
    row = json.loads(everloop("everloop.cli.main", "sql", "--config", str(config), "--json", query))
    assert (row["n"], row["c"]) == (16, True)
    assert row["turns"] > 100
