"""A service of the platform as a process of its own, for as long as a benchmark needs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from everloop.home import Home

STARTS_WITHIN = 60.0
STOPS_WITHIN = 30.0


@contextmanager
def service(name: str, home: Home, engine: str, *, answers: str = "/readyz") -> Iterator[str]:
    """The service's URL, once ``answers`` does: ``/healthz`` where nothing stands at ``engine``.

    It runs with its defaults, whatever the environment says, on a free port. Raises SystemExit where it does not start.
    """
    process = subprocess.Popen([sys.executable, "-m", f"services.{name}"], env=_environment(home, engine))
    try:
        yield _url(process, home.root / "run" / f"{name}.json", answers)
    finally:
        process.terminate()
        process.wait(STOPS_WITHIN)


def _environment(home: Home, engine: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
    return {
        **own,
        "EVERLOOP_HOME": str(home.root),
        "EVERLOOP_GATEWAY__PORT": "0",
        "EVERLOOP_SERVICES__ASSEMBLER_PORT": "0",
        "EVERLOOP_SERVING__URL": engine,
        "EVERLOOP_LOG_LEVEL": "warning",
    }


def _url(process: subprocess.Popen[bytes], announcement: Path, answers: str) -> str:
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end and process.poll() is None:
        try:
            url = str(json.loads(announcement.read_text())["url"])
            urllib.request.urlopen(url + answers, timeout=5).close()
            return url
        except (OSError, ValueError):
            time.sleep(0.1)
    raise SystemExit(f"{announcement.stem} did not start; see what it printed above")
