"""Replays of one handler on the embedded log: what comes again, what stays, and what is refused."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.cli.main import main
from everloop.config import Config
from everloop.errors import ConfigError, ContractError
from everloop.event import Call, Event, Message
from everloop.home import Home
from everloop.log import Log, NewRecord, Record, connect
from everloop.stream import State

from pipelines.archive import Archive
from pipelines.assemble import Assembler
from pipelines.store import Store
from services.commands.replay import moment
from services.rewind import NotReplayed, rewind
from services.stream import Stream, run_handler

NOW = 1_760_000_000.0
COUNT = 20
HALF = NOW + COUNT // 2


def call(number: int) -> NewRecord:
    """A call of an episode of its own, a second after the one before."""
    said = Call(
        id=f"c{number}",
        messages=(Message(role="user", content="where is my card?"),),
        output=Message(role="assistant", content="in the post"),
    )
    event = Event(
        id=f"e{number}", tenant="acme", policy="desk", episode=f"ep_{number}", time=NOW + number, payload=said
    )
    return NewRecord("events", event.key, wire.encode(event), {"id": event.id}, event.time)


@pytest.fixture
def log(home: Home) -> Iterator[Log]:
    home.folder()
    log = connect(f"sqlite:///{home.root / 'log.db'}")
    log.append([call(number) for number in range(COUNT)])
    yield log
    log.close()


def ids(log: Log, topic: str) -> list[str]:
    return [r.headers["id"] for p in range(log.partitions(topic)) for r in log.read(topic, p)]


def stored(home: Home) -> list[str]:
    rows = Store(home.root / "store", blobs=home.blobs).sql("SELECT id FROM events ORDER BY time").to_pylist()
    return [row["id"] for row in rows]


def test_what_the_store_lost_comes_back_and_nothing_twice(log: Log, home: Home) -> None:
    folder = home.folder("state")
    run_handler(Archive(home), log, folder, until_idle=True)
    assert len(stored(home)) == COUNT
    shutil.rmtree(home.root / "store" / "events")
    back = rewind(log, home, "archive", HALF, time.time())
    assert {at[0] for at in back} == {"events"}
    run_handler(Archive(home), log, folder, until_idle=True)
    assert stored(home) == [f"e{number}" for number in range(COUNT // 2, COUNT)]
    rewind(log, home, "archive", 0.0, time.time())
    run_handler(Archive(home), log, folder, until_idle=True)
    assert stored(home) == [f"e{number}" for number in range(COUNT)]


class Narrow(Assembler):
    """A release that cannot take what the next one can."""

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        if record.headers["id"] == "e15":
            raise ContractError("a field that this release does not know")
        return super().handle(state, record, now)


def test_what_could_not_be_taken_is_taken_and_the_rest_known_by_its_id(log: Log, home: Home) -> None:
    folder, config = home.folder("state"), Config(home=home.root)
    run_handler(Narrow(config, home), log, folder, until_idle=True)
    before = ids(log, "episodes")
    assert len(before) == COUNT - 1
    assert rewind(log, home, "assemble", HALF, time.time())
    stream = run_handler(Assembler(config, home), log, folder, until_idle=True)
    assert COUNT // 2 <= stream.handled < COUNT, "from the time on; a partition's order decides"
    after = ids(log, "episodes")
    assert len(after) == COUNT, "one episode more"
    assert len(set(after)) == COUNT
    assert set(before) < set(after)


def test_nothing_of_that_time_leaves_all_as_it_is(log: Log, home: Home) -> None:
    run_handler(Archive(home), log, home.folder("state"), until_idle=True)
    assert rewind(log, home, "archive", NOW + COUNT, time.time()) == {}


@pytest.mark.parametrize(
    ("handler", "ahead", "why"),
    [
        ("nobody", 0.0, "no handler 'nobody'; these can be replayed: assemble, score, signals, judge, archive"),
        ("learn", 0.0, "would count twice and train again"),
        ("archive", 60.0, "lies 60 s ahead"),
        ("archive", 0.0, "has handled nothing here"),
    ],
)
def test_what_is_refused(log: Log, home: Home, handler: str, ahead: float, why: str) -> None:
    with pytest.raises(NotReplayed, match=why):
        rewind(log, home, handler, NOW + ahead, NOW)


def test_a_handler_that_runs_is_left_alone(log: Log, home: Home, until: Callable[..., Any]) -> None:
    stop = threading.Event()
    stream = Stream(Archive(home), log, home.folder("state"), stop=stop)
    thread = threading.Thread(target=stream.run)
    thread.start()
    try:
        until(lambda: stream.handled == COUNT, deadline=30)
        with pytest.raises(NotReplayed, match="'archive' runs: end the platform first"):
            rewind(log, home, "archive", 0.0, time.time())
    finally:
        stop.set()
        thread.join()


def test_the_command(
    log: Log, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_handler(Archive(home), log, home.folder("state"), until_idle=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVERLOOP_HOME", str(home.root))
    assert main(["replay", "--handler", "archive", "--from", "2025-10-09T08:53:30+00:00"]) == 0
    said = capsys.readouterr().out
    assert "events/0: archive goes on at offset " in said
    assert "once it is started" in said
    assert main(["replay", "--handler", "archive", "--from", "1s"]) == 0
    assert "Nothing that it has handled" in capsys.readouterr().out
    assert main(["replay", "--handler", "archive"]) == 2
    assert main(["replay", "--handler", "archive", "--from", "2999-01-01"]) == 2
    assert "ahead" in capsys.readouterr().err


def test_times() -> None:
    assert moment("6h", NOW) == NOW - 6 * 3600
    assert moment("2025-10-09T08:53:20+00:00", NOW) == NOW
    with pytest.raises(ConfigError, match="is no time"):
        moment("yesterday", NOW)
