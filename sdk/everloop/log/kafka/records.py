"""The form of a record on Kafka: keys and headers in UTF-8, event time as the record's timestamp in milliseconds.

Kafka deletes by timestamp, and a producer's clock may be wrong or its events old. So the timestamp is the event's
time where that lies within a window around now; else it is the window's nearest end, and the event's own time
travels in a header. Then retention counts from about the append, and a timestamp is never before the event's time
except where that is more than a day ahead.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

from kafka.consumer.fetcher import ConsumerRecord

from everloop.log.base import NewRecord, Record

PAST = 3_600.0
AHEAD = 86_400.0
TIME = "everloop-time"
"""Header with the event's time in milliseconds, where the timestamp could not carry it."""


class Message(NamedTuple):
    """What ``KafkaProducer.send`` takes."""

    topic: str
    value: bytes | None
    key: bytes
    headers: list[tuple[str, bytes]]
    partition: int
    timestamp_ms: int


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def message(record: NewRecord, topic: str, partitions: int, partition: int | None = None) -> Message:
    """``topic``: the cluster's name for it. ``partition``: where the record goes, whatever its key."""
    now = time.time()
    event = record.time or now
    stamp = min(max(event, now - PAST), now + AHEAD)
    headers = [(name, text.encode()) for name, text in record.headers.items()]
    if stamp != event:
        headers.append((TIME, str(milliseconds(event)).encode()))
    return Message(
        topic,
        record.value,
        record.key.encode(),
        headers,
        record.partition(partitions) if partition is None else partition,
        milliseconds(stamp),
    )


def record(read: ConsumerRecord, topic: str) -> Record:
    """``topic``: our name for it."""
    headers = _headers(read.headers)
    stamp = int(headers.pop(TIME, read.timestamp))
    key = (read.key or b"").decode(errors="replace")
    return Record(topic, read.partition, read.offset, key, read.value, headers, stamp / 1000)


def _headers(pairs: Iterable[tuple[str, bytes | None]]) -> dict[str, str]:
    return {name: (value or b"").decode(errors="replace") for name, value in pairs}
