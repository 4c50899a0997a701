"""Processor time of processes, as the kernel counts it: user and system, of the process and of its ended children."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

TICK = 1.0 / os.sysconf("SC_CLK_TCK")


def seconds(pids: Iterable[int]) -> float:
    """Seconds of all of them since their start. Raises FileNotFoundError where one has ended."""
    return sum(_of(pid) for pid in pids)


def _of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) * TICK  # utime, stime, and those of children that were waited for


def family(pid: int) -> list[int]:
    """The process and every process below it that runs now."""
    found = [pid]
    for one in found:
        for thread in Path(f"/proc/{one}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found
