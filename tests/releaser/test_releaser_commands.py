"""What an operator has in hand while a canary runs: watch, freeze, status and the pages, on a real process."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from everloop.release import Release, ReleaseState
from everloop.topics import RELEASES

pytestmark = pytest.mark.processes
CANARY = {"stages": [0.25, 0.5], "stage_units": 1000, "margin": 0.15, "alpha": 0.1, "min_units": 20}
READY = 60.0


def everloop(process: Any, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "everloop.cli.main", *words, "--config", str(process.config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_an_operator_watches_freezes_and_rolls_back(
    world: Callable[..., Any], process_of: Callable[..., Any], until: Callable[..., Any]
) -> None:
    w = world(canary=CANARY)
    process = process_of(w, "tiny-k2", CANARY)
    w.home.folder("adapters", "a")
    passed = Release(id="rel_a", tenant="default", policy="assistant", adapter="a", uri="u", time=1.0)
    w.append(RELEASES, passed, passed.to(ReleaseState.GATED, "Passed.", 2.0))
    process.start()
    until(lambda: w.state("a") == "canary", READY)
    w.traffic(200, {"canary": 0.7, "control": 0.6})

    def seen() -> dict[str, Any]:
        done = everloop(process, "release", "watch", "rel_a", "--once", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    until(lambda: ((seen()["progress"] or {}).get("arms") or {}).get("control", {}).get("units", 0) > 20, READY)
    words = everloop(process, "release", "watch", "--once").stdout
    for said in ("1 now", "25%", "canary came", "interval   ", "decides    ", "stops      ", "of 1000 people"):
        assert said in words
    listed = everloop(process, "release", "list").stdout
    assert "takes about" in listed
    frozen = everloop(process, "release", "freeze", "--reason", "holidays")
    assert (frozen.returncode, "rollbacks go on" in frozen.stdout) == (0, True)
    assert everloop(process, "release", "freeze").returncode == 2  # a reason is needed
    status = everloop(process, "status").stdout
    assert "frozen        Frozen by" in status
    assert "stage 1 of 2: 25% of traffic" in status
    url = next(line for line in status.splitlines() if line.startswith("Evidence of every release")).split()[-1]
    for page in (url, f"{url}/rel_a"):
        with urllib.request.urlopen(page, timeout=10) as answer:
            assert "rel_a" in answer.read().decode()
    refused = everloop(process, "release", "promote", "--without-evidence", "--reason", "now")
    assert (refused.returncode, "nothing is promoted: Frozen by" in refused.stdout) == (1, True)
    assert everloop(process, "release", "rollback", "--reason", "seen enough").returncode == 0
    ended = everloop(process, "release", "watch", "rel_a")
    assert (ended.returncode, "seen enough" in ended.stdout) == (1, True)
