"""The file of the embedded log: its tables, how it is opened, and what SQLite's errors mean to callers.

A record's row number is ``partition id << 40 | offset``, so that one B-tree holds every partition in order and no
second index is written. ``blocks`` keeps the largest event and append time of each 256 offsets: enough to find an
offset by time, and what has outlived the retention, without an index over time.

Every writer, in every process, holds the lock file beside the database while it writes or checkpoints. SQLite's
own lock would keep writers apart, but waits by sleeping up to 100 ms; and the releases before 3.51.3 can lose a
transaction where one connection checkpoints while another resets the write-ahead log (sqlite.org/wal.html, "the
WAL-reset bug"). Under one lock the two never meet.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from everloop.errors import LogError, LogFull

VERSION = 1
PAGE_BYTES = 8192  # 1 KB records share a page; measured twice as fast as 4096 here
CHECKPOINT_PAGES = 4000  # 32 MB: rarer stalls of the writers, at the cost of a longer write-ahead log
OFFSET_BITS = 40
BLOCK_BITS = 8
NEARLY_FULL = 1_048_576  # bytes free below which an I/O error is read as "no room"

SCHEMA = """
CREATE TABLE topics (name TEXT PRIMARY KEY, partitions INTEGER NOT NULL, compacted INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE partitions (
    id INTEGER PRIMARY KEY, topic TEXT NOT NULL, number INTEGER NOT NULL,
    first INTEGER NOT NULL DEFAULT 0, next INTEGER NOT NULL DEFAULT 0, UNIQUE (topic, number));
CREATE TABLE records (id INTEGER PRIMARY KEY, key TEXT NOT NULL, time REAL NOT NULL, headers TEXT, value BLOB);
CREATE TABLE blocks (id INTEGER PRIMARY KEY, newest REAL NOT NULL, appended REAL NOT NULL);
CREATE TABLE groups (name TEXT PRIMARY KEY, epoch INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE members (
    id TEXT PRIMARY KEY, grp TEXT NOT NULL, name TEXT NOT NULL, topics TEXT NOT NULL, beat REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE assignments (
    grp TEXT NOT NULL, partition INTEGER NOT NULL, member TEXT NOT NULL, epoch INTEGER NOT NULL,
    PRIMARY KEY (grp, partition)) WITHOUT ROWID;
CREATE TABLE offsets (
    grp TEXT NOT NULL, partition INTEGER NOT NULL, next INTEGER NOT NULL, PRIMARY KEY (grp, partition)) WITHOUT ROWID;
"""


def row_id(partition: int, offset: int) -> int:
    """The row of an offset in the partition with this id."""
    return partition << OFFSET_BITS | offset


def offset_of(row: int) -> int:
    return row & ((1 << OFFSET_BITS) - 1)


def block_id(partition: int, offset: int) -> int:
    """The block that an offset belongs to; blocks of a partition are in order."""
    return row_id(partition, offset) >> BLOCK_BITS


class Database:
    """The path of one log file, and connections to it."""

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        self.path = path
        self._max_pages = None if max_bytes is None else max(1, max_bytes // PAGE_BYTES)

    def create(self) -> None:
        """Make the file and its tables where they are missing. Raises LogError where it is not a log of ours."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = WriteLock(self.path)
            with closing(lock), lock.held(), closing(self.writer()) as connection:
                self._prepare(connection)
        except (OSError, sqlite3.Error) as error:
            raise self.explain(error) from error

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == VERSION:
            return
        if version > VERSION:
            raise LogError(f"{self.path} has log format {version}, this release knows {VERSION}: install a newer one")
        if connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            raise LogError(f"{self.path} is another program's database, not a log: name another file in log.url")
        connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")

    def writer(self) -> sqlite3.Connection:
        """A connection that writes; open and use it under :class:`WriteLock` alone."""
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=30, check_same_thread=False)
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a commit returns once the write-ahead log is on the disk
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        connection.execute("PRAGMA journal_size_limit = 67108864")
        connection.execute("PRAGMA temp_store = MEMORY")
        if self._max_pages is not None:
            connection.execute(f"PRAGMA max_page_count = {self._max_pages}")
        return connection

    def reader(self) -> sqlite3.Connection:
        """A connection that only reads; one thread at a time."""
        try:
            connection = sqlite3.connect(self.path, isolation_level=None, timeout=30, check_same_thread=False)
            connection.execute("PRAGMA query_only = 1")
        except sqlite3.Error as error:
            raise self.explain(error) from error
        return connection

    def explain(self, error: Exception) -> LogError:
        """The error that callers get for one of SQLite's or the system's."""
        if isinstance(error, LogError):
            return error
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        no_room = code == sqlite3.SQLITE_FULL or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if no_room or (code == sqlite3.SQLITE_IOERR and self._disk_is_full()):
            return LogFull(f"no room left for the log {self.path}: nothing was written; make room, then retry")
        return LogError(f"the log {self.path} failed: {error}")

    def _disk_is_full(self) -> bool:
        try:
            return shutil.disk_usage(self.path.parent).free < NEARLY_FULL
        except OSError:
            return False


class WriteLock:
    """The lock file beside a log: one writer at a time, over threads and processes; the kernel frees a dead one's."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(f"{path}-writer", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextmanager
    def held(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._file)
