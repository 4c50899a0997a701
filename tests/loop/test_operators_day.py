"""An operator's day: an adapter made elsewhere goes live and is taken back, past a kill, to an orderly end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.models, pytest.mark.mlflow]
POLICY = """
[tenants.default.policies.assistant]
base = "{base}"
max_tokens = 8
"""


def children(of: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(of)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def test_an_operator_s_day(up: Callable[[str], Any], untrained: Path, adapter: Path, until: Callable[..., Any]) -> None:
    platform = up(POLICY.format(base=untrained))
    client = platform.client()

    def version() -> str:
        """Which policy version answers a person now."""
        asked = {"model": "assistant", "messages": [{"role": "user", "content": "hello there"}]}
        return str(client.chat.completions.with_raw_response.create(**asked).headers["X-Everloop-Policy-Version"])

    assert set(platform.ready["services"]) == {"gateway", "engine", "assembler", "scorer", "learner", "releaser"}
    assert version() == "base"
    status, told = platform.tries("up")
    assert status == 2
    assert "already runs" in told

    assert adapter.name in platform.does("release", "register", str(adapter), "--reason", "made by hand")
    until(lambda: "50 are needed" in platform.does("status"), 60, every=0.5)
    assert "is live" in platform.does("release", "promote", adapter.name[:10], "--reason", "I looked at it")
    until(lambda: version() == adapter.name)

    os.kill(platform.status("releaser")["pid"], signal.SIGKILL)  # it comes back by itself, and takes the next order
    assert version() == adapter.name
    ordered = platform.orders("release", "rollback", "--timeout", "60")
    until(lambda: version() == "base", 60)
    assert ordered.wait(60) == 0
    assert "rolled_back" in platform.does("release", "list")

    services = children(platform.process.pid)
    assert len(services) == 6
    begun = time.monotonic()
    platform.process.send_signal(signal.SIGINT)
    assert platform.process.wait(timeout=15) == 0
    assert time.monotonic() - begun < 10.5
    assert not [pid for pid in services if Path(f"/proc/{pid}").exists()]
