"""What every benchmark shares: its options, the machine's description, the table, the result file.

A benchmark measures; it never fails because a time was long. An aim that is missed is printed and recorded
as missed. It fails (exits non-zero) only where what it measured was wrong, such as an acknowledged call that
is not in the store.

Example::

    options = parser("added latency of the gateway").parse_args()
    rows = [{"connections": 16, "requests/s": 2710.0, "p99 ms": 6.1}]
    aims = [aim("requests/s at 16 connections", 2500, 2710.0)]
    publish("gateway", rows, aims)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, Any]


class Aim(NamedTuple):
    """A number that was aimed at. ``aim`` and ``got`` are in the unit that ``what`` names."""

    what: str
    aim: float
    got: float
    met: bool


def aim(what: str, wanted: float, got: float, *, most: bool = False) -> Aim:
    """``got`` should be at least ``wanted``; at most where ``most``. A number that is not one never meets it."""
    return Aim(what, wanted, got, math.isfinite(got) and (got <= wanted if most else got >= wanted))


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; add its own to it."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="the shortest honest form, under 10 minutes")
    return made


def load() -> float:
    """The machine's load average over the last minute."""
    return os.getloadavg()[0]


def loads(began: float) -> str:
    """What ran meanwhile, as a note: what is measured depends on it. ``began``: ``load()`` before the benchmark."""
    return f"load average over a minute: {began:.1f} when it began, {load():.1f} when it ended, its own work included"


def machine() -> dict[str, Any]:
    """What it ran on: processor model, cores, memory, system and Python."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text; columns are the keys in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    right = [all(_is_number(row.get(column)) for row in rows) for column in columns]
    lines = ["  ".join(_aligned(c, w, r) for c, w, r in zip(line, widths, right, strict=True)) for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _aligned(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def publish(
    name: str,
    rows: Sequence[Row],
    aims: Sequence[Aim] = (),
    *,
    quick: bool = False,
    part: bool = False,
    notes: Sequence[str] = (),
    folder: Path = RESULTS,
    say: Callable[[str], None] = print,
) -> Path:
    """Print the table, the machine and the aims; write ``<folder>/<name>.json``. Returns the file's path.

    A quick form, or a part of the benchmark, goes to a file of its own beside it, which git ignores: what documents
    cite is the whole one.
    """
    about = machine()
    say(table(rows))
    said = ", ".join(f"{key}: {value}" for key, value in about.items())
    say(f"\nmachine  {said}")
    for one in aims:
        say(f"aim      {one.what}: {_cell(one.aim)}, got {_cell(one.got)}: {'met' if one.met else 'missed'}")
    for note in notes:
        say(f"note     {note}")
    result = {
        "name": name,
        "machine": about,
        "rows": [dict(row) for row in rows],
        "aims": [one._asdict() for one in aims],
        "notes": list(notes),
        "quick": quick,
        "time": round(time.time()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{'-quick' if quick else '-part' if part else ''}.json"
    path.write_text(json.dumps(_finite(result), indent=1, default=float) + "\n", encoding="utf-8")
    return path


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that could not be measured is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
