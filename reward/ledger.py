"""What judges were asked: their answers by content, what critics said in another answer's place, and the questions of
each day, on disk.

A question is counted before it is sent and its answer kept when it is there, each durable on return: killed at any
moment, no more is asked a day than may be, and only the questions that were under way are asked twice.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

KEPT = 200_000  # answers, and a tenth as many texts; the oldest go first


class Ledger:
    """One file; one thread at a time. Raises sqlite3.Error where the disk fails."""

    def __init__(self, path: Path, kept: int = KEPT) -> None:
        self._kept = kept
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS answers (content TEXT PRIMARY KEY, value REAL, fault TEXT)"
        )
        self._connection.execute("CREATE TABLE IF NOT EXISTS texts (content TEXT PRIMARY KEY, text TEXT)")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS spent (judge TEXT, day INTEGER, questions INTEGER, PRIMARY KEY (judge, day))"
        )

    def answer(self, content: str) -> tuple[float | None, str | None] | None:
        """Value and fault; None: it was not asked."""
        row = self._connection.execute("SELECT value, fault FROM answers WHERE content = ?", [content]).fetchone()
        return None if row is None else (row[0], row[1])

    def keep(self, content: str, value: float | None, fault: str | None) -> None:
        self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", [content, value, fault])
        self._forget("answers", self._kept)

    def text(self, content: str) -> str | None:
        """What was said; None: it was not asked."""
        row = self._connection.execute("SELECT text FROM texts WHERE content = ?", [content]).fetchone()
        return None if row is None else str(row[0])

    def keep_text(self, content: str, text: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO texts VALUES (?, ?)", [content, text])
        self._forget("texts", self._kept // 10)

    def _forget(self, table: str, kept: int) -> None:
        self._connection.execute(f"DELETE FROM {table} WHERE rowid <= (SELECT max(rowid) FROM {table}) - ?", [kept])

    def spend(self, judge: str, day: int, most: int) -> bool:
        """Count one question of a judge on a day; False, and not counted, where that would be more than ``most``."""
        row = self._connection.execute(
            "INSERT INTO spent VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET questions = questions + 1"
            " WHERE questions < ? RETURNING questions",
            [judge, day, most],
        ).fetchall()
        return bool(row)

    def spent(self, judge: str, day: int) -> int:
        row = self._connection.execute(
            "SELECT questions FROM spent WHERE judge = ? AND day = ?", [judge, day]
        ).fetchone()
        return 0 if row is None else int(row[0])

    def close(self) -> None:
        self._connection.close()
