"""Consumer groups of the embedded log, as tables: members with heartbeats, and who reads which partition.

There is no coordinator. Each member looks at the tables in a transaction of its own and does its part: it drops
members whose heartbeat is too old, gives up partitions above its fair share, and takes free ones below it. Every
change raises the group's epoch; a member that sees a new epoch looks again, until nothing changes any more.

Heartbeats are on the machine's monotonic clock, which all its processes share and no clock correction moves.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from everloop.errors import LogError


class Member(NamedTuple):
    """One consumer. ``name``: whoever joins with the same one replaces it; empty: nobody does."""

    id: str
    group: str
    name: str
    topics: tuple[str, ...]


Claims = dict[int, int]
"""Partition ids that a member holds, with the epoch in which it took each."""


def epoch_of(connection: sqlite3.Connection, group: str) -> int:
    row = connection.execute("SELECT epoch FROM groups WHERE name = ?", (group,)).fetchone()
    return 0 if row is None else int(row[0])


def join(connection: sqlite3.Connection, member: Member, now: float, session: float) -> Claims:
    """Become a member: one of the same name is put out, and the fair share is taken as far as it is free."""
    connection.execute("INSERT OR IGNORE INTO groups (name, epoch) VALUES (?, 0)", (member.group,))
    if member.name:
        query = "SELECT id FROM members WHERE grp = ? AND name = ?"
        same = [str(row[0]) for row in connection.execute(query, (member.group, member.name))]
        remove(connection, member.group, same)
    _enter(connection, member, now)
    return settle(connection, member, now, session)


def _enter(connection: sqlite3.Connection, member: Member, now: float) -> None:
    connection.execute(
        "INSERT INTO members (id, grp, name, topics, beat) VALUES (?, ?, ?, ?, ?)",
        (member.id, member.group, member.name, json.dumps(member.topics), now),
    )
    _raise_epoch(connection, member.group)


def _raise_epoch(connection: sqlite3.Connection, group: str) -> None:
    connection.execute("UPDATE groups SET epoch = epoch + 1 WHERE name = ?", (group,))


def remove(connection: sqlite3.Connection, group: str, members: Sequence[str]) -> None:
    """Put members out; their partitions are free at once."""
    if not members:
        return
    for member in members:
        connection.execute("DELETE FROM assignments WHERE grp = ? AND member = ?", (group, member))
        connection.execute("DELETE FROM members WHERE id = ?", (member,))
    _raise_epoch(connection, group)


def beat(connection: sqlite3.Connection, members: Iterable[str], now: float) -> None:
    connection.executemany("UPDATE members SET beat = ? WHERE id = ?", [(now, member) for member in members])


def expired(connection: sqlite3.Connection, group: str, now: float, session: float) -> list[str]:
    """Members without a heartbeat for ``session`` seconds, or with one from before the machine was started."""
    query = "SELECT id FROM members WHERE grp = ? AND (beat < ? OR beat > ?)"
    return [str(row[0]) for row in connection.execute(query, (group, now - session, now + session))]


def settle(connection: sqlite3.Connection, member: Member, now: float, session: float) -> Claims:
    """Do this member's part of the sharing; returns what it holds now.

    Raises LogError where another has joined under this member's name.
    """
    remove(connection, member.group, [m for m in expired(connection, member.group, now, session) if m != member.id])
    _stay(connection, member, now)
    members = _subscriptions(connection, member.group)
    for topic in member.topics:
        _share(connection, member, topic, [m for m, topics in members.items() if topic in topics])
    query = "SELECT partition, epoch FROM assignments WHERE grp = ? AND member = ?"
    return {int(row[0]): int(row[1]) for row in connection.execute(query, (member.group, member.id))}


def _stay(connection: sqlite3.Connection, member: Member, now: float) -> None:
    """Keep the membership alive; come back where others took this member for dead."""
    if connection.execute("UPDATE members SET beat = ? WHERE id = ?", (now, member.id)).rowcount:
        return
    query = "SELECT 1 FROM members WHERE grp = ? AND name = ?"
    if member.name and connection.execute(query, (member.group, member.name)).fetchone():
        raise LogError(
            f"another consumer has taken the place of {member.name!r} in group {member.group!r}: stop this one"
        )
    _enter(connection, member, now)


def _subscriptions(connection: sqlite3.Connection, group: str) -> dict[str, list[str]]:
    rows = connection.execute("SELECT id, topics FROM members WHERE grp = ? ORDER BY id", (group,))
    return {str(member): json.loads(topics) for member, topics in rows}


def _share(connection: sqlite3.Connection, member: Member, topic: str, members: list[str]) -> None:
    """Give up what is above the fair share of one topic, or take free partitions below it."""
    owners = _owners(connection, member.group, topic)
    held = {m: [p for p, owner in owners.items() if owner == m] for m in members}
    least, more = divmod(len(owners), len(members))
    order = sorted(members, key=lambda m: (-len(held[m]), m))
    share = least + (order.index(member.id) < more)
    mine = held[member.id]
    for partition in mine[share:]:
        connection.execute("DELETE FROM assignments WHERE grp = ? AND partition = ?", (member.group, partition))
    free = [partition for partition, owner in owners.items() if owner is None]
    taken = free[: max(0, share - len(mine))]
    if taken or mine[share:]:
        _raise_epoch(connection, member.group)
    epoch = epoch_of(connection, member.group)
    connection.executemany(
        "INSERT INTO assignments (grp, partition, member, epoch) VALUES (?, ?, ?, ?)",
        [(member.group, partition, member.id, epoch) for partition in taken],
    )


def _owners(connection: sqlite3.Connection, group: str, topic: str) -> dict[int, str | None]:
    query = (
        "SELECT p.id, a.member FROM partitions p LEFT JOIN assignments a ON a.partition = p.id AND a.grp = ?"
        " WHERE p.topic = ? ORDER BY p.number"
    )
    return {int(row[0]): row[1] for row in connection.execute(query, (group, topic))}


def start_offsets(connection: sqlite3.Connection, group: str, partitions: Iterable[int], start: str) -> dict[int, int]:
    """Where to read each partition from: what the group committed, else ``start``, which is then committed.

    "latest" is pinned at once, so that what arrives before the first commit is not skipped by a restart.
    """
    found = {}
    for partition in partitions:
        row = connection.execute(
            "SELECT next FROM offsets WHERE grp = ? AND partition = ?", (group, partition)
        ).fetchone()
        if row is None:
            column = "next" if start == "latest" else "first"
            row = connection.execute(f"SELECT {column} FROM partitions WHERE id = ?", (partition,)).fetchone()
            if start == "latest":
                _store(connection, group, {partition: int(row[0])})
        found[partition] = int(row[0])
    return found


def commit(connection: sqlite3.Connection, member: Member, claims: Claims, offsets: Mapping[int, int]) -> None:
    """Store the next offsets to read. Raises LogError, and stores none, where a partition is another's now."""
    query = "SELECT partition, epoch FROM assignments WHERE grp = ? AND member = ?"
    held = {int(row[0]): int(row[1]) for row in connection.execute(query, (member.group, member.id))}
    lost = sorted(p for p in offsets if held.get(p) is None or held[p] != claims.get(p))
    if lost:
        names = ", ".join(_name(connection, partition) for partition in lost)
        raise LogError(
            f"{names} no longer belongs to this member of {member.group!r}: read on with poll(), handle again"
        )
    _store(connection, member.group, offsets)


def _store(connection: sqlite3.Connection, group: str, offsets: Mapping[int, int]) -> None:
    connection.executemany(
        "INSERT OR REPLACE INTO offsets (grp, partition, next) VALUES (?, ?, ?)",
        [(group, partition, offset) for partition, offset in offsets.items()],
    )


def _name(connection: sqlite3.Connection, partition: int) -> str:
    topic, number = connection.execute("SELECT topic, number FROM partitions WHERE id = ?", (partition,)).fetchone()
    return f"{topic}/{number}"
