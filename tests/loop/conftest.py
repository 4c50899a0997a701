"""The whole platform, as ``everloop up`` starts it, for tests that need every process of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

EVERLOOP = (sys.executable, "-m", "everloop.cli.main")
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


class Up:
    """``everloop up`` in a process of its own, its customers, and the commands that an operator gives beside it."""

    def __init__(self, root: Path, policies: str) -> None:
        config = root / "everloop.toml"
        config.write_text(HEAD.format(root=root) + policies)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
        self.home = root / "home"
        self.environment = {**clean, "EVERLOOP_CONFIG": str(config), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*EVERLOOP, "up", "--json"], env=self.environment, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.ready: dict[str, Any] = json.loads(self.process.stdout.readline())

    def client(self, tenant: str = "default") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.ready["url"], api_key=self.ready["keys"][tenant], max_retries=0)

    def orders(self, *words: str) -> subprocess.Popen[str]:
        """Begin an ``everloop`` command."""
        return subprocess.Popen(
            [*EVERLOOP, *words], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def tries(self, *words: str) -> tuple[int, str]:
        """The status of an ``everloop`` command, and what it said."""
        command = self.orders(*words)
        told, _ = command.communicate(timeout=240)
        return command.returncode, told

    def does(self, *words: str) -> str:
        """What an ``everloop`` command said that must succeed."""
        status, told = self.tries(*words)
        assert status == 0, told
        return told

    def rows(self, query: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.does("sql", "--json", query).splitlines()]

    def status(self, service: str) -> dict[str, Any]:
        """What a service says of itself; empty while it is on its way up again."""
        try:
            with urllib.request.urlopen(f"{self.ready['services'][service]}/status", timeout=30) as answer:
                return dict(json.load(answer))
        except OSError:
            return {}

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[[str], Up]]:
    """Start the platform with these policies (TOML, below the tests' own ports and folders)."""
    made: list[Up] = []

    def start(policies: str) -> Up:
        made.append(Up(tmp_path, policies))
        return made[-1]

    yield start
    for one in made:
        one.end()
