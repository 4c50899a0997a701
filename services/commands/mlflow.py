"""Open MLflow on this installation's runs: parameters, curves, data lineage, adapters. On this machine alone."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from services.installation import Installation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000)


def run(options: argparse.Namespace) -> int:
    with Installation.here() as here:
        uri = here.config.under_home(here.config.mlflow.uri)
        artifacts = here.home.root / "mlartifacts"
    if uri.startswith("http"):
        print(f"MLflow is a server here: open {uri}")
        return 0
    print(f"MLflow on http://127.0.0.1:{options.port} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(options.port)]
    where = ["--backend-store-uri", uri, "--default-artifact-root", artifacts.absolute().as_uri()]
    return subprocess.call([*command, *where], env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"})
