"""API keys: hashed at rest, each with one tenant and one scope.

A key has 160 random bits, so its plain SHA-256 cannot be guessed back and needs no salt or slow hash.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
import threading
import time
from pathlib import Path
from typing import NamedTuple

from everloop.errors import ConfigError
from everloop.section import NAME

PREFIX = "ek_"
SCOPES: dict[str, frozenset[str]] = {
    "agent": frozenset({"call", "events", "feedback"}),
    "research": frozenset({"call", "events", "feedback", "pin", "source"}),
    "feedback": frozenset({"feedback"}),
}
RECHECK = 1.0  # seconds for which a found key is believed without looking: the longest a revoked key works
REMEMBERED = 10_000


class Key(NamedTuple):
    """What a key may do, for whom. ``id`` is the start of its hash: enough to name it, not to use it."""

    id: str
    tenant: str
    scope: str
    label: str = ""
    created: float = 0.0

    def may(self, action: str) -> bool:
        return action in SCOPES[self.scope]


class Keys:
    """The keys of one installation (``keys.db`` of its home). Thread-safe; several processes may hold one open."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS keys"
            " (hash BLOB PRIMARY KEY, tenant TEXT, scope TEXT, label TEXT, created REAL) WITHOUT ROWID"
        )
        self._seen: dict[bytes, tuple[Key, float]] = {}

    def create(self, tenant: str, scope: str = "agent", label: str = "") -> str:
        """A new key. It is shown this once: only its hash is kept.

        Raises:
            ConfigError: no such scope, or not a tenant's name.
        """
        if scope not in SCOPES:
            raise ConfigError(f"there is no scope {scope!r}; a key's scope is one of: {', '.join(SCOPES)}")
        if not re.match(NAME, tenant):
            raise ConfigError(f"{tenant!r} is not a tenant's name: use lower-case letters, digits and '-'")
        key = PREFIX + secrets.token_urlsafe(20)
        with self._lock:
            self._database.execute(
                "INSERT INTO keys VALUES (?, ?, ?, ?, ?)", (_hash(key), tenant, scope, label, time.time())
            )
        return key

    def find(self, key: str) -> Key | None:
        """Whose key this is; None: nobody's."""
        digest = _hash(key)
        now = time.monotonic()
        held = self._seen.get(digest)
        if held is not None and now - held[1] < RECHECK:
            return held[0]
        with self._lock:
            row = self._database.execute(
                "SELECT tenant, scope, label, created FROM keys WHERE hash = ?", (digest,)
            ).fetchone()
        if row is None:
            self._seen.pop(digest, None)
            return None
        found = Key(digest.hex()[:12], *row)
        if len(self._seen) >= REMEMBERED:
            self._seen.clear()
        self._seen[digest] = (found, now)
        return found

    def list(self) -> list[Key]:
        with self._lock:
            rows = self._database.execute("SELECT hash, tenant, scope, label, created FROM keys").fetchall()
        return sorted((Key(digest.hex()[:12], *rest) for digest, *rest in rows), key=lambda key: key.created)

    def revoke(self, id: str) -> bool:
        """Forget the key of this id; False: there is none. Every gateway refuses it within ``RECHECK`` seconds."""
        if not re.fullmatch(r"[0-9a-f]{12}", id):
            return False
        with self._lock:
            done = self._database.execute("DELETE FROM keys WHERE lower(substr(hex(hash), 1, 12)) = ?", (id,))
        return done.rowcount > 0

    def close(self) -> None:
        self._database.close()


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
