"""Sets a handler back: it handles the log again from a time on, and its state stays as it is.

Where its offsets are kept decides how:

- by itself on all partitions (the embedded log; ``archive`` on both): in its own file, ``state/<handler>.db``
- shared by workers on Kafka: in the changelog of each partition, with the group's offset, in one transaction

Nothing else changes. What the records give is the same as before, by the same ids; a handler that knows a record by
its id passes it over. So a replay brings what a handler could not take, or what was lost of its output, and no more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextlib import closing

from everloop.errors import EverloopError
from everloop.home import Home
from everloop.log.base import Log, TopicPartition
from everloop.log.kafka.log import KafkaLog
from everloop.topics import EPISODES, EVENTS, HANDLERS, TOPICS

from services.changelog import Changelog, writer_name
from services.state import StateStore, owned

REPLAYED = {
    "assemble": (EVENTS.name,),
    "score": (EPISODES.name,),
    "signals": (EPISODES.name,),
    "judge": (EPISODES.name,),
    "archive": tuple(TOPICS),
}
"""The topics of each handler that can be set back."""

Back = dict[TopicPartition, tuple[int, int]]
"""By partition: the offset that was the next, and the one that is now."""


class NotReplayed(EverloopError):
    """Why a handler is left as it is, and what to do."""


def rewind(log: Log, home: Home, handler: str, time: float, now: float) -> Back:
    """Have a handler that does not run handle again what has this event time or a later one; times in seconds.

    Partitions in which there is nothing of the kind are left as they are, and out of the answer. Raises NotReplayed.
    """
    topics = _topics(handler)
    if time > now:
        raise NotReplayed(f"the time lies {time - now:.0f} s ahead: there is nothing to replay yet")
    if isinstance(log, KafkaLog) and handler in HANDLERS:
        return _shared(log, handler, topics[0], time)
    return _alone(log, home, handler, topics, time)


def _topics(handler: str) -> tuple[str, ...]:
    if handler in REPLAYED:
        return REPLAYED[handler]
    known = ", ".join(REPLAYED)
    if handler == "learn":
        raise NotReplayed(
            "'learn' counts what it reads and takes orders from it, so that a replay would count twice and train again."
            f" These can be replayed: {known}"
        )
    raise NotReplayed(f"there is no handler {handler!r}; these can be replayed: {known}")


def _alone(log: Log, home: Home, handler: str, topics: Iterable[str], time: float) -> Back:
    path = home.root / "state" / f"{handler}.db"
    if not path.exists():
        raise NotReplayed(f"{handler!r} has handled nothing here: there is no {path}")
    at_once = threading.Event()
    at_once.set()
    with owned(path, at_once) as mine:
        if not mine:
            raise NotReplayed(f"{handler!r} runs: end the platform first (Ctrl-C where 'everloop up' runs)")
        with closing(StateStore(path)) as state:
            back = _back(log, {at: n for at, n in state.offsets().items() if at[0] in set(topics)}, time)
            state.commit({at: to for at, (_, to) in back.items()})
            return back


def _shared(log: KafkaLog, handler: str, topic: str, time: float) -> Back:
    refuse_while_it_runs(log, handler)
    done: Back = {}
    for number in range(log.partitions(topic)):
        source = (topic, number)
        with closing(log.fenced(writer_name(handler, source))) as writer:  # before its mark is read
            changelog = Changelog(log, handler, source)
            back = _back(log, {source: changelog.next()}, time)
            for _, to in back.values():
                writer.write([], placed=changelog.written({}, to).placed, offsets={source: to}, group=handler)
            done |= back
    return done


def _back(log: Log, following: Mapping[TopicPartition, int], time: float) -> Back:
    wanted = {at: (offset, log.offset_at(*at, time)) for at, offset in following.items()}
    return {at: (offset, to) for at, (offset, to) in wanted.items() if to < offset}


def refuse_while_it_runs(log: KafkaLog, handler: str) -> None:
    """Raises NotReplayed where a group has members: they would go on from where they are."""
    members = log.cluster.members(handler)
    if members:
        raise NotReplayed(
            f"the group {handler!r} has {members} member{'s' * (members > 1)}, running or ended less than 6 s ago: end "
            f"'everloop up' and every 'everloop worker {handler}' first"
        )
