"""Stream handlers: plain functions from state and record to state, outputs and dead letters.

A handler imports no stream framework and reads no clock. ``services/stream.py`` binds it to a log: it reads a
batch, calls the handler for each record, appends the outputs, and commits state and offsets in one transaction.
A batch that is handled twice changes nothing: outputs have the same ids, state the same content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from everloop.log.base import NewRecord, Record


class State(Protocol):
    """The durable state of one handler: bytes by key, kept with the offsets that produced it."""

    def get(self, key: str) -> bytes | None: ...

    def put(self, key: str, value: bytes) -> None: ...

    def delete(self, key: str) -> None: ...

    def scan(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        """Keys that start with ``prefix`` and their values, in order of the key, as they are when it is called."""


class Handler(Protocol):
    """One step of the flow. ``name`` is also its group and the name of its state file; use it once.

    Everything that it must not forget belongs in the state. What it keeps beside it in memory must bear that a
    record or a whole batch is handled again: after a failed try, and after a batch that could not be committed.
    """

    name: str
    topics: tuple[str, ...]

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        """Fold one record into the state; return outputs that belong to this record alone.

        Raises:
            ContractError: this record can never be taken; it becomes a dead letter and the partition goes on.
            Exception: anything else is tried again with backoff; nothing of this record is kept until it passes.
                Where it does not pass, the process ends before anything of its batch is committed.
        """

    def flush(self, state: State, now: float) -> list[NewRecord]:
        """Called at the end of each batch, before state and offsets are committed: outputs of the batch as a whole.

        Also called about once a second while no record comes. Effects outside the log (Parquet files, snapshots)
        happen here, idempotently.
        """


class Movable(Protocol):
    """What a handler's class says besides where its partitions have states of their own: partitions that are added
    take keys over, and the state has to follow."""

    def route_of(self, key: str) -> str | None:
        """What decides the partition of the records that an entry of the state is of (their route, else their key);
        None: the entry is of no key, but of the partition as a whole."""

    def moved(self, key: str, value: bytes) -> bytes:
        """An entry as it is in another partition, whose offsets have nothing to do with those of the one before."""

    def joined(self, key: str, values: Sequence[bytes]) -> bytes:
        """An entry of no key, as it is right for every partition, from what each of them had."""


class Handled(NamedTuple):
    """What became of a batch: counts for metrics."""

    records: int
    outputs: int
    dead_letters: int
