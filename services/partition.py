"""One partition of a handler's topic on Kafka: its own handler, state and writer, whichever process has it now.

Taking it over:

1. take its writer's name: whoever wrote for it before is fenced from here on
2. bring the cache of the state up to the changelog: ``state/<handler>/<worker>/<topic>-<partition>.db`` is good where
   it has the changelog's newest mark; else it is built anew from the changelog
3. go on at the state's own offset, whatever the group's is

A batch, in this order:

1. handle it (:mod:`services.unit`)
2. in one Kafka transaction: outputs, dead letters, the changes of the state and its mark into the changelog, the
   group's offset
3. commit changes and mark to the cache

Killed before 2 is done, nothing of it is there; killed before 3, the next owner's cache is older than the changelog
and brought up to it. A changelog and a state that are gone mean handling again from the beginning.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from everloop.errors import LogError, RecordTooLarge
from everloop.log.base import NewRecord, Record, TopicPartition
from everloop.log.kafka.fenced import FencedWriter
from everloop.log.kafka.log import KafkaLog
from everloop.stream import Handled, Handler
from everloop.topics import CHANGELOG
from everloop.wire import BlobStore
from prometheus_client import Counter

from services.changelog import READ_AT_ONCE, Changelog, next_of, writer_name
from services.retry import Retry
from services.state import StateStore
from services.unit import Tally, Unit

logger = logging.getLogger(__name__)
OVERHEAD = 200  # bytes of a changelog record beyond key and value

RESTORED = Counter(
    "everloop_handler_restored_entries", "Entries of the state that were read from its changelog", ["handler"]
)
TAKEOVERS = Counter("everloop_handler_takeovers", "Partitions that were taken over", ["handler"])


class Counted:
    """Changes, and how many there were; ``moved`` is called at each."""

    def __init__(self, changes: Iterable[tuple[str, bytes | None]], moved: Callable[[], None]) -> None:
        self._changes = changes
        self._moved = moved
        self.count = 0

    def __iter__(self) -> Iterator[tuple[str, bytes | None]]:
        for change in self._changes:
            self.count += 1
            self._moved()
            yield change


class Partition:
    """See the module. One thread at a time; ``stop`` from any, after which :meth:`take` ends soon."""

    def __init__(
        self,
        handler: Handler,
        log: KafkaLog,
        source: TopicPartition,
        folder: Path,
        tally: Tally,
        *,
        clock: Callable[[], float] = time.time,
        blobs: BlobStore,
        retry: Retry,
    ) -> None:
        """Takes it over. Raises LogError where the cluster does not let it."""
        self.handler = handler
        self.source = source
        self.stop = threading.Event()
        self._name = handler.name
        self._moved = lambda: tally.moved(source[1])
        self._log = log
        self._changelog = Changelog(log, handler.name, source)
        self._writer: FencedWriter = log.fenced(writer_name(handler.name, source))
        self._state = StateStore(folder / f"{source[0]}-{source[1]}.db", cache=True)
        try:
            self._restore()
            self.next = self._state.offsets().get(source, 0)
        except BaseException:
            self.close()
            raise
        self._unit = Unit(
            handler,
            self._state,
            self._write,
            tally,
            stop=self.stop,
            clock=clock,
            blobs=blobs,
            retry=retry,
            part=source[1],
        )
        TAKEOVERS.labels(self._name).inc()

    def _restore(self) -> None:
        mark = self._changelog.mark()
        if self._state.mark() == mark:
            return
        held = self._changelog.offset_of(self._state.mark())
        began, counted = time.monotonic(), Counted(self._changelog.changes(-1 if held is None else held), self._moved)
        offsets = {self.source: next_of(mark)} if mark else {}
        self._state.rebuild(counted, offsets, mark, anew=held is None)
        RESTORED.labels(self._name).inc(counted.count)
        said = "%s: state of %s/%d %s its changelog: %d entries, %.1f s"
        how = "built from" if held is None else "brought up to"
        logger.info(said, self._name, *self.source, how, counted.count, time.monotonic() - began)

    def catch_up(self, until: int) -> None:
        """Handle what lies before ``until`` and is not in the state, as the log has it."""
        while self.next < until and not self.stop.is_set():
            found = [record for record in self._read(self.next, READ_AT_ONCE // 4) if record.offset < until]
            if not found:
                return
            self._unit.take(found)

    def take(self, records: Sequence[Record]) -> Handled:
        """Handle a batch, and what was left out before or in it, in order. Empty: only flush.

        Raises Fenced where another process has taken it over, and whatever did not pass: end the process.
        """
        batch: list[Record] = []
        follows = self.next
        for record in records:
            if record.offset > follows and self._left_out(follows, record.offset):
                self._unit.take(batch)
                self.catch_up(record.offset)
                batch = []
            if record.offset >= follows:
                batch.append(record)
                follows = record.offset + 1
        return Handled(0, 0, 0) if self.stop.is_set() else self._unit.take(batch)

    def _left_out(self, start: int, end: int) -> bool:
        """Whether the log has records there; ends of transactions have offsets too."""
        found = self._read(start, 1)
        return bool(found) and found[0].offset < end

    def _read(self, start: int, most: int) -> list[Record]:
        found: list[Record] = self._unit.attempt("reading", lambda: self._log.read(*self.source, start, most))
        return found

    def _write(self, new: Sequence[NewRecord], offsets: Mapping[TopicPartition, int]) -> None:
        """Steps 2 and 3 of a batch."""
        if not (new or offsets or self._state.changed):
            return
        follows = offsets.get(self.source, self.next)
        self._check_sizes(self._state.changes)
        written = self._changelog.written(self._state.changes, follows)
        self._writer.write(new, placed=written.placed, offsets=offsets, group=self._name)
        self._unit.attempt("committing the cache of the state", lambda: self._state.commit(offsets, written.mark))
        self.next = follows

    def _check_sizes(self, changes: Mapping[str, bytes | None]) -> None:
        """Raises RecordTooLarge where an entry has grown above what the changelog takes: what made it grow becomes a
        dead letter, and the entry stays as it was."""
        for key, value in changes.items():
            if len(key.encode()) + len(value or b"") + OVERHEAD > self._log.max_record_bytes:
                raise RecordTooLarge(
                    f"what {self._name!r} knows under {key!r} would have {len(value or b''):,} bytes, and its "
                    f"changelog takes {self._log.max_record_bytes:,} (log.max_record_bytes): no more of it is taken"
                )

    def close(self) -> None:
        """Let go of it; whatever is committed stays."""
        self._writer.close()
        self._state.close()


def check_changelog(log: KafkaLog, handler: str, topic: str) -> int:
    """How many partitions ``topic`` has. Raises LogError where the handler's changelog has not as many."""
    wanted, found = log.partitions(topic), log.partitions(CHANGELOG + handler)
    if found != wanted:
        raise LogError(
            f"the topic {topic!r} has {wanted} partitions, and {CHANGELOG + handler!r} {found}: each has a state of "
            "its own, so they have to be as many. 'everloop topics apply --add-partitions' makes them so, and moves "
            "the states ('Add partitions' in docs/operations.md)"
        )
    return wanted
