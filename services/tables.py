"""Rows as a table for a terminal (columns as wide as they need, numbers to the right), and times for people."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, width: int | None = None) -> str:
    """The last column is cut where the line would be longer than the terminal (None: as wide as that is)."""
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(head), *texts]) for i in range(len(head))]
    numbers = [all(isinstance(row[i], int | float) or row[i] is None for row in rows) for i in range(len(head))]
    room = width or shutil.get_terminal_size((160, 24)).columns
    lines = [_line(head, widths, numbers), "  ".join("─" * w for w in widths)]
    lines += [_line(row, widths, numbers) for row in texts]
    return "\n".join(line[: max(room, 40)].rstrip() for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int], numbers: Sequence[bool]) -> str:
    pairs = zip(cells, widths, numbers, strict=True)
    return "  ".join(cell.rjust(width) if number else cell.ljust(width) for cell, width, number in pairs)


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.3f}".rstrip("0").rstrip(".") if 1e4 <= abs(cell) < 1e15 else f"{cell:.4g}"
    return str(cell).replace("\n", " ")


def clock(at: float) -> str:
    """When it was, with the day where that is not clear."""
    form = "%H:%M:%S" if time.time() - at < 86_400 else "%F %H:%M"
    return time.strftime(form, time.localtime(at))


def span(seconds: float) -> str:
    whole = int(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h"
