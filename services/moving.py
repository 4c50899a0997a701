"""Adds partitions to topics whose handlers have a state for each, and moves the states after their keys.

::

    no worker runs, nothing waits ─▶ changelog gets partitions ─▶ entries move, some in each transaction ─▶ source gets
    (else it is refused)                 └───── the two differ in number: no worker starts ─────┘           as many

So a kill at any moment leaves workers that refuse to start, and the next call goes on where this one stopped. An entry
leaves its old partition in the transaction that brings it to its new one. Memory: the state of one partition.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import NamedTuple

from everloop.errors import EverloopError
from everloop.log.base import TopicPartition, partition_of
from everloop.log.kafka.log import KafkaLog
from everloop.stream import Movable
from everloop.topics import CHANGELOG, EPISODES, EVENTS

from services.changelog import Changelog, writer_name
from services.rewind import refuse_while_it_runs
from services.unit import Behind

logger = logging.getLogger(__name__)
SHARED = {
    "assemble": (EVENTS.name, "pipelines.assemble", "Assembler"),
    "score": (EPISODES.name, "reward.handler", "RewardHandler"),
}
"""By handler: its topic, and the class that knows its state."""
AT_ONCE, AT_ONCE_BYTES = 500, 8_388_608  # entries of one transaction, and bytes in them
LOOK_SECONDS = 2.0  # for which nothing must come to a topic


class NotMoved(EverloopError):
    """Why no partition is added, and what to do."""


class Growth(NamedTuple):
    """``entries``: of the handler's state, how many went to another partition. ``late``: records that came meanwhile;
    what they are of may be in two pieces."""

    handler: str
    topic: str
    partitions: int
    entries: int
    late: int


def grow(log: KafkaLog) -> list[Growth]:
    """Give each handler's topic and changelog the partitions that are declared. Raises NotMoved before any change."""
    wanted = {handler: found for handler, (topic, _, _) in SHARED.items() if (found := _wanted(log, handler, topic))}
    found = {handler: _drained(log, handler, SHARED[handler][0]) for handler in wanted}
    if wanted:
        time.sleep(LOOK_SECONDS)
    for handler, its in found.items():
        topic = SHARED[handler][0]
        if log.end_offsets(topic) != its.ends:
            raise NotMoved(f"records come to {topic!r}: take the gateways down first, and wait until nothing waits")
    return [_grow(log, handler, count, found[handler]) for handler, count in wanted.items()]


def _wanted(log: KafkaLog, handler: str, topic: str) -> int:
    """How many partitions both topics should have; 0 where they have them, or are not there yet."""
    changelog = CHANGELOG + handler
    found = log.cluster.describe([topic, changelog])
    if len(found) < 2:
        return 0
    both = {found[topic].partitions, found[changelog].partitions}
    count = max(log.declared(topic).partitions, *both)
    return count if both != {count} else 0


class Drained(NamedTuple):
    """A topic to which nothing comes: the ends of its partitions, and how many records wait all the same."""

    ends: list[int]
    waiting: int


def _drained(log: KafkaLog, handler: str, topic: str) -> Drained:
    """A topic whose handler does not run. Raises NotMoved where it has something to do: but not where a call was cut
    short, since no worker starts then to do it."""
    refuse_while_it_runs(log, handler)
    sources: list[TopicPartition] = [(topic, number) for number in range(log.partitions(topic))]
    places = log.partitions(CHANGELOG + handler)
    following = {at: Changelog(log, handler, at).next() if at[1] < places else 0 for at in sources}
    waiting = sum(Behind(log)(following).values())
    if waiting and places <= len(sources):
        raise NotMoved(
            f"{handler!r} has {waiting} records of {topic!r} to go: run 'everloop worker {handler}' until "
            "everloop_handler_lag_records is 0, end it, and try again"
        )
    return Drained(log.end_offsets(topic), waiting)


def _grow(log: KafkaLog, handler: str, count: int, before: Drained) -> Growth:
    topic, module, name = SHARED[handler]
    if log.partitions(CHANGELOG + handler) < count:
        log.cluster.add_partitions(CHANGELOG + handler, count)
    moved = move(log, handler, topic, count, getattr(importlib.import_module(module), name))
    late = sum(log.end_offsets(topic)) - sum(before.ends) + before.waiting
    if log.partitions(topic) < count:
        log.cluster.add_partitions(topic, count)
    return Growth(handler, topic, count, moved, late)


def move(log: KafkaLog, handler: str, topic: str, count: int, its: Movable) -> int:
    """Bring every entry of a handler's state to the partition that its key has among ``count``; how many moved."""
    for number in range(count):
        log.fenced(writer_name(handler, (topic, number))).close()  # a worker that was paused writes no more
    before = log.partitions(topic)
    logs = [Changelog(log, handler, (topic, number)) for number in range(count)]
    follows = [one.next() for one in logs]
    moved, whole, odd = 0, dict[str, list[bytes]](), list[tuple[int, int, dict[str, bytes]]]()
    with closing(log.fenced(f"{handler}-moving")) as writer:

        def bring(number: int, to: int, entries: Mapping[str, bytes]) -> int:
            for some in _pieces(entries):
                arrive = logs[to].written(some, follows[to])
                leave = logs[number].written(dict.fromkeys(some), follows[number])
                writer.write([], placed=[*arrive.placed, *leave.placed])
            return len(entries)

        for number, one in enumerate(logs):
            strays = _strays(one, number, (before, count), its, whole)
            moved += sum(bring(number, to, entries) for to, entries in strays.due.items())
            odd += [(number, to, entries) for to, entries in strays.odd.items()]
        for number, to, entries in odd:
            moved += bring(number, to, _without_a_double(logs[to], entries))
        for key, values in whole.items():
            change = {key: its.joined(key, values)}
            placed = [one.written(change, follows[number]).placed for number, one in enumerate(logs)]
            writer.write([], placed=[record for each in placed for record in each])
    return moved


class Strays(NamedTuple):
    """Entries that lie elsewhere than they will, by the partition where they belong. ``due``: they lie where their
    records came until now. ``odd``: they do not, so that their key may have another entry, which is the true one."""

    due: dict[int, dict[str, bytes]]
    odd: dict[int, dict[str, bytes]]


def _strays(
    changelog: Changelog, number: int, counts: tuple[int, int], its: Movable, whole: dict[str, list[bytes]]
) -> Strays:
    """``counts``: partitions before and now. ``whole`` takes entries of no key."""
    found = Strays({}, {})
    for key, value in dict(changelog.changes()).items():
        if value is None:
            continue
        route = its.route_of(key)
        if route is None:
            whole.setdefault(key, []).append(value)
            continue
        was, to = (partition_of(route, count) for count in counts)
        if to != number:
            (found.due if was == number else found.odd).setdefault(to, {})[key] = its.moved(key, value)
    return found


def _without_a_double(changelog: Changelog, entries: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those of the entries of which there is none where they belong; the others stay where nobody looks for them."""
    there: dict[str, bytes | None] = {key: value for key, value in changelog.changes() if key in entries}
    doubles = {key for key, value in there.items() if value is not None}
    if doubles:
        logger.warning("%d entries lie where they do not belong, and are there already: left alone", len(doubles))
    return {key: value for key, value in entries.items() if key not in doubles}


def _pieces(entries: Mapping[str, bytes]) -> Iterator[dict[str, bytes]]:
    piece, size = dict[str, bytes](), 0
    for key, value in entries.items():
        if piece and (len(piece) >= AT_ONCE or size + len(value) > AT_ONCE_BYTES):
            yield piece
            piece, size = {}, 0
        piece[key] = value
        size += len(value)
    if piece:
        yield piece
