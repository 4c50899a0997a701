"""Seconds by phase of ``everloop demo``: what a newcomer waits for, and whether the loop closed.

``--quick`` sends half of the messages. ``--log kafka`` closes the same loop on a real broker, which is started for it
and shares the cores. The base model with its prior is built anew unless it is in the cache; the
first row of a fresh machine therefore has a phase that the second has not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks._report import aim, loads, parser, publish
from benchmarks._report import load as load_now
from services.broker.process import Broker

MINUTES = 6


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--log", choices=("sqlite", "kafka"), default="sqlite", help="the log that the demo runs on")
    return made.parse_args()


@contextmanager
def log_of(kind: str) -> Iterator[list[str]]:
    """What to give the demo so that it runs on a log of this kind."""
    if kind == "sqlite":
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="ev-demo-") as folder:
        broker = Broker(Path(folder), tied=True)
        broker.start()
        try:
            yield ["--log", f"kafka://{broker.address}"]
        finally:
            broker.stop()


def main() -> int:
    options, began = _options(), load_now()
    command = [sys.executable, "-m", "everloop.cli.main", "demo", "--json"]
    command += ["--messages", "1500"] if options.quick else []
    with log_of(options.log) as log:
        done = subprocess.run([*command, *log], stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        said = json.loads(lines[-1])
    except (IndexError, ValueError):
        print(f"the demo ended with status {done.returncode} and no result; its last words: {lines[-3:]}")
        return 1
    if said["seconds_by_phase"] is None:
        print(f"the demo ended with status {done.returncode} and no result: {said['trouble']}")
        return 1
    rows = [{"phase": phase, "seconds": seconds} for phase, seconds in said["seconds_by_phase"].items()]
    rows.append({"phase": "in all", "seconds": said["seconds"]})
    shown = ("data", "messages", "accuracy_before", "accuracy_after", "corrected_then_right")
    told = {key: said[key] for key in (*shown, "releases_promoted", "releases_rejected")}
    notes = [", ".join(f"{key}: {value}" for key, value in told.items()), loads(began)]
    aims = [aim("minutes in all", MINUTES, said["seconds"] / 60, most=True)]
    publish("demo" if options.log == "sqlite" else "demo-kafka", rows, aims, quick=options.quick, notes=notes)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
