"""``everloop demo`` on a team's own file, its reward service and its trainer killed in the middle: it still closes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples.bank_desk import builtin_desk

ROOT = Path(__file__).parents[2]
LIMIT = 420.0
LEARNED = 50


class Running:
    """A demo under way, and the services below it."""

    def __init__(self, home: Path, data: Path, output: Path) -> None:
        self.home = home
        words = ["demo", "--home", str(home), "--data", str(data), "--messages", "2000", "--keep", "--json"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
        self._output = output
        with output.open("wb") as file:  # in the repository's root: the base model is kept in its cache
            self.process = subprocess.Popen(
                [sys.executable, "-m", "everloop.cli.main", *words],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        return self._output.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        end = time.monotonic() + LIMIT
        while self.process.poll() is None and time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.1)
        pytest.fail(f"it did not come so far; the demo said:\n{self.said}")

    def announced(self, service: str) -> dict[str, Any]:
        try:
            return dict(json.loads((self.home / "run" / f"{service}.json").read_text()))
        except (OSError, ValueError):
            return {}

    def says(self, service: str, part: str) -> dict[str, Any]:
        """A part of what a service says of the desk; empty while it says nothing."""
        try:
            with urllib.request.urlopen(f"{self.announced(service)['url']}/status", timeout=5) as answer:
                return dict(json.load(answer)[part]["bank/desk"])
        except (OSError, ValueError, KeyError):
            return {}

    def kill(self, service: str) -> None:
        os.kill(self.announced(service)["pid"], signal.SIGKILL)


@pytest.mark.processes
@pytest.mark.models
@pytest.mark.ray
@pytest.mark.mlflow
def test_it_closes_although_reward_service_and_trainer_are_killed(tmp_path: Path) -> None:
    data = tmp_path / "messages.csv"
    train, test = builtin_desk.messages(seed=0)
    with data.open("w", newline="", encoding="utf-8") as file:
        rows = [(*pair, "train") for pair in train] + [(*pair, "test") for pair in test]
        csv.writer(file).writerows([("text", "category", "split"), *rows])
    demo = Running(tmp_path / "home", data, tmp_path / "said.txt")
    try:
        demo.wait_for(lambda: demo.says("scorer", "rewards").get("updates", 0) > LEARNED)
        scorer = demo.announced("scorer")["pid"]
        demo.kill("scorer")
        demo.wait_for(lambda: list(demo.home.glob("runs/*/checkpoints/[0-9]*")))
        learner = demo.announced("learner")["pid"]
        demo.kill("learner")
        demo.wait_for(lambda: demo.announced("learner").get("pid", learner) != learner)
        demo.wait_for(lambda: (demo.says("learner", "policies").get("running") or {}).get("resumed"))
        assert demo.announced("scorer")["pid"] != scorer
        assert demo.process.wait(LIMIT) == 0, demo.said
    finally:
        demo.process.terminate()
        demo.process.wait(30)
    found = json.loads(demo.said.splitlines()[-1])
    assert (found["data"], found["closed"]) == ("messages.csv", True)
    assert found["releases_promoted"] >= 1
    assert found["gain_low"] > 0
    assert (tmp_path / "demo.png").stat().st_size > 10_000
