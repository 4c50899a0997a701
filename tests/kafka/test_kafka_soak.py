"""Hours in small: load goes on while a second worker joins and leaves every 20 s; memory is flat, nothing is lost.

Two minutes, or as many seconds as SOAK_SECONDS says (``make soak``: an hour).
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
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


def growth(samples: list[tuple[float, float]]) -> float:
    """By how much the line through the samples (time, value) rises from the first to the last: least squares."""
    times, values = zip(*samples, strict=True)
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    slope = sum((t - middle) * (v - mean) for t, v in samples) / sum((t - middle) ** 2 for t in times)
    return slope * (times[-1] - times[0])


def test_rebalances_without_end(broker: Broker, plant: Callable[..., Any], until: Until) -> None:
    its = plant(broker)
    until(lambda: its.stored()["turns"] > 100, deadline=60, every=0.5)
    assembler, second = its.pid, None
    began = turn = time.monotonic()
    samples: list[tuple[float, float]] = []
    left: list[int] = []
    pause = threading.Event()
    while (now := time.monotonic()) < began + SECONDS:
        if now >= turn:
            turn += EVERY
            second = _joins_or_leaves(its, second, left)
        if now > began + WARM * SECONDS:
            samples.append((now, resident(assembler)))
        pause.wait(1.0)
    if second is not None:
        _joins_or_leaves(its, second, left)
    its.check(until)
    grown = growth(samples)
    print(
        f"{SECONDS:.0f} s, {len(left)} times joined and left; the assembler's memory {samples[0][1] / 1e6:.0f} MB, at "
        f"the end {samples[-1][1] / 1e6:.0f} MB, in a straight line {grown / 1e6:+.1f} MB"
    )
    assert its.starts == 1, "it never ended"
    assert left == [0] * len(left)
    assert grown < GROWTH


def _joins_or_leaves(its: Any, second: subprocess.Popen[bytes] | None, left: list[int]) -> Any:
    if second is None:
        return its.run("everloop.cli.main", "worker", "assemble")
    second.send_signal(signal.SIGTERM)
    left.append(second.wait(30))
    return None
