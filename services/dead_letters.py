"""Dead letters: records that a handler could never take. Made by ``services/stream.py``; listed and replayed here.

Replaying appends the original bytes to the original topic under the original key, route and headers, and in the same
append the letter again, now marked as replayed. Every handler of that topic sees the record once more, so handlers
take duplicates by id. A marked letter is left alone unless replaying it again is asked for.
"""

from __future__ import annotations

import hashlib
import logging
import traceback
from collections.abc import Collection, Iterator

from everloop import wire
from everloop.episode import Episode
from everloop.errors import ContractError, EverloopError
from everloop.log.base import Log, NewRecord, Record
from everloop.run import DeadLetter
from everloop.topics import DEAD_LETTERS, EPISODES
from everloop.wire import BlobStore

logger = logging.getLogger(__name__)
REPLAY_OF = "replay-of"
"""Header of a replayed record: the id of its dead letter."""


def dead_letter(handler: str, record: Record, error: Exception, now: float, blobs: BlobStore) -> list[NewRecord]:
    """What to append for a record that ``handler`` refused with ``error``; the same id each time it is refused.

    Nothing for a dead letter itself: a reader of that topic that cannot take one would go on without end.
    """
    if record.topic == DEAD_LETTERS.name:
        return []
    position = f"{handler}/{record.topic}/{record.partition}/{record.offset}"
    letter = DeadLetter(
        id="dl_" + hashlib.sha256(position.encode()).hexdigest()[:26],
        handler=handler,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        record_key=record.key,
        headers=dict(record.headers),
        value=record.value,
        cause=f"{type(error).__name__}: {error}",
        stack="".join(traceback.format_exception(error)),
        time=now,
    )
    return [_record(letter, blobs)]


def _record(letter: DeadLetter, blobs: BlobStore) -> NewRecord:
    headers = {"schema": type(letter).__name__, "id": letter.id}
    return NewRecord(DEAD_LETTERS.name, letter.key, wire.encode(letter, blobs), headers)


def dead_letters(log: Log, blobs: BlobStore, *, handler: str | None = None) -> list[DeadLetter]:
    """Every dead letter that the log still holds, newest version of each, oldest letter first."""
    newest: dict[str, DeadLetter] = {}
    for partition in range(log.partitions(DEAD_LETTERS.name)):
        for letter in _letters(log, blobs, partition):
            if handler in (None, letter.handler):
                newest[letter.id] = letter
    return sorted(newest.values(), key=lambda letter: (letter.time, letter.id))


def _letters(log: Log, blobs: BlobStore, partition: int) -> Iterator[DeadLetter]:
    offset = 0
    while records := log.read(DEAD_LETTERS.name, partition, offset):
        for record in records:
            try:
                yield wire.decode(DeadLetter, record.value or b"", blobs)
            except ContractError as error:
                logger.warning("dead letter at offset %d is unreadable: %s", record.offset, error)
        offset = records[-1].offset + 1


def replay(
    log: Log,
    blobs: BlobStore,
    now: float,
    *,
    ids: Collection[str] | None = None,
    handler: str | None = None,
    again: bool = False,
) -> list[DeadLetter]:
    """Append the original records of dead letters again; returns the letters, marked with ``now``.

    ``ids`` None means all (of ``handler``). Letters that were replayed before are left out unless ``again``.

    Raises:
        EverloopError: there is no dead letter of one of the ids.
    """
    known = dead_letters(log, blobs, handler=handler)
    missing = set(ids or ()) - {letter.id for letter in known}
    if missing:
        raise EverloopError(f"no dead letter {', '.join(sorted(missing))}: 'everloop dead-letters list' shows them")
    chosen = [letter for letter in known if (ids is None or letter.id in ids) and (again or letter.replayed is None)]
    marked = [letter.model_copy(update={"replayed": now}) for letter in chosen]
    for letter in marked:
        headers = {**letter.headers, REPLAY_OF: letter.id}
        original = NewRecord(letter.topic, letter.record_key, letter.value, headers, route=_route(letter, blobs))
        log.append([original, _record(letter, blobs)])
    return marked


def _route(letter: DeadLetter, blobs: BlobStore) -> str:
    """Of the original record, which the log does not keep. An episode that cannot be read has none: nobody takes it,
    wherever it lies."""
    if letter.topic != EPISODES.name:
        return ""
    try:
        return wire.decode(Episode, letter.value or b"", blobs).route
    except ContractError:
        return ""
