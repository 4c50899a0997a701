"""``everloop up`` with every real service: an adapter made elsewhere goes live and is taken back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.models, pytest.mark.mlflow]
EVERLOOP = [sys.executable, "-m", "everloop.cli.main"]
CONFIG = """
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
[tenants.default.policies.assistant]
base = "{base}"
max_tokens = 8
"""


class Up:
    """The command in a process of its own, with the commands that an operator gives beside it."""

    def __init__(self, root: Path, base: Path) -> None:
        self.config = root / "everloop.toml"
        self.config.write_text(CONFIG.format(root=root, base=base))
        clean = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
        self.environment = {**clean, "EVERLOOP_CONFIG": str(self.config), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*EVERLOOP, "up", "--json"], env=self.environment, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.ready: dict[str, Any] = json.loads(self.process.stdout.readline())

    def does(self, *words: str) -> tuple[int, str]:
        done = subprocess.run([*EVERLOOP, *words], env=self.environment, capture_output=True, text=True, timeout=200)
        return done.returncode, done.stdout + done.stderr

    def version(self) -> str:
        """Which policy version answers a person now."""
        body = json.dumps({"model": "assistant", "messages": [{"role": "user", "content": "hello there"}]}).encode()
        headers = {"Authorization": f"Bearer {self.ready['key']}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.ready['url']}/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return str(answer.headers["X-Everloop-Policy-Version"])

    def descendants(self) -> list[int]:
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in found.stdout.split()]


@pytest.fixture
def up(tmp_path: Path, tiny_base: Path) -> Iterator[Up]:
    made = Up(tmp_path, tiny_base)
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def test_an_operator_s_day(
    up: Up, tmp_path: Path, adapters: Callable[..., list[str]], until: Callable[..., Any]
) -> None:
    assert set(up.ready["services"]) == {"gateway", "engine", "assembler", "scorer", "learner", "releaser"}
    assert up.version() == "base"
    status, told = up.does("up")
    assert status == 2
    assert "already runs" in told

    (name,) = adapters(tmp_path / "mine", 1)
    status, told = up.does("release", "register", str(tmp_path / "mine" / name), "--reason", "made by hand")
    assert (status, name in told) == (0, True), told
    until(lambda: "50 are needed" in up.does("status")[1], 60, every=0.5)
    status, told = up.does("release", "promote", name[:10], "--reason", "I looked at it")
    assert (status, "is live" in told) == (0, True), told
    until(lambda: up.version() == name)

    releaser = json.loads(up.does("status", "--json")[1])["running"]["releaser"]["pid"]
    os.kill(releaser, signal.SIGKILL)  # it comes back by itself, and takes the next order
    assert up.version() == name

    ordered = subprocess.Popen([*EVERLOOP, "release", "rollback", "--timeout", "60"], env=up.environment)
    until(lambda: up.version() == "base", 60)
    assert ordered.wait(60) == 0
    assert "rolled_back" in up.does("release", "list")[1]

    services = up.descendants()
    assert len(services) == 6
    begun = time.monotonic()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=15) == 0
    assert time.monotonic() - begun < 10.5
    assert not [pid for pid in services if Path(f"/proc/{pid}").exists()]
