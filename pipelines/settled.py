"""What assembly remembers of an episode, for how long, and how what it let go comes back.

::

    open       its events lie in the state          nothing came for ``settle``, the store has every event ─▶ settled
    settled    a mark in the state: count and days  an event comes: they are read back from the store ─▶ open
                                                    nothing came for ``forget`` ─▶ forgotten
    forgotten  nothing; an event that still comes lies in the store's view ``events`` and changes nothing more

So the state holds the events of ``settle``'s span, and about a hundred bytes for each episode of ``forget``'s. An
episode is settled only once each of its events was found in the store, so a store that is behind delays it.

When an episode is to be looked at again stands in the state too, under steps of time: each look takes those of the
steps that have passed, at most so many. Times are the handler's ``now``: when something came, not when it happened.

Where partitions were added, an episode may be in another one than its first events. Their offsets are then set below
all that the new partition has (:func:`moved`), and since the store knows only what they were, it is not settled again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import ormsgpack
from everloop.config import AssembleConfig
from everloop.section import seconds
from everloop.stream import State

from pipelines.store import Store
from pipelines.tables import day_of

logger = logging.getLogger(__name__)
STEP = 10.0  # seconds
LOOK_EVERY = 30.0  # seconds between two looks
AT_ONCE = 20_000  # episodes of one look: 666 a second, day in, day out
AGAIN = 60.0  # seconds until an episode whose events are not all in the store is looked at again
EARLIER = 2**48
"""Taken from offsets of a partition that an episode was in before; more than any offset."""
PASSED = "\npassed"
DUE = "\ndue/"


class Known(NamedTuple):
    """What the state remembers of an episode.

    ``events`` are those in the state, each by its offset in the log and its id. ``settled`` counts those that lie in
    the store alone, up to the offset ``last``: the store may be ahead of assembly and have later ones too. ``days``
    are the store's days that any of the episode's events lie under. ``touched``: when the last one came.
    """

    touched: float
    events: Sequence[tuple[int, str]] = ()
    settled: int = 0
    last: int = -1
    days: Sequence[str] = ()

    def has(self, event: str) -> bool:
        return any(name == event for _, name in self.events)

    def place(self, event: str, offset: int) -> int | None:
        """The offset of a settled event, from what the store has; None: it came after settling."""
        if self.last < EARLIER:
            return offset if offset <= self.last else None
        return None if self.has(event) else offset - EARLIER

    @property
    def settles(self) -> bool:
        """Whether the store's offsets, at the end, say which events it has."""
        return all(offset >= 0 for offset, _ in self.events)


def known(state: State, key: str) -> Known | None:
    """None: nothing has come of this episode, or it is forgotten."""
    held = state.get(key)
    return None if held is None else _unpacked(held)


def _unpacked(value: bytes) -> Known:
    """What a later release has put behind these fields is left out: workers of both run while one is replaced."""
    return Known(*ormsgpack.unpackb(value)[: len(Known._fields)])


def entry(key: str, event: str) -> str:
    """Where an event's envelope lies in the state."""
    return f"{key}\n{event}"


class Memory:
    """The episodes in the state of the handler "assemble". Keeps nothing itself but an open store."""

    def __init__(self, config: AssembleConfig, open_store: Callable[[], Store]) -> None:
        self._settle, self._forget = seconds(config.settle), seconds(config.forget)
        self._open_store = open_store
        self._opened: Store | None = None
        self._looked = 0.0

    def take(self, state: State, key: str, offset: int, event: str, time: float, envelope: bytes, now: float) -> bool:
        """Add an event of the given event time; False where it is known already, as far as the state can tell."""
        held = known(state, key)
        if held is not None and held.has(event):
            return False
        state.put(entry(key, event), envelope)
        if held is None or not held.events:
            _schedule(state, key, now + self._settle)
        held = held or Known(now)
        days = held.days if (day := day_of(time)) in held.days else (*held.days, day)
        state.put(key, _packed(held._replace(touched=now, events=(*held.events, (offset, event)), days=days)))
        return True

    def recall(self, state: State, keys: Iterable[str]) -> dict[str, bool]:
        """Bring settled episodes among these back into the state; returns for each whether anything new had come."""
        wanted = {key: held for key in keys if (held := known(state, key)) is not None and held.settled}
        if not wanted:
            return {}
        stored: dict[str, dict[str, int]] = {key: {} for key in wanted}
        for key, event, offset, envelope in self._store.events_of(wanted, _days(wanted.values())):
            place = wanted[key].place(event, offset)
            if place is not None:
                stored[key][event] = place
                state.put(entry(key, event), envelope)
        for key, held in wanted.items():
            new = [(offset, event) for offset, event in held.events if event not in stored[key]]
            if len(stored[key]) < held.settled:
                logger.warning("%s: %d of its events are no longer in the store", key, held.settled - len(stored[key]))
            events = [*((offset, event) for event, offset in stored[key].items()), *new]
            state.put(key, _packed(Known(held.touched, events, days=held.days)))
        return {key: any(event not in stored[key] for _, event in held.events) for key, held in wanted.items()}

    def look(self, state: State, now: float) -> None:
        """Settle and forget what is due; does nothing where the last look was just now."""
        if abs(now - self._looked) < LOOK_EVERY:
            return
        self._looked = now
        idle: dict[str, Known] = {}
        for key in _passed(state, now):
            held = known(state, key)
            if held is None:
                continue
            end = held.touched + (self._settle if held.events else self._forget)
            if end > now:
                _schedule(state, key, end)
            elif held.events:
                idle[key] = held
            else:
                state.delete(key)
        self._settle_stored(state, idle, now)

    def _settle_stored(self, state: State, idle: dict[str, Known], now: float) -> None:
        if not idle:
            return
        stored = self._store.events_held(idle, _days(idle.values()))
        for key, held in idle.items():
            late = any((key, event) not in stored for _, event in held.events)
            forget = held.touched + self._forget
            if forget > now and (late or not held.settles):
                _schedule(state, key, now + AGAIN if late else forget)
                continue
            for _, event in held.events:
                state.delete(entry(key, event))
            if forget <= now:
                state.delete(key)
                continue
            last = max(offset for offset, _ in held.events)
            state.put(key, _packed(Known(held.touched, (), len(held.events), last, held.days)))
            _schedule(state, key, forget)

    @property
    def _store(self) -> Store:
        if self._opened is None:
            self._opened = self._open_store()
        return self._opened


def route_of(key: str) -> str | None:
    """See :class:`everloop.stream.Movable`: the episode's key."""
    if key == PASSED:
        return None
    return key.removeprefix(DUE).partition("/")[2] if key.startswith(DUE) else key.partition("\n")[0]


def moved(key: str, value: bytes) -> bytes:
    """See :class:`everloop.stream.Movable`: all that an episode has came before what its new partition will have."""
    if "\n" in key:
        return value
    held = _unpacked(value)
    events = [(offset - EARLIER, event) for offset, event in held.events]
    return _packed(held._replace(events=events, last=EARLIER if held.settled else -1))


def joined(key: str, values: Sequence[bytes]) -> bytes:
    """See :class:`everloop.stream.Movable`: the steps that all have passed."""
    return str(min(map(int, values))).encode()


def _packed(held: Known) -> bytes:
    return ormsgpack.packb(tuple(held))


def _days(episodes: Collection[Known]) -> list[str]:
    return sorted({day for held in episodes for day in held.days})


def _schedule(state: State, key: str, time: float) -> None:
    state.put(f"{DUE}{int(time // STEP) + 1:012d}/{key}", b"")


def _passed(state: State, now: float) -> list[str]:
    """The episodes of the steps that have passed since the last look, at most so many; they are taken off the list."""
    current = int(now // STEP)
    held = state.get(PASSED)
    step = current if held is None else min(int(held), current)  # a clock that was set back begins from where it is
    found: list[str] = []
    while step <= current and len(found) < AT_ONCE:
        prefix = f"{DUE}{step:012d}/"
        for name, _ in state.scan(prefix):
            if len(found) == AT_ONCE:
                break
            state.delete(name)
            found.append(name.removeprefix(prefix))
        else:
            step += 1
    state.put(PASSED, str(min(step, current)).encode())
    return found
