"""A process of the platform for as long as a benchmark needs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from everloop.home import Home

STARTS_WITHIN = 60.0
STOPS_WITHIN = 30.0


class Running(NamedTuple):
    """A process that serves ``/healthz``, ``/metrics`` and the like at ``url``."""

    url: str
    pid: int


@contextmanager
def service(name: str, home: Home, engine: str, *, answers: str = "/readyz", log: str = "") -> Iterator[str]:
    """The service's URL, once ``answers`` does: ``/healthz`` where nothing stands at ``engine``.

    It runs with its defaults, whatever the environment says, on a free port, and on the log at the URL ``log`` where
    one is given. Raises SystemExit where it does not start.
    """
    command = (sys.executable, "-m", f"services.{name}")
    with process(name, command, environment(home, engine, log), home, answers=answers) as running:
        yield running.url


@contextmanager
def process(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    home: Home,
    *,
    answers: str = "/readyz",
    within: float = STARTS_WITHIN,
) -> Iterator[Running]:
    """A process that announces itself in ``home`` under ``name``. Raises SystemExit where it does not start."""
    started = subprocess.Popen(command, env=dict(environment))
    try:
        yield Running(_url(started, home.root / "run" / f"{name}.json", answers, within), started.pid)
    finally:
        started.terminate()
        started.wait(STOPS_WITHIN)


def environment(home: Home, engine: str, log: str = "") -> dict[str, str]:
    """Settings of a benchmark's processes: defaults, free ports, and none of the environment's own settings."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
    return {
        **own,
        "EVERLOOP_HOME": str(home.root),
        "EVERLOOP_GATEWAY__PORT": "0",
        "EVERLOOP_SERVICES__ASSEMBLER_PORT": "0",
        "EVERLOOP_SERVICES__REWARD_PORT": "0",
        "EVERLOOP_SERVING__URL": engine,
        "EVERLOOP_LOG_LEVEL": "warning",
    } | ({"EVERLOOP_LOG__URL": log} if log else {})


def _url(started: subprocess.Popen[bytes], announcement: Path, answers: str, within: float) -> str:
    end = time.monotonic() + within
    while time.monotonic() < end and started.poll() is None:
        try:
            url = str(json.loads(announcement.read_text())["url"])
            urllib.request.urlopen(url + answers, timeout=5).close()
            return url
        except (OSError, ValueError):
            time.sleep(0.1)
    raise SystemExit(f"{announcement.stem} did not start; see what it printed above")
