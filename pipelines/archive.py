"""Topics to Parquet: every record of the log as a row of the store.

Files lie at ``<store>/<table>/tenant=<tenant>/day=<day>/<topic>-<hash>.parquet``. A file is named after the
records in it, written under another name, flushed to disk and only then given its own: a reader sees it whole or
not at all. A batch that is handled again writes the same files; where its boundaries fell differently, rows are
there twice, and every view counts one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from everloop import wire
from everloop.errors import ContractError
from everloop.home import Home
from everloop.log.base import NewRecord, Record
from everloop.section import NAME
from everloop.stream import State

from pipelines.rows import Row
from pipelines.tables import FEEDS, NO_TENANT, Feed, day_of

COMPRESSION = "zstd"
MAX_BYTES = 64 * 2**20  # of envelopes held in memory before they are written


class Held(NamedTuple):
    """A row that waits to be written, where it goes, and what names the record that it came from."""

    feed: Feed
    folder: Path
    row: Row
    name: str


class Archive:
    """The handler "archive": every topic to the store. It keeps no state but its offsets.

    A batch is held in memory and written by ``flush``, so the store is behind the log by one batch: give the
    stream a ``linger`` of about a second.
    """

    name = "archive"
    topics: tuple[str, ...] = tuple(FEEDS)

    def __init__(self, home: Home, *, max_bytes: int = MAX_BYTES) -> None:
        self._store = home.root / "store"
        self._blobs = home.blobs
        self._max_bytes = max_bytes
        self._held: dict[object, Held] = {}
        self._bytes = 0
        pa.array([0])  # has Arrow look for pandas, once a process, now rather than within the first batch

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        if record.value is None:
            return []  # a tombstone of a compacted topic: the rows before it stay history
        feed = FEEDS[record.topic]
        contract = wire.decode(feed.topic.contract, record.value, self._blobs)
        row = feed.row(contract, record.value)
        row["log_partition"], row["log_offset"] = record.partition, record.offset
        day = day_of(row.get("started") or row.get("time") or record.time)
        folder = folder_of(self._store, feed.table.name, row["tenant"], day)
        self._held[record.position] = Held(feed, folder, row, _name(record))
        self._bytes += len(record.value)
        if self._bytes > self._max_bytes:
            self._write()  # ahead of the commit: at worst rows are there twice
        return []

    def flush(self, state: State, now: float) -> list[NewRecord]:
        self._write()
        return []

    def _write(self) -> None:
        groups: dict[Path, list[Held]] = defaultdict(list)
        for held in self._held.values():
            groups[held.folder].append(held)
        for folder, rows in groups.items():
            feed = rows[0].feed
            digest = hashlib.blake2b("\n".join(held.name for held in rows).encode(), digest_size=12).hexdigest()
            made = pa.Table.from_pylist([held.row for held in rows], schema=feed.table.schema)
            write(made, folder / f"{feed.topic.name}-{digest}.parquet", {"everloop.range": _range(rows)})
        self._held, self._bytes = {}, 0


@functools.lru_cache(maxsize=1024)
def folder_of(store: Path, table: str, tenant: str, day: str) -> Path:
    """Where the rows of a tenant and day lie. Refuses a tenant that is no name: it would become part of a path."""
    if tenant != NO_TENANT and not re.match(NAME, tenant):
        raise ContractError(f"the tenant {tenant!r} is not a name: lower-case letters, digits and '-', at most 63")
    return store / table / f"tenant={tenant}" / f"day={day}"


def _name(record: Record) -> str:
    """What tells a record from any other, also from one of a log that was deleted and begun anew."""
    content = hashlib.blake2b(record.value or b"", digest_size=8).hexdigest()
    return f"{record.topic}/{record.partition}/{record.offset}/{content}"


def _range(rows: Sequence[Held]) -> str:
    """First and last offset of each partition in a file, as JSON: for people who follow a record."""
    offsets: dict[int, list[int]] = defaultdict(list)
    for held in rows:
        offsets[held.row["log_partition"]].append(held.row["log_offset"])
    return json.dumps({partition: [min(found), max(found)] for partition, found in sorted(offsets.items())})


def write(table: pa.Table, path: Path, metadata: dict[str, str]) -> None:
    """A Parquet file under its name, durable on return. The name appears only once the file is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        pq.write_table(
            table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata}),
            partial,
            compression=COMPRESSION,
        )
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def publish(partial: Path, path: Path) -> None:
    """Give a finished file its name: flush the file, rename it, flush the folder."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
