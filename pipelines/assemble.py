"""Events to episodes and trajectories: the same final state from events in any order, late, twice, revised.

The state of an episode is the set of its distinct events by id, each with its place in the log. Nothing is
folded in place: whenever a batch brought something new, the episode is assembled afresh from all of its events
and written as a new version. So a duplicate changes nothing, feedback may come before the call that it is about
or a month after the end, and a rebuild from the log gives the same versions. Episodes that nothing came of for long
are let go, and read back from the store when something does (:mod:`pipelines.settled`).

Order comes from numbers (``seq``) where the producer gave them, else from the log; clocks order nothing.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from everloop import wire
from everloop.config import Config, HoldoutConfig
from everloop.episode import Episode, Split, Turn
from everloop.errors import ConfigError, ContractError
from everloop.event import Call, Ended, Event, FeedbackGiven, ToolResult
from everloop.feedback import Feedback, settle
from everloop.home import Home
from everloop.log.base import NewRecord, Record
from everloop.stream import State
from everloop.topics import EPISODES, EVENTS, TRAJECTORIES
from everloop.trajectory import Trajectory

from pipelines import settled
from pipelines.gold import GoldSet
from pipelines.holdout import split_of, touches, user_texts
from pipelines.settled import Memory, entry, known
from pipelines.store import Store
from pipelines.trajectories import doubt, sequences

logger = logging.getLogger(__name__)

Splitter = Callable[[str, str, str, Sequence[Call]], Split]
"""(tenant, policy, unit, calls in order) to the use of an episode; the unit is the subject, else the episode."""


class Placed(NamedTuple):
    """An event and its offset in the log."""

    offset: int
    event: Event


class Assembled(NamedTuple):
    episode: Episode
    trajectory: Trajectory


def in_order(placed: Iterable[Placed]) -> list[Event]:
    """The events of an episode in their order.

    Numbered ones stand by number (a tie, such as several answers to one request, by choice and id); one without
    a number stands after the numbered event that it followed in the log.
    """
    keyed: list[tuple[tuple[int, int, int, str], Event]] = []
    followed = -1
    for offset, event in sorted(placed, key=lambda item: item.offset):
        choice = event.payload.choice if isinstance(event.payload, Call) else 0
        if event.seq is not None:
            followed = event.seq
            keyed.append(((event.seq, 0, choice, event.id), event))
        else:
            keyed.append(((followed, 1, offset, event.id), event))
    keyed.sort(key=lambda item: item[0])
    return [event for _, event in keyed]


def assemble(placed: Iterable[Placed], split: Splitter) -> list[Assembled]:
    """The episode that these events make, once for each policy that was called in it; nothing before the first call.

    A policy is the unit of the loop, so where an agent calls two policies in one episode, each gets its own calls
    under the same episode id, and what was said about the episode as a whole goes to both.
    """
    events = in_order(placed)
    calls = _calls(events)
    policies = list(dict.fromkeys(event.policy for event in calls.values()))
    tools = _tools_by_call(events, list(calls))
    return [_of_policy(policy, events, calls, tools, policies, split) for policy in policies]


def _calls(events: Sequence[Event]) -> dict[str, Event]:
    """The first event of each call, by the call's id, in order."""
    calls: dict[str, Event] = {}
    for event in events:
        if isinstance(event.payload, Call):
            calls.setdefault(event.payload.id, event)
    return calls


def _tools_by_call(events: Sequence[Event], calls: Sequence[str]) -> dict[str, list[ToolResult]]:
    """Tool results under the call that asked for them, else the call before them, else the first."""
    found: dict[str, list[ToolResult]] = defaultdict(list)
    known = frozenset(calls)
    before = calls[0] if calls else ""
    for event in events:
        payload = event.payload
        if isinstance(payload, Call):
            before = payload.id
        elif isinstance(payload, ToolResult):
            found[payload.call if payload.call in known else before].append(payload)
    return found


def _of_policy(
    policy: str,
    events: Sequence[Event],
    calls: dict[str, Event],
    tools: dict[str, list[ToolResult]],
    policies: Sequence[str],
    split: Splitter,
) -> Assembled:
    own = {name: event for name, event in calls.items() if event.policy == policy}
    made = [event.payload for event in own.values() if isinstance(event.payload, Call)]
    first = next(iter(own.values()))
    subject = next((event.subject for event in own.values() if event.subject is not None), None)
    about = _feedback(events, own, policy, policies)
    episode = Episode(
        tenant=first.tenant,
        policy=policy,
        id=first.episode,
        version=len(events),
        subject=subject,
        started=min(event.time for event in events),
        updated=max(event.time for event in events),
        complete=_complete(events),
        synthetic=any(event.synthetic for event in events),
        split=split(first.tenant, policy, subject or first.episode, made),
        turns=tuple(_turn(call, tools.get(call.id, ()), about.get(call.id, ())) for call in made),
        feedback=tuple(about.get(None, ())),
        quarantine=next((why for call in made if (why := doubt(call)) is not None), None),
    )
    return Assembled(episode, _trajectory(episode, made))


def _turn(call: Call, tools: Sequence[ToolResult], about: Sequence[Feedback]) -> Turn:
    return Turn(call=call.model_copy(update={"tokens": None}), tools=tuple(tools), feedback=tuple(about))


def _trajectory(episode: Episode, calls: Sequence[Call]) -> Trajectory:
    return Trajectory(
        tenant=episode.tenant,
        policy=episode.policy,
        episode=episode.id,
        version=episode.version,
        subject=episode.subject,
        synthetic=episode.synthetic,
        sequences=sequences(calls),
    )


def _feedback(
    events: Sequence[Event], own: dict[str, Event], policy: str, policies: Sequence[str]
) -> dict[str | None, list[Feedback]]:
    """Settled feedback by the call of this policy that it is about; None: the episode as a whole.

    Words about a call that has not arrived wait in the state.
    """
    words = [
        event.payload.feedback
        for event in events
        if isinstance(event.payload, FeedbackGiven)
        and (event.payload.feedback.call is not None or event.policy == policy or event.policy not in policies)
    ]
    about: dict[str | None, list[Feedback]] = defaultdict(list)
    for word in settle(words):
        if word.call is None or word.call in own:
            about[word.call].append(word)
    return about


def _complete(events: Sequence[Event]) -> bool:
    """Whether the agent ended it and every event that it numbered is here; an unknown count hides nothing missing."""
    ends = [event.payload for event in events if isinstance(event.payload, Ended)]
    if not ends:
        return False
    numbers = {event.seq for event in events if event.seq is not None and not isinstance(event.payload, Ended)}
    return len(numbers) >= max((end.events or 0) for end in ends)


class Assembler:
    """The handler "assemble": topic ``events`` to topics ``episodes`` and ``trajectories``.

    State: under ``<tenant>/<episode>`` what is known of it, and under ``<tenant>/<episode>\\n<event id>`` the envelope
    of each of its events as it lay in the log. The first event of an id counts.
    """

    name = "assemble"
    topics: tuple[str, ...] = (EVENTS.name,)
    route_of, moved = staticmethod(settled.route_of), staticmethod(settled.moved)
    joined = staticmethod(settled.joined)

    def __init__(self, config: Config, home: Home) -> None:
        self._config = config
        self._blobs = home.blobs
        self._gold = GoldSet(home.root / "gold")
        self._memory = Memory(config.assemble, lambda: Store(home.root / "store", blobs=home.blobs))
        # They speak of the present batch alone. What counts is the state: these only name and spare work.
        self._changed: dict[str, None] = {}
        self._fresh: dict[str, Event] = {}
        self._gold_keys: dict[tuple[str, str], dict[str, Split]] = {}

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        event = read(record, self._blobs)
        time = event.time or record.time  # as the archive names its day
        if self._memory.take(state, event.key, record.offset, event.id, time, record.value or b"", now):
            self._fresh[entry(event.key, event.id)] = event
            self._changed[event.key] = None
        return []

    def flush(self, state: State, now: float) -> list[NewRecord]:
        recalled = self._memory.recall(state, self._changed)
        keys = [key for key in self._changed if recalled.get(key, True)]
        made = [one for key in keys for one in assemble(self._placed(state, key, key in recalled), self._split)]
        records = [record for one in made for record in self._records(one)]
        self._memory.look(state, now)
        self._changed, self._fresh, self._gold_keys = {}, {}, {}  # only now: a flush that failed is tried again
        return records

    def _placed(self, state: State, key: str, recalled: bool) -> Iterator[Placed]:
        """Its events, those of this batch as they were read; of a recalled episode, as the store gave them."""
        held = known(state, key)
        for offset, name in () if held is None else held.events:
            at = entry(key, name)
            try:
                fresh = None if recalled else self._fresh.get(at)
                yield Placed(offset, fresh or self._read(state.get(at)))
            except ContractError as error:
                # It was an event when it was taken: its body has been removed since. The rest still stands.
                logger.warning("event %s of %s is left out: %s", name, key, error)

    def _read(self, envelope: bytes | None) -> Event:
        return wire.decode(Event, envelope or b"", self._blobs)

    def _records(self, made: Assembled) -> tuple[NewRecord, NewRecord]:
        episode, trajectory = made
        about = f"{episode.policy}/{episode.id}/{episode.version}"
        return (
            NewRecord(
                EPISODES.name,
                episode.key,
                wire.encode(episode, self._blobs),
                {"schema": "Episode", "id": about},
                episode.updated,
                route=episode.route,
            ),
            NewRecord(
                TRAJECTORIES.name,
                trajectory.key,
                wire.encode(trajectory, self._blobs),
                {"schema": "Trajectory", "id": about},
                episode.updated,
            ),
        )

    def _split(self, tenant: str, policy: str, unit: str, calls: Sequence[Call]) -> Split:
        keys = self._gold_keys.get((tenant, policy))
        if keys is None:
            keys = self._gold_keys[tenant, policy] = self._gold.keys(tenant, policy)
        held = touches((call.messages for call in calls), keys)
        if held is not None:
            return held
        texts = user_texts(calls[0].messages)
        return split_of(tenant, policy, unit, texts[0] if texts else "", self._shares(tenant, policy))

    def _shares(self, tenant: str, policy: str) -> HoldoutConfig:
        try:
            return self._config.policy(tenant, policy).holdout
        except ConfigError:  # a policy that was taken out of the configuration: its events are kept as they were
            return HoldoutConfig()


def read(record: Record, blobs: wire.BlobStore) -> Event:
    """The event in a record.

    Raises:
        ContractError: it is no event, lies under another episode's key, or has a time that is no time.
    """
    if record.value is None:
        raise ContractError("an event has no value; events are never deleted by tombstone")
    event = wire.decode(Event, record.value, blobs)
    if event.key != record.key:
        raise ContractError(f"event {event.id} of {event.key} lies under the key {record.key}; it cannot join either")
    if not math.isfinite(event.time) or event.time < 0:
        raise ContractError(f"event {event.id} has the time {event.time}, not seconds since 1970")
    return event
