"""A replay of a handler whose workers share its partitions: its state lies in a changelog, and stays."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.config import Config
from everloop.errors import ContractError
from everloop.event import Call, Event, Message
from everloop.home import Home
from everloop.log import NewRecord, Record
from everloop.log.kafka.log import KafkaLog
from everloop.stream import State

from pipelines.assemble import Assembler
from services.rewind import NotReplayed, rewind

pytestmark = pytest.mark.kafka
Until = Callable[..., Any]
COUNT = 20


def call(number: int, begin: float) -> NewRecord:
    said = Call(
        id=f"c{number}",
        messages=(Message(role="user", content="where is my card?"),),
        output=Message(role="assistant", content="in the post"),
    )
    event = Event(
        id=f"e{number}", tenant="acme", policy="desk", episode=f"ep_{number}", time=begin + number, payload=said
    )
    return NewRecord("events", event.key, wire.encode(event), {"id": event.id}, event.time)


class Narrow(Assembler):
    """A release that cannot take what the next one can."""

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        if record.headers["id"] == "e15":
            raise ContractError("a field that this release does not know")
        return super().handle(state, record, now)


def test_a_replay_from_a_time(log: KafkaLog, tmp_path: Path, work: Any, until: Until, expel: Any) -> None:
    begin = time.time() - COUNT
    log.append([call(number, begin) for number in range(COUNT)])
    config, home = Config(home=tmp_path), Home(tmp_path)

    def episodes() -> list[str]:
        return [record.key for p in range(4) for record in log.read("episodes", p)]

    def taken() -> int:
        return sum(log.committed("assemble", "events").values())

    with pytest.raises(NotReplayed, match="no handler 'counting'"):
        rewind(log, home, "counting", begin, time.time())
    first = work(tmp_path / "first", lambda: Narrow(config, home))
    until(lambda: taken() == COUNT, deadline=30)
    with pytest.raises(NotReplayed, match="the group 'assemble' has 1 member"):
        rewind(log, home, "assemble", begin, time.time())
    first.stop()
    assert len(episodes()) == COUNT - 1
    until(lambda: log.cluster.members("assemble") == 0, deadline=30)
    back = rewind(log, home, "assemble", begin + 10, time.time())
    again = sum(before - after for before, after in back.values())
    assert COUNT // 2 <= again < COUNT
    until(lambda: taken() == COUNT - again)
    second = work(tmp_path / "second", lambda: Assembler(config, home))
    until(lambda: taken() == COUNT, deadline=30)
    assert second.worker.handled == again
    assert sorted(episodes()) == sorted(f"acme/ep_{number}" for number in range(COUNT)), "one more, and none twice"
