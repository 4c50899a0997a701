"""A log, the assembler and a handler under test, run in turns until nothing more comes of anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.config import Config
from everloop.episode import Episode
from everloop.event import Call, Event, FeedbackGiven, Message
from everloop.feedback import Feedback
from everloop.home import Home
from everloop.log import connect
from everloop.log.base import NewRecord
from everloop.stream import Handler
from everloop.topics import EPISODES, EVENTS

from pipelines.assemble import Assembler
from services.stream import run_handler

NOON = 1_763_900_000.0
ROUNDS = 8  # of assembly and handler, in which all must have come to rest


class Bench:
    """``said`` are the events of the handler alone, in order; ``episodes`` the newest version of each."""

    def __init__(self, home: Home, declaration: str, make: Callable[[Config, Home], Handler]) -> None:
        path = home.root / "reward.toml"
        home.folder()
        path.write_text(declaration)
        policies = {"desk": {"reward": {"declaration": str(path)}}, "other": {}}
        self.config = Config.model_validate({"home": str(home.root), "tenants": {"acme": {"policies": policies}}})
        self.home = home
        self.log = connect(f"sqlite:///{home.root}/log.db")
        self._make = make
        self.handler = make(self.config, home)
        self.state = home.folder("state")

    def call(self, id: str, asked: str, answer: str, *, episode: str = "ep_1", **fields: Any) -> Event:
        own = {name: fields.pop(name) for name in ("tools", "error", "choice", "messages") if name in fields}
        output = Message(role="assistant", content=answer, tool_calls=fields.pop("tool_calls", None))
        call = Call(id=id, **{"messages": (Message(role="user", content=asked),), "output": output, **own})
        return self.event(call, id, episode=episode, **fields)

    def word(self, id: str, *, episode: str = "ep_1", time: float = NOON, **fields: Any) -> Event:
        word = Feedback(**{"id": id, "time": time, "rater": "rita", **fields})
        return self.event(FeedbackGiven(feedback=word), id, episode=episode, time=time)

    def event(self, payload: Any, id: str, **fields: Any) -> Event:
        fields = {"tenant": "acme", "policy": "desk", "episode": "ep_1", "time": NOON, **fields}
        return Event(id=id, payload=payload, **fields)

    def take(self, *events: Event) -> None:
        """Append, and run both handlers in turns until neither has anything new to say."""
        self.log.append([NewRecord(EVENTS.name, one.key, wire.encode(one), {"id": one.id}, one.time) for one in events])
        for _ in range(ROUNDS):
            before = self._ends()
            run_handler(Assembler(self.config, self.home), self.log, self.state, until_idle=True)
            run_handler(self.handler, self.log, self.state, until_idle=True)
            if self._ends() == before:
                return
        pytest.fail(f"{ROUNDS} rounds, and there is still something new: it answers its own words")

    def again(self) -> None:
        """A new process whose state was lost: everything is handled once more."""
        self.handler = self._make(self.config, self.home)
        for path in self.state.glob(f"{self.handler.name}.db*"):
            path.unlink()
        self.take()

    def _ends(self) -> list[int]:
        return [*self.log.end_offsets(EVENTS.name), *self.log.end_offsets(EPISODES.name)]

    def _all(self, topic: str, contract: Any) -> Iterator[Any]:
        for partition in range(self.log.partitions(topic)):
            for record in self.log.read(topic, partition, 0, 10_000):
                yield wire.decode(contract, record.value or b"")

    @property
    def said(self) -> list[Event]:
        found = (one for one in self._all(EVENTS.name, Event) if isinstance(one.payload, FeedbackGiven))
        return [one for one in found if one.payload.feedback.source is not None]

    @property
    def episodes(self) -> dict[str, Episode]:
        return {one.id: one for one in self._all(EPISODES.name, Episode)}

    def words(self, call: str, episode: str = "ep_1") -> dict[str, tuple[str, float | None]]:
        """What stands of a call by source: kind and value."""
        turn = next(one for one in self.episodes[episode].turns if one.call.id == call)
        return {word.source: (str(word.kind), word.value) for word in turn.feedback if word.source is not None}


@pytest.fixture
def bench(home: Home) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(declaration: str, make: Callable[[Config, Home], Handler]) -> Bench:
        made.append(Bench(home, declaration, make))
        return made[-1]

    yield build
    for one in made:
        one.log.close()

    return Path(__file__).resolve().parents[2]
