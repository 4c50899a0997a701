"""Reading outside any group: consumers that are kept for the next call, one for each that reads at the same time."""

from __future__ import annotations

import queue
import time
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from everloop.errors import LogError
from everloop.log.base import Record
from everloop.log.kafka import records
from everloop.log.kafka.clients import Clients, Unreachable

SECONDS = 15.0
KEPT = 4


class Readers:
    """See the module."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._idle: queue.LifoQueue[KafkaConsumer] = queue.LifoQueue(KEPT)
        self._closed = False

    def read(self, topic: str, partition: int, offset: int, end: int, max_records: int) -> list[Record]:
        """Up to ``max_records`` from ``offset`` on, none at or beyond ``end``; at least one if there is any.

        An offset that retention has taken already means the oldest record that is left.
        """
        if offset >= end or max_records < 1:
            return []
        if self._closed:
            raise LogError("the log is closed")
        at = TopicPartition(self._clients.address.qualified(topic), partition)
        with self._clients.explained(f"reading {at.topic}/{partition}"):
            try:
                consumer = self._idle.get_nowait()
            except queue.Empty:
                consumer = self._clients.consumer()
            try:
                found = self._read(consumer, at, offset, end, max_records)
            except BaseException:
                consumer.close(timeout_ms=0)
                raise
        self._keep(consumer)
        return [records.record(read, topic) for read in found if read.offset < end]

    def _read(self, consumer: KafkaConsumer, at: TopicPartition, offset: int, end: int, max_records: int) -> list[Any]:
        if consumer.assignment() != {at}:
            consumer.assign([at])
            consumer.seek(at, offset)
        elif consumer.position(at, timeout_ms=1000) != offset:  # what it has fetched already goes with a seek
            consumer.seek(at, offset)
        deadline = time.monotonic() + SECONDS
        while True:
            found = consumer.poll(timeout_ms=500, max_records=max_records).get(at, [])
            position = consumer.position(at, timeout_ms=1000)
            if found or (position is not None and position >= end):
                return list(found)
            if time.monotonic() > deadline:
                raise Unreachable(f"reading {at.topic}/{at.partition}: {self._clients.address} gave nothing for 15 s")

    def _keep(self, consumer: KafkaConsumer) -> None:
        try:
            if not self._closed:
                self._idle.put_nowait(consumer)
                return
        except queue.Full:
            pass
        consumer.close(timeout_ms=0)

    def close(self) -> None:
        self._closed = True
        while True:
            try:
                self._idle.get_nowait().close(timeout_ms=0)
            except queue.Empty:
                return
