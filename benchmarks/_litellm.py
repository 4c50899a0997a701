"""LiteLLM's proxy, to be measured beside the gateway: in an environment of its own, from a lock with hashes.

Nothing of the project depends on it. It is installed when a benchmark first asks for it, below ``.everloop/cache``:
releases 1.82.7 and 1.82.8 on the public registry were malicious, so only what ``litellm.lock`` has the hashes of is
taken. The lock is made anew by::

    echo 'litellm[proxy]==1.106.2' | .venv/uv/bin/uv pip compile --universal --python-version 3.11 \\
      --generate-hashes --no-annotate --no-header - -o benchmarks/litellm.lock

It runs as its documentation has it for production, with nothing that it could do without: no database, no cache, no
callbacks, no admin pages, only errors logged, prices from its own file; one key, one model.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

LOCK = Path(__file__).with_name("litellm.lock")
FOLDER = Path(".everloop/cache/litellm")
STARTS_WITHIN = 120.0
STOPS_WITHIN = 20.0
QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
    "DISABLE_ADMIN_UI": "True",
    "NO_DOCS": "True",
    "NO_REDOC": "True",
}


class Proxy(NamedTuple):
    """A proxy that answers at ``url`` to ``key``. ``pid``: of its first process, the parent of all others."""

    url: str
    key: str
    pid: int


def version() -> str:
    """What the lock says."""
    return next(
        line.split()[0].partition("==")[2] for line in LOCK.read_text().splitlines() if line.startswith("litellm==")
    )


def installed(folder: Path = FOLDER) -> Path:
    """The program, installed first where it is not, or not by this lock. Raises SystemExit where it cannot be."""
    stamp, wanted = folder / "installed", hashlib.sha256(LOCK.read_bytes()).hexdigest()
    program = folder.absolute() / "bin" / "litellm"
    if stamp.exists() and stamp.read_text() == wanted:
        return program
    print(f"installing LiteLLM {version()} into {folder}, hashes checked (a minute or more) …", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([*pip, "--require-hashes", "--no-deps", "-r", str(LOCK)], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"LiteLLM could not be installed ({error}); leave it out with --beside nothing") from None
    stamp.write_text(wanted)
    return program


@contextmanager
def litellm(upstream: str, folder: Path, workers: int) -> Iterator[Proxy]:
    """A proxy before ``upstream`` of so many workers. Raises SystemExit where it does not start."""
    program = installed()
    key, port = "sk-" + secrets.token_hex(16), _free_port()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(_config(upstream, key)))  # JSON is YAML
    command = [str(program), "--host", "127.0.0.1", "--port", str(port), "--config", "config.yaml"]
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"} | QUIET
    with (folder / "log").open("wb") as log:
        started = subprocess.Popen(
            [*command, "--num_workers", str(workers)],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield Proxy(_ready(f"http://127.0.0.1:{port}", started, folder / "log"), key, started.pid)
        finally:
            started.terminate()
            try:
                started.wait(STOPS_WITHIN)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()


def _config(upstream: str, key: str) -> dict[str, object]:
    engine = {"model": "openai/stub", "api_base": f"{upstream}/v1", "api_key": "none"}
    return {
        "model_list": [{"model_name": "assistant", "litellm_params": engine}],
        "litellm_settings": {"set_verbose": False, "request_timeout": 600},
        "general_settings": {"master_key": key, "disable_spend_logs": True, "disable_error_logs": True},
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _ready(url: str, started: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end and started.poll() is None:
        try:
            urllib.request.urlopen(url + "/health/readiness", timeout=5).close()
            return url
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"LiteLLM did not start; it said:\n{log.read_text(errors='replace')[-2000:]}")
