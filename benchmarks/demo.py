"""Seconds by phase of ``everloop demo``: what a newcomer waits for, and whether the loop closed.

``--quick`` sends half of the messages. The base model with its prior is built anew unless it is in the cache; the
first row of a fresh machine therefore has a phase that the second has not.
"""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks._report import aim, parser, publish

MINUTES = 6


def main() -> int:
    options = parser(__doc__ or "").parse_args()
    command = [sys.executable, "-m", "everloop.cli.main", "demo", "--json"]
    command += ["--messages", "1500"] if options.quick else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
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
    told = {key: said[key] for key in ("data", "messages", "accuracy_before", "accuracy_after", "releases_promoted")}
    notes = [", ".join(f"{key}: {value}" for key, value in told.items())]
    aims = [aim("minutes in all", MINUTES, said["seconds"] / 60, most=True)]
    publish("demo", rows, aims, quick=options.quick, notes=notes)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
