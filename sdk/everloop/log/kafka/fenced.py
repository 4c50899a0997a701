"""The writer of a worker: what a batch gives, the state it leaves and the offset it reached, in one transaction.

The steps of :meth:`FencedWriter.write`, in this order; whatever fails before the last leaves nothing that a reader
of committed records sees:

1. begin
2. send the records, and those that have their place (changelog entries)
3. wait until the broker has them all; so that a record it refuses is named, and nothing is committed
4. add the group's offsets
5. commit

A writer of the same name that is made later fences this one: its next write raises Fenced. A write that failed in a
way that leaves unknown what was committed ends the writer too. It does not connect anew by itself: that would fence
whoever took its place meanwhile. Who still owns its partition makes a new writer.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from kafka import OffsetAndMetadata
from kafka import TopicPartition as Partition
from kafka import errors as kafka_errors
from kafka.structs import ConsumerGroupMetadata

from everloop.errors import LogError, RecordTooLarge
from everloop.log.base import NewRecord, TopicPartition, checked_size
from everloop.log.kafka.batches import Sent, hand_over
from everloop.log.kafka.clients import Fenced, abandon
from everloop.log.kafka.records import Message, message

if TYPE_CHECKING:
    from everloop.log.kafka.log import KafkaLog

DEADLINE = 45.0  # of one write; a transaction that is left open longer than TRANSACTION_SECONDS the broker aborts
TRANSACTION_SECONDS = 60.0


class Membership(NamedTuple):
    """Of the group whose offsets are committed. With ``generation`` and ``member`` the broker also refuses a member
    that the group has given up, whatever its name as a writer."""

    group: str
    generation: int = -1
    member: str = ""
    instance: str | None = None


class FencedWriter:
    """See the module. One thread. Made by ``KafkaLog.fenced``, where it fences its predecessor at once."""

    def __init__(self, log: KafkaLog, name: str, deadline: float = DEADLINE) -> None:
        self._log = log
        self._clients = log.clients
        self._name = log.clients.address.qualified(name)
        self._deadline = deadline
        self._ended: LogError | None = None
        self._producer = self._clients.producer(self._name, TRANSACTION_SECONDS)
        try:
            self._producer.init_transactions()
        except kafka_errors.KafkaError as error:
            abandon(self._producer)
            raise self._clients.explain(error, f"taking the place of the writer {self._name!r}") from error

    def write(
        self,
        records: Sequence[NewRecord],
        *,
        placed: Sequence[tuple[NewRecord, int]] = (),
        offsets: Mapping[TopicPartition, int] | None = None,
        group: Membership | str = "",
    ) -> None:
        """All of it or nothing; committed on return.

        ``placed``: records with the partition that each goes to, whatever its key. ``offsets``: the next offset to
        read of each partition, committed for ``group``.

        Raises:
            RecordTooLarge: nothing was written, and the writer goes on.
            Fenced: another writer of this name took its place; nothing was written, and this one has ended.
            LogError: whether it is written is not known, or why it is not; this writer has ended.
        """
        if self._ended is not None:
            raise self._ended
        for record in (*records, *(record for record, _ in placed)):
            checked_size(record, self._log.max_record_bytes)
        end = time.monotonic() + self._deadline
        try:
            self._begin_and_send(records, placed, end)
            if offsets:
                self._add(offsets, Membership(group) if isinstance(group, str) else group, end)
            self._finish(self._manager.begin_commit(), end)
        except LogError as error:
            raise self._end(error) from error
        except (kafka_errors.KafkaError, ValueError) as error:  # ValueError: a place that the topic does not have
            raise self._undone(self._clients.explain(error, f"writing as {self._name!r}"), end) from error

    @property
    def _manager(self) -> Any:
        return self._producer._transaction_manager

    def _begin_and_send(
        self, records: Sequence[NewRecord], placed: Sequence[tuple[NewRecord, int]], end: float
    ) -> None:
        self._producer.begin_transaction()
        for sent in self._send(records, placed):
            sent.wait(end)

    def _send(self, records: Iterable[NewRecord], placed: Iterable[tuple[NewRecord, int]] = ()) -> list[Sent]:
        topics: dict[str, tuple[str, set[int]]] = {}
        messages: dict[Partition, list[Message]] = defaultdict(list)
        for record, partition in chain(((record, None) for record in records), placed):
            if record.topic not in topics:
                topics[record.topic] = self._partitions(record.topic)
            name, known = topics[record.topic]
            its = message(record, name, len(known), partition)
            if its.partition not in known:
                raise ValueError(f"Unrecognized partition {its.partition} of the topic {name}")
            messages[Partition(name, its.partition)].append(its)
        return hand_over(self._producer, messages)

    def _partitions(self, topic: str) -> tuple[str, set[int]]:
        """The cluster's name for a topic, and its partitions as the producer knows them."""
        self._log.partitions(topic)  # makes it where it is missing
        name = self._clients.address.qualified(topic)
        return name, self._producer.partitions_for(name)

    def _add(self, offsets: Mapping[TopicPartition, int], group: Membership, end: float) -> None:
        qualified = self._clients.address.qualified
        for topic in {topic for topic, _ in offsets}:
            self._log.partitions(topic)  # kafka-python would wait for a topic that is missing
        wanted = {Partition(qualified(topic), n): OffsetAndMetadata(at, "", -1) for (topic, n), at in offsets.items()}
        metadata = ConsumerGroupMetadata(
            group_id=qualified(group.group),
            generation_id=group.generation,
            member_id=group.member,
            group_instance_id=group.instance,
        )
        self._finish(self._manager.send_offsets_to_transaction(wanted, metadata), end)

    def _finish(self, result: Any, end: float) -> None:
        """Wait for a step of the transaction; kafka-python's own calls for it wait without end."""
        self._producer._sender.wakeup()
        if not result.wait(timeout_ms=max(1.0, (end - time.monotonic()) * 1000)):
            raise kafka_errors.KafkaTimeoutError(f"no answer within {self._deadline:g} s")

    def _undone(self, error: LogError, end: float) -> LogError:
        """What to raise for an error of the transaction. A record that is too large for its topic ends no writer: the
        transaction is aborted, so that the others can be written without it."""
        if not isinstance(error, RecordTooLarge):
            return self._end(error)
        try:
            self._abort(end)
        except kafka_errors.KafkaError as failed:
            return self._end(self._clients.explain(failed, f"taking back what {self._name!r} wrote"))
        return error

    def _abort(self, end: float) -> None:
        """The refused records had numbers already, and the broker takes none behind a gap: so numbers begin anew, with
        a next epoch, which it gives to the newest writer of the name alone."""
        self._finish(self._manager.begin_abort(), end)
        self._manager.bump_producer_id_and_epoch()
        self._producer._sender.wakeup()
        while self._manager.is_bumping_epoch() and time.monotonic() < end:
            time.sleep(0.005)

    def _end(self, error: LogError) -> LogError:
        """This writer has ended with ``error``; the broker aborts what it left open when the next one begins."""
        self._ended = error if isinstance(error, Fenced) else LogError(f"this writer has ended: {error}")
        abandon(self._producer)
        self._log.forget(self)
        return error

    def close(self) -> None:
        """Let go; the name stays free for the next."""
        if self._ended is None:
            self._ended = LogError("this writer is closed")
            abandon(self._producer)
            self._log.forget(self)
