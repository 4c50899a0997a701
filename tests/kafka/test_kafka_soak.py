"""Hours in small: load goes on while a second worker joins and leaves every 20 s; memory is flat, nothing is lost.

Memory is that of the assembler and of each process beside it; each joining and each leaving shares partitions out anew.

Two minutes, or as many seconds as SOAK_SECONDS says (``make soak``: an hour).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.broker.process import Broker

pytestmark = [pytest.mark.kafka, pytest.mark.processes]
Until = Callable[..., Any]
SECONDS = float(os.environ.get("SOAK_SECONDS", "120"))
EVERY = 20.0
PAGE = os.sysconf("SC_PAGE_SIZE")
WARM = 1 / 3  # of the time, in which memory may still grow
GROWTH = 25e6  # bytes, over the rest of the time, however long that is


def resident(pid: int) -> int:
    """Bytes of a process's memory that lie in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def family(pid: int) -> list[int]:
    """A process and all below it."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    below = [int(child) for children in tasks for child in children.read_text().split()]
    return [pid, *(one for child in below for one in family(child))]


def rebalances(home: Path) -> int:
    """As the assembler counts them."""
    url = json.loads((home / "run" / "assembler.json").read_text())["url"]
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        shown = answer.read().decode()
    return int(float(re.findall(r'^everloop_handler_rebalances_total{handler="assemble"} (\S+)', shown, re.M)[0]))


def growth(samples: list[tuple[float, float]]) -> float:
    """By how much the line through the samples (time, value) rises from the first to the last: least squares."""
    times, values = zip(*samples, strict=True)
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    slope = sum((t - middle) * (v - mean) for t, v in samples) / sum((t - middle) ** 2 for t in times)
    return slope * (times[-1] - times[0])


def test_rebalances_without_end(broker: Broker, plant: Callable[..., Any], until: Until) -> None:
    its = plant(broker)
    until(lambda: its.stored()["turns"] > 100, deadline=60, every=0.5)
    assembler, second = family(its.pid), None
    assert len(assembler) > 1, "one beside it archives"
    shared_out = rebalances(its.home)
    began = turn = time.monotonic()
    samples: dict[int, list[tuple[float, float]]] = {pid: [] for pid in assembler}
    left: list[int] = []
    pause = threading.Event()
    while (now := time.monotonic()) < began + SECONDS:
        if now >= turn:
            turn += EVERY
            second = _joins_or_leaves(its, second, left)
        if now > began + WARM * SECONDS:
            for pid in assembler:
                samples[pid].append((now, resident(pid)))
        pause.wait(1.0)
    if second is not None:
        _joins_or_leaves(its, second, left)
    its.check(until)
    shared_out = rebalances(its.home) - shared_out
    print(f"{SECONDS:.0f} s, {len(left)} times joined and left, {shared_out} times shared out anew")
    for pid, its_samples in samples.items():
        first, last = its_samples[0][1], its_samples[-1][1]
        in_a_line = growth(its_samples)
        print(
            f"process {pid}: {first / 1e6:.0f} MB, at the end {last / 1e6:.0f} MB, in a line {in_a_line / 1e6:+.1f} MB"
        )
    assert its.starts == 1, "it never ended"
    assert family(its.pid) == assembler, "nor did one beside it"
    assert left == [0] * len(left)
    assert shared_out >= 2 * len(left) > 0
    assert max(growth(of_one) for of_one in samples.values()) < GROWTH


def _joins_or_leaves(its: Any, second: subprocess.Popen[bytes] | None, left: list[int]) -> Any:
    if second is None:
        return its.run("everloop.cli.main", "worker", "assemble")
    second.send_signal(signal.SIGTERM)
    left.append(second.wait(30))
    return None
