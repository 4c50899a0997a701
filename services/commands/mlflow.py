"""Open MLflow on this installation's runs: parameters, curves, data lineage, adapters. On this machine alone.

MLflow's server is several processes. They are a group of their own, which a Ctrl-C at the terminal does not reach:
this process does the asking, once, and nothing of the group outlives it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time

from everloop.registry import QUIET, Registry

from services.installation import Installation
from services.supervisor import Stop, die_with_parent

PATIENCE = 5.0  # seconds that the server has to end by itself
SERVER = {
    **QUIET,
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # judges and evaluations: none of ours, and six more processes
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000)


def run(options: argparse.Namespace) -> int:
    with Installation.here() as here:
        uri = here.config.under_home(here.config.mlflow.uri)
        artifacts = here.home.root / "mlartifacts"
    if uri.startswith("http"):
        print(f"MLflow is a server here: open {uri}")
        return 0
    stop = Stop()
    print(_welcome(f"http://127.0.0.1:{options.port}", Registry(uri, artifacts).experiments()), flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(options.port)]
    where = ["--backend-store-uri", uri, "--default-artifact-root", artifacts.absolute().as_uri()]
    return serve([*command, "--workers", "1", *where], stop)


def _welcome(url: str, experiments: dict[str, str]) -> str:
    """Where the runs are: MLflow's own front page is about traces and prompts, of which there are none here."""
    runs = "/runs?workflowType=machine_learning"
    lines = [f"  {name}: {url}/#/experiments/{number}{runs}" for name, number in experiments.items()]
    return "\n".join(
        [f"MLflow on {url} (Ctrl-C ends it)", *(lines or ["  no runs yet: a training run makes the first"])]
    )


def serve(command: list[str], stop: Stop) -> int:
    """Run a server until it ends or ``stop`` is asked for; its whole process group ends with it. Its exit status."""
    server = subprocess.Popen(
        command, env={**os.environ, **SERVER}, process_group=0, preexec_fn=die_with_parent, stdin=subprocess.DEVNULL
    )
    try:
        while server.poll() is None and stop.signal is None:
            time.sleep(0.1)
        if stop.signal is not None:
            _signal_group(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(PATIENCE)
    finally:
        _signal_group(server.pid, signal.SIGKILL)
        status = server.wait()
    return 0 if stop.signal is not None else status


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
