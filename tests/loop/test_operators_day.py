"""An operator's day: an adapter made elsewhere goes live and is taken back under traffic, to an orderly end."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.models, pytest.mark.mlflow]
POLICY = """
[tenants.default.policies.assistant]
base = "{base}"
max_tokens = 8
"""


class Answer(NamedTuple):
    sent: float
    came: float
    version: str


def ask(client: Any) -> Answer:
    sent = time.monotonic()
    asked = {"model": "assistant", "messages": [{"role": "user", "content": "hello there"}]}
    raw = client.chat.completions.with_raw_response.create(**asked)
    return Answer(sent, time.monotonic(), str(raw.headers["X-Everloop-Policy-Version"]))


@contextmanager
def traffic(client: Any) -> Iterator[list[Answer]]:
    """Two clients that ask without pause meanwhile; what was answered so far."""
    answers: list[Answer] = []
    stop = threading.Event()

    def on() -> None:
        while not stop.is_set():
            answers.append(ask(client))

    threads = [threading.Thread(target=on) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def children(of: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(of)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def test_an_operator_s_day(up: Callable[[str], Any], untrained: Path, adapter: Path, until: Callable[..., Any]) -> None:
    platform = up(POLICY.format(base=untrained))
    client = platform.client()
    assert set(platform.ready["services"]) == {"gateway", "engine", "assembler", "scorer", "learner", "releaser"}
    assert ask(client).version == "base"
    status, told = platform.tries("up")
    assert status == 2
    assert "already runs" in told

    assert adapter.name in platform.does("release", "register", str(adapter), "--reason", "made by hand")
    until(lambda: "50 are needed" in platform.does("status"), 60, every=0.5)
    status, told = platform.tries("release", "promote", adapter.name[:10])
    assert status == 1
    assert "no gate verdict and no canary" in told
    word = ("--without-evidence", "--reason", "I looked at it")
    assert "is live" in platform.does("release", "promote", adapter.name[:10], *word)
    until(lambda: "on a person's word" in platform.does("status"), 60, every=0.5)
    assert "gate none, canary none" in platform.does("release", "list")
    until(lambda: ask(client).version == adapter.name)

    os.kill(platform.status("releaser")["pid"], signal.SIGKILL)  # it comes back by itself, and takes the next order
    assert ask(client).version == adapter.name
    with traffic(client) as answers:
        until(lambda: len(answers) > 5)
        ordered = platform.orders("release", "rollback", "--timeout", "60")
        until(lambda: sum(answer.version == "base" for answer in answers) > 30, 60)
        assert ordered.wait(60) == 0
    back = min(answer.came for answer in answers if answer.version == "base")
    assert {answer.version for answer in answers if answer.sent > back} == {"base"}
    assert "rolled_back" in platform.does("release", "list")

    services = children(platform.process.pid)
    assert len(services) == 6
    platform.process.send_signal(signal.SIGINT)
    assert platform.process.wait(timeout=30) == 0
    assert not [pid for pid in services if Path(f"/proc/{pid}").exists()]
