"""Retention of the embedded log: what is older than the limit goes, whole blocks at a time.

Age counts from the append, never from event time: a producer whose clock is wrong must not lose what it wrote.
In a compacted topic the newest record of a key stays whatever its age; a tombstone goes once it is old.
"""

from __future__ import annotations

import sqlite3

from everloop.log.sqlite.database import BLOCK_BITS, block_id, offset_of, row_id

BLOCKS_A_TURN = 32  # 8,192 records: one transaction stays short, writers do not wait long


def clean(connection: sqlite3.Connection, before: float) -> bool:
    """Drop some of what was appended before ``before`` (unix seconds); whether there may be more to drop."""
    budget = BLOCKS_A_TURN
    query = "SELECT p.id, p.next, t.compacted FROM partitions p JOIN topics t ON t.name = p.topic"
    for partition, end, compacted in connection.execute(query).fetchall():
        blocks = _old_blocks(connection, partition, end, before, -1 if compacted else budget)
        if not blocks:
            continue
        stop = min(end, offset_of((blocks[-1] + 1) << BLOCK_BITS))
        if compacted:
            _compact(connection, partition, stop, end)
        else:
            _drop(connection, partition, stop)
            budget -= len(blocks)
        if budget <= 0:
            return True
    return False


def _old_blocks(connection: sqlite3.Connection, partition: int, end: int, before: float, limit: int) -> list[int]:
    """The leading full blocks of a partition of which every record is older than ``before``."""
    query = "SELECT id, appended FROM blocks WHERE id >= ? AND id < ? ORDER BY id LIMIT ?"
    old = []
    for block, appended in connection.execute(query, (block_id(partition, 0), block_id(partition, end), limit)):
        if appended >= before:
            break
        old.append(int(block))
    return old


def _drop(connection: sqlite3.Connection, partition: int, stop: int) -> None:
    connection.execute("DELETE FROM records WHERE id >= ? AND id < ?", (row_id(partition, 0), row_id(partition, stop)))
    connection.execute(
        "DELETE FROM blocks WHERE id >= ? AND id < ?", (block_id(partition, 0), block_id(partition, stop))
    )
    connection.execute("UPDATE partitions SET first = ? WHERE id = ?", (stop, partition))


def _compact(connection: sqlite3.Connection, partition: int, stop: int, end: int) -> None:
    """Of the records before ``stop``, keep those that are still the newest of their key and have a value."""
    everything = (row_id(partition, 0), row_id(partition, end))
    connection.execute(
        "DELETE FROM records WHERE id >= ? AND id < ? AND (value IS NULL OR id NOT IN"
        " (SELECT max(id) FROM records WHERE id >= ? AND id < ? GROUP BY key))",
        (row_id(partition, 0), row_id(partition, stop), *everything),
    )
