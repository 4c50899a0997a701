"""The durable state of one stream handler: keys and values in SQLite, kept with the offsets that produced them.

Changes gather in memory; :meth:`StateStore.commit` writes them and the offsets in one transaction. So the state is
always that of exactly the records before its offsets, wherever the process is killed.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from everloop.log.base import Position, TopicPartition

SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS offsets (
    topic TEXT NOT NULL, partition INTEGER NOT NULL, next INTEGER NOT NULL,
    PRIMARY KEY (topic, partition)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (
    topic TEXT NOT NULL, partition INTEGER NOT NULL, position INTEGER NOT NULL, times INTEGER NOT NULL,
    PRIMARY KEY (topic, partition, position)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS mark (one INTEGER PRIMARY KEY CHECK (one = 1), text TEXT NOT NULL);
"""
LAST = chr(0x10FFFF)  # sorts behind every character that a key may go on with
Changes = dict[str, bytes | None]
"""New values by key; None: deleted."""


class StateStore:
    """See :class:`everloop.stream.State` for get, put, delete and scan. One thread; one process (``owned``).

    ``cache``: of a state that is durable elsewhere. Where the machine loses its power, it is that of an earlier commit.
    """

    def __init__(self, path: Path, *, cache: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute(f"PRAGMA synchronous = {'NORMAL' if cache else 'FULL'}")
        self._connection.executescript(SCHEMA)
        self._layers: list[Changes] = [{}]

    def get(self, key: str) -> bytes | None:
        for layer in reversed(self._layers):
            if key in layer:
                return layer[key]
        row = self._connection.execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def put(self, key: str, value: bytes) -> None:
        self._layers[-1][key] = bytes(value)

    def delete(self, key: str) -> None:
        self._layers[-1][key] = None

    def scan(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        """Keys that start with ``prefix`` and their values, in order of the key, as they are when it is called."""
        query = "SELECT key, value FROM entries WHERE key >= ? AND key < ?"
        rows = self._connection.execute(query, (prefix, prefix + LAST))
        found: Changes = {str(key): bytes(value) for key, value in rows}
        for layer in self._layers:
            found.update((key, value) for key, value in layer.items() if key.startswith(prefix))
        return iter(sorted((key, value) for key, value in found.items() if value is not None))

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Changes made inside are kept if it ends well; none of them if it raises."""
        self._layers.append({})
        try:
            yield
        except BaseException:
            self._layers.pop()
            raise
        made = self._layers.pop()
        self._layers[-1].update(made)

    def discard(self) -> None:
        """Forget every change since the last commit."""
        self._layers = [{}]

    @property
    def changed(self) -> bool:
        return any(self._layers)

    @property
    def changes(self) -> Mapping[str, bytes | None]:
        """What :meth:`commit` would write: new values by key; None: deleted."""
        (changes,) = self._layers
        return changes

    def offsets(self) -> dict[TopicPartition, int]:
        """The next offset of each partition that this state has seen."""
        rows = self._connection.execute("SELECT topic, partition, next FROM offsets")
        return {(str(topic), int(partition)): int(offset) for topic, partition, offset in rows}

    def mark(self) -> str:
        """What the last commit was called; empty: nothing."""
        row = self._connection.execute("SELECT text FROM mark").fetchone()
        return "" if row is None else str(row[0])

    def commit(self, offsets: Mapping[TopicPartition, int], mark: str = "") -> None:
        """Write changes and offsets in one transaction; durable on return, unless it is a cache. On an error nothing
        is, and both wait."""
        with self._transaction():
            self._write(self.changes.items(), offsets, mark)
        self._layers = [{}]

    def rebuild(
        self,
        entries: Iterable[tuple[str, bytes | None]],
        offsets: Mapping[TopicPartition, int],
        mark: str,
        anew: bool = True,
    ) -> None:
        """Replace everything, in one transaction; of entries with one key the last counts. ``anew`` False: what is
        there stays, but for these."""
        with self._transaction():
            for table in ("entries", "offsets", "mark") if anew else ():
                self._connection.execute(f"DELETE FROM {table}")
            for key, value in entries:
                self._write([(key, value)], {}, "")
            self._write([], offsets, mark)
        self._layers = [{}]

    def _write(
        self, changes: Collection[tuple[str, bytes | None]], offsets: Mapping[TopicPartition, int], mark: str
    ) -> None:
        execute = self._connection.executemany
        execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", [c for c in changes if c[1] is not None])
        execute("DELETE FROM entries WHERE key = ?", [(key,) for key, value in changes if value is None])
        execute("INSERT OR REPLACE INTO offsets VALUES (?, ?, ?)", [(*at, n) for at, n in offsets.items()])
        execute("INSERT OR REPLACE INTO mark VALUES (1, ?)", [(mark,)] if mark else [])
        execute(
            "DELETE FROM failures WHERE topic = ? AND partition = ? AND position < ?",
            [(*at, n) for at, n in offsets.items()],
        )

    def count_failure(self, position: Position) -> int:
        """How often a process has given up on this record, this time included; durable, apart from the changes."""
        with self._transaction():
            self._connection.execute(
                "INSERT INTO failures VALUES (?, ?, ?, 1) ON CONFLICT DO UPDATE SET times = times + 1", position
            )
        query = "SELECT times FROM failures WHERE topic = ? AND partition = ? AND position = ?"
        return int(self._connection.execute(query, position).fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def close(self) -> None:
        self._connection.close()


@contextmanager
def owned(path: Path, stop: threading.Event, every: float = 0.2) -> Iterator[bool]:
    """Hold the right to write the state at ``path``, alone on this machine; False where ``stop`` came before it.

    A second process of the same handler waits here, and goes on where the first one ended as soon as it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.wait(every):
                    yield False
                    return
        yield True
    finally:
        os.close(file)


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """The first folder ``<parent>/<number>`` that no other process uses, for this one alone.

    So workers of one home share nothing but the log, and one that is started anew finds the states that it had.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        file = os.open(parent / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            continue
        try:
            folder = parent / str(number)
            folder.mkdir(exist_ok=True)
            yield folder
            return
        finally:
            os.close(file)
