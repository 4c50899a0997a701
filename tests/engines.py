"""A process of ``services.engine`` for tests: the embedded engine, or a real vLLM."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from everloop.serving.base import Serving

from services.gateway.upstream import HttpServing
from tests.conftest import until


class EngineProcess:
    """Serves the base in a folder, under the folder's path as its name: 8 answers at once, 8 may wait."""

    def __init__(self, home: Path, base: Path, serving: str = "embedded") -> None:
        self.home, self.base = home, base
        self.port = free_port()
        settings = {"URL": serving, "PORT": str(self.port), "THREADS": "1", "MAX_BATCH": "8", "QUEUE": "8"}
        config = home / "everloop.toml"
        config.write_text(f'cache = "{home}/cache"\n[tenants.default.policies.assistant]\nbase = "{base}"\n')
        self._environment = {
            **os.environ,
            **{f"EVERLOOP_SERVING__{name}": value for name, value in settings.items()},
            "EVERLOOP_SERVICES__ENGINE_PORT": "0",
            "EVERLOOP_HOME": str(home),
            "EVERLOOP_CONFIG": str(config),
            "OMP_NUM_THREADS": "1",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, deadline: float = 120) -> None:
        """Returns once it is ready."""
        with (self.home / "engine.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.engine"],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        until(self._ready, deadline=deadline, every=0.1)

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.home / "engine.log").read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{self.service}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, ValueError):
            return False

    @property
    def service(self) -> str:
        """Where the engine's service says how it is."""
        announced = self.home / "run" / "engine.json"
        return str(json.loads(announced.read_text())["url"]) if announced.exists() else ""

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.service}/status", timeout=5) as answer:
            return dict(json.load(answer)["engine"])

    async def opened(self) -> Serving:
        return HttpServing(f"http://127.0.0.1:{self.port}")

    def stop(self) -> int:
        """Ask it to stop; returns its exit status. Nothing of it is left."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(90)
        finally:
            self.kill()

    def kill(self) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(engine: EngineProcess, deadline: float = 120) -> Iterator[EngineProcess]:
    engine.start(deadline)
    try:
        yield engine
        assert engine.stop() == 0
    finally:
        engine.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
