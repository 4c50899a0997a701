"""Hands a producer whole batches, where ``KafkaProducer.send`` takes records one by one.

A transaction is written as a whole or not at all, so nobody asks what became of one of its records. ``send`` makes a
future with locks and callbacks for each of them nevertheless, and looks up topic and transaction anew, which was a
fifth of a worker's time. Here kafka-python's own builder fills the batches of a partition, and
they are put where its sender finds them. From there on all is as it is behind ``send``: sequence numbers, the
transaction's partitions, retries, batches that are split since the broker takes none that large.

That is below kafka-python's public interface: of another version ``tests/log/test_fenced.py`` says whether it holds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from kafka import KafkaProducer
from kafka import TopicPartition as Partition
from kafka import errors as kafka_errors
from kafka.producer.producer_batch import ProducerBatch
from kafka.record.memory_records import MemoryRecordsBuilder

from everloop.log.kafka.records import Message

MAGIC = 2  # the form of batches, since transactions exist
NOT_COMPRESSED = 0
MOST_BYTES = 524_288  # of a batch, unless one record has more


class Sent:
    """A record that was handed over: knows the batch that it is in. kafka-python takes it for the record's future."""

    __slots__ = ("batch",)

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def rebind(self, batch: Any, index: int) -> None:
        """kafka-python's: the batch was split, and the record is in another one now."""
        before, self.batch = self.batch, batch
        before._latch.set()  # nothing more will be heard of it

    def wait(self, end: float) -> None:
        """Until the broker has it. Raises KafkaError where it has not by ``end``, or refuses it."""
        while not self.batch.is_done:
            left = end - time.monotonic()
            if left <= 0 or not self.batch.wait(left):
                raise kafka_errors.KafkaTimeoutError("the broker has not acknowledged in time")
        _, _, refused = self.batch.value
        if refused is not None:
            raise refused(0)


def hand_over(producer: KafkaProducer, messages: Mapping[Partition, Iterable[Message]]) -> list[Sent]:
    """Records of the open transaction by the partition of each, in order; does not wait.

    Raises KafkaError where the transaction cannot go on, or the producer is closed.
    """
    made = {at: _batches(at, its, producer.config["max_request_size"]) for at, its in messages.items()}
    accumulator = producer._accumulator
    accumulator._appends_in_progress.increment()  # whoever closes the producer waits for what is being added
    try:
        for at, batches in made.items():
            producer._transaction_manager.maybe_add_partition_to_transaction(at)
            with accumulator._tp_lock(at):
                if accumulator._closed:
                    raise kafka_errors.IllegalStateError("the producer is closed")
                accumulator._batches[at].extend(batches)
                for batch in batches:
                    accumulator._incomplete.add(batch)
    finally:
        accumulator._appends_in_progress.decrement()
    producer._sender.wakeup()
    return [sent for batches in made.values() for batch in batches for sent in batch._record_futures]


def _batches(at: Partition, messages: Iterable[Message], largest: int) -> list[ProducerBatch]:
    filled: list[ProducerBatch] = []
    for message in messages:
        content = message.timestamp_ms, message.key, message.value, message.headers
        if not filled or filled[-1].records.append(*content) is None:  # full
            filled.append(ProducerBatch(at, MemoryRecordsBuilder(MAGIC, NOT_COMPRESSED, min(MOST_BYTES, largest))))
            filled[-1].records.append(*content)
        filled[-1]._record_futures.append(Sent(filled[-1].produce_future))
    return filled
