"""Compaction: many small Parquet files and old versions folded into one file a day, without hiding a row.

The steps, in this order:

1. write the rows that still count of a day's small files to one new file, which names its sources
2. give it its name: from here on readers may see rows twice, which every view counts once
3. after a grace, for readers who had listed the sources before: delete them

Killed between two steps, nothing is lost; the next compaction goes on from the names in the new file. One
compaction at a time holds the lock; the archive needs none, as it only adds files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from pipelines.archive import COMPRESSION, publish
from pipelines.tables import TABLES, Table
from pipelines.views import FILES, distinct

GRACE = 60.0
"""Seconds that folded files stay, for queries that have listed them and not opened them yet."""
MIN_FILES = 8
LARGE = 128 * 2**20  # bytes; a file of that size is left as it is
SMALL = 2**20  # bytes; files below it are always folded together
GROWTH = 4
"""A file joins a fold when it is at most so many times as large as all smaller ones together: so each row is
rewritten a few times in its life, not with every fold."""
STALE_PARTIAL = 3600.0
SOURCES = b"everloop.sources"
FOLDED = "folded-"


def compact(folder: Path, *, grace: float = GRACE, min_files: int = MIN_FILES) -> int:
    """Fold every day of every table that has at least ``min_files`` small files. Returns how many were folded.

    A second call at the same time returns 0 at once.
    """
    if not folder.exists():
        return 0
    with _alone(folder) as mine:
        if not mine:
            return 0
        folded = 0
        for name, table in TABLES.items():
            for day in sorted((folder / name).glob("tenant=*/day=*")):
                _sweep(day, grace)
                folded += _fold(table, day, min_files)
                if grace <= 0:
                    _sweep(day, grace)
        return folded


def _sweep(day: Path, grace: float) -> None:
    """Delete the sources of folds that are older than the grace, and what a killed writer left half-written."""
    now = time.time()
    for path in day.glob(".*.partial"):
        if _age(path, now) > STALE_PARTIAL:
            path.unlink(missing_ok=True)
    for path in sorted(day.glob(f"{FOLDED}*.parquet"), key=lambda path: -_age(path, now)):  # a fold may be folded again
        if _age(path, now) >= grace:
            for source in _sources(path):
                (day / source).unlink(missing_ok=True)


def _fold(table: Table, day: Path, min_files: int) -> int:
    folds = list(day.glob(f"{FOLDED}*.parquet"))
    waiting = {source for path in folds for source in _sources(path)}
    small = _tier([path for path in day.glob("*.parquet") if path.name not in waiting])
    if len(small) < max(2, min_files):
        return 0
    names = [path.name for path in small]
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=12).hexdigest()
    target = day / f"{FOLDED}{digest}.parquet"
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        _write(table, small, names, partial)
        publish(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return len(small)


def _tier(paths: list[Path]) -> list[Path]:
    """The files that are worth folding together, by name."""
    taken: list[Path] = []
    total = 0
    for size, path in sorted((path.stat().st_size, path) for path in paths):
        if size >= LARGE or size > GROWTH * max(total, SMALL):
            break
        taken.append(path)
        total += size
    return sorted(taken)


def _write(table: Table, paths: list[Path], names: list[str], partial: Path) -> None:
    files = ", ".join(_quoted(str(path)) for path in paths)
    kept = distinct(table, f"read_parquet([{files}], {FILES})", kept=True)
    sources = _quoted(json.dumps(names))
    with duckdb.connect(config={"threads": 1, "memory_limit": "2GB"}) as connection:
        connection.execute(
            f"COPY ({kept}) TO {_quoted(str(partial))} (FORMAT parquet, COMPRESSION {COMPRESSION}, "
            f"KV_METADATA {{{_quoted(SOURCES.decode())}: {sources}}})"
        )


def _sources(path: Path) -> list[str]:
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except FileNotFoundError:
        return []
    return [str(name) for name in json.loads(metadata.get(SOURCES, b"[]"))]


def _age(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    with (folder / ".compaction.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
