"""'everloop mlflow': where it says the runs are, and that nothing of its server outlives it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from everloop.registry import Registry

SERVING = """
import sys
from services.commands.mlflow import serve
from services.supervisor import Stop
sys.exit(serve([sys.executable, "-c", sys.argv[1], sys.argv[2]], Stop()))
"""
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"])
open(sys.argv[1] + ".partial", "w").write(f"{os.getpid()} {worker.pid}")
os.rename(sys.argv[1] + ".partial", sys.argv[1])
time.sleep(600)
"""
Until = Callable[..., Any]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_will_not_end_ends_with_its_workers(asked: signal.Signals, tmp_path: Path, until: Until) -> None:
    pids = tmp_path / "pids"
    process = subprocess.Popen([sys.executable, "-c", SERVING, STUBBORN, str(pids)])
    try:
        until(pids.exists, 30)
        server, worker = map(int, pids.read_text().split())
        assert alive(server)
        assert alive(worker)
        process.send_signal(asked)
        assert process.wait(30) == 0
        until(lambda: not alive(server) and not alive(worker), 30)
    finally:
        process.kill()


def test_a_server_that_ends_by_itself_tells_its_status() -> None:
    done = subprocess.run([sys.executable, "-c", SERVING, "raise SystemExit(3)", ""], check=False, timeout=60)
    assert done.returncode == 3


@pytest.mark.processes
@pytest.mark.mlflow
def test_mlflow_shows_the_runs_and_leaves_no_process(tmp_path: Path, until: Until) -> None:
    home = tmp_path / "home"
    home.mkdir()
    registry = Registry(f"sqlite:///{home / 'mlflow.db'}", home / "mlartifacts")
    registry.log_run(
        "bank", "desk", "run_1", title="a seed 0", took=(1.0, 2.0), batch="", params={}, curves=[], results={}, tags={},
        files={},
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "everloop.cli.main", "mlflow", "--home", str(home), "--port", str(port)]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "EVERLOOP_HOME": str(home)})
    try:
        until(lambda: _answers(f"http://127.0.0.1:{port}/"), 120, every=0.5)
        group = _descendants(process.pid)
        assert len(group) >= 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        until(lambda: not any(map(alive, group)), 30)
    finally:
        process.kill()
    url = f"http://127.0.0.1:{port}/#/experiments/1/runs?workflowType=machine_learning"
    assert f"bank/desk: {url}" in (tmp_path / "said").read_text()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _descendants(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    children = [int(word) for word in found.stdout.split()]
    return [one for child in children for one in (child, *_descendants(child))]
