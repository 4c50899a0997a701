"""Builders that the pipelines' tests share: events, records, a state in memory, a store filled by the handlers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import pytest
from everloop import wire
from everloop.config import Config
from everloop.contract import Contract
from everloop.episode import Episode
from everloop.event import Call, CallTokens, Event, FeedbackGiven, Message
from everloop.feedback import Feedback
from everloop.home import Home
from everloop.log.base import NewRecord, Record
from everloop.score import Score
from everloop.topics import EPISODES, EVENTS, SCORES, TRAJECTORIES
from everloop.trajectory import Trajectory

from pipelines.archive import Archive
from pipelines.assemble import Assembler
from pipelines.store import Store

NOON = 1_763_900_000.0


class MemoryState:
    """The port's promises in a dict."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        return self.entries.get(key)

    def put(self, key: str, value: bytes) -> None:
        self.entries[key] = value

    def delete(self, key: str) -> None:
        self.entries.pop(key, None)

    def scan(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        return iter(sorted(item for item in self.entries.items() if item[0].startswith(prefix)))


class Make:
    """Events of one agent's episodes, with defaults that are easy to tell apart."""

    State = MemoryState

    @staticmethod
    def call(name: str = "c1", asked: str = "Where is my card?", answer: str = "card_arrival", **fields: Any) -> Call:
        fields.setdefault("tokens", CallTokens(prompt=[1, 5], completion=[7, 2], logprobs=[-0.5, -0.25]))
        fields.setdefault("messages", (Message(role="user", content=asked),))
        return Call(id=name, output=Message(role="assistant", content=answer), **fields)

    @staticmethod
    def event(payload: Any, name: str | None = None, *, seq: int | None = None, **fields: Any) -> Event:
        if isinstance(payload, Feedback):
            payload = FeedbackGiven(feedback=payload)
            fields.setdefault("policy", "")
        fields = {"tenant": "acme", "policy": "desk", "episode": "ep_1", "time": NOON, **fields}
        return Event(id=name or f"e-{_name(payload)}", seq=seq, payload=payload, **fields)

    @staticmethod
    def thumb(value: int = 1, call: str | None = "c1", **fields: Any) -> Feedback:
        fields = {"id": f"thumb-{call}-{value}", "time": NOON + 1, "rater": "rita", **fields}
        return Feedback(kind="thumb", value=value, call=call, **fields)

    @staticmethod
    def correction(text: str, call: str | None = "c1", **fields: Any) -> Feedback:
        fields = {"id": f"fix-{call}-{text}", "time": NOON + 2, "rater": "rita", **fields}
        return Feedback(kind="correction", text=text, call=call, **fields)

    @staticmethod
    def record(contract: Contract, offset: int, topic: str = EVENTS.name, partition: int = 0) -> Record:
        moment = getattr(contract, "time", NOON)
        return Record(topic, partition, offset, contract.key, wire.encode(contract), {}, moment)

    @staticmethod
    def score(episode: Episode, call: str = "c1", reward: float = 0.5, **fields: Any) -> Score:
        fields = {"reward_version": "rv1", "value": 0.75, "spread": 0.1, "version": episode.version, **fields}
        owner = {"tenant": episode.tenant, "policy": episode.policy, "episode": episode.id}
        return Score(**owner, call=call, reward=reward, time=episode.updated, **fields)


def _name(payload: Any) -> str:
    return payload.feedback.id if isinstance(payload, FeedbackGiven) else getattr(payload, "id", payload.kind)


class Loop:
    """Assembler and archive on one home, driven by hand: what goes in is at once in the store."""

    def __init__(self, home: Home, config: Config) -> None:
        self.home = home
        self.state = MemoryState()
        self.assembler = Assembler(config, home)
        self.archive = Archive(home)
        self.offsets: dict[str, int] = {}

    @cached_property
    def store(self) -> Store:
        return Store(self.home.root / "store")

    def take(self, *events: Event) -> list[Episode]:
        """Assemble a batch and archive all that comes of it; the episodes that were emitted."""
        outputs: list[NewRecord] = []
        for event in events:
            record = self.place(EVENTS.name, event.key, wire.encode(event), event.time)
            self.archive.handle(self.state, record, NOON)
            outputs += self.assembler.handle(self.state, record, NOON)
        outputs += self.assembler.flush(self.state, NOON)
        for new in outputs:
            self.archive.handle(self.state, self.place(new.topic, new.key, new.value, new.time), NOON)
        self.archive.flush(self.state, NOON)
        return [one for one in emitted(outputs) if isinstance(one, Episode)]

    def keep(self, contracts: Iterable[Contract], topic: str = SCORES.name) -> None:
        for contract in contracts:
            record = self.place(topic, contract.key, wire.encode(contract), getattr(contract, "time", NOON))
            self.archive.handle(self.state, record, NOON)
        self.archive.flush(self.state, NOON)

    def place(self, topic: str, key: str, value: bytes | None, moment: float) -> Record:
        offset = self.offsets.get(topic, 0)
        self.offsets[topic] = offset + 1
        return Record(topic, 0, offset, key, value, {}, moment)


def emitted(records: Iterable[NewRecord]) -> list[Episode | Trajectory]:
    kinds: dict[str, type[Episode] | type[Trajectory]] = {EPISODES.name: Episode, TRAJECTORIES.name: Trajectory}
    return [wire.decode(kinds[record.topic], record.value or b"") for record in records]


@pytest.fixture
def make() -> type[Make]:
    return Make


@pytest.fixture(name="emitted")
def emitted_fixture() -> Any:
    return emitted


@pytest.fixture
def loop(home: Home) -> Loop:
    tenants = {name: {"policies": {"desk": {}, "clerk": {}}} for name in ("acme", "other")}
    return Loop(home, Config.model_validate({"tenants": tenants}))
