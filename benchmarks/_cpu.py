"""What processes take, as the kernel counts it: processor time (also of their ended children), and memory."""

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


def resident(pids: Iterable[int]) -> float:
    """MB of memory of all of them, what they share counted in each. Raises FileNotFoundError where one has ended."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def family(pid: int) -> list[int]:
    """The process and every process below it that runs now."""
    found = [pid]
    for one in found:
        for thread in Path(f"/proc/{one}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found
