"""The spool alone, before a log that is told when to be away: order, one drainer, what never goes through, no room."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from everloop.errors import LogError, LogFull, LogRefused, RecordTooLarge
from everloop.log import NewRecord, spool
from everloop.log.base import Position
from everloop.log.embedded import EmbeddedLog
from everloop.log.spool import Hung, Spool

Until = Callable[..., Any]


class Target:
    """A log that can be away, refuse, take no more than so many bytes, or fail after it has written some."""

    def __init__(self, log: EmbeddedLog) -> None:
        self.log = log
        self.rebuilds = 0
        self.error: LogError | None = None
        self.takes = 10**9
        self.half_next = False
        self.silent = False

    def append_soon(self, records: Sequence[NewRecord]) -> Future[list[Position]]:
        if self.silent:
            return Future()
        if self.error is not None:
            raise self.error
        if self.half_next:
            self.half_next = False
            self.log.append(records[: len(records) // 2])
            raise LogError("nothing is known of the rest")
        if any(len(record.value or b"") > self.takes for record in records):
            raise RecordTooLarge("the broker takes no record of this size")
        return self.log.append_soon(records)

    def ids(self) -> list[str]:
        found = []
        for partition in range(self.log.partitions("events")):
            found += [r.headers["id"] for r in self.log.read("events", partition, 0, 100_000)]
        return found


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    log = EmbeddedLog(tmp_path / "target.db")
    yield Target(log)
    log.close()


@pytest.fixture
def opened(tmp_path: Path, target: Target) -> Iterator[Callable[..., Spool]]:
    with ExitStack() as stack:

        def open_it(path: Path | None = None, max_bytes: int = 100_000_000) -> Spool:
            made = Spool(path or tmp_path / "spool.db", target, "events", max_record_bytes=10**6, max_bytes=max_bytes)
            stack.callback(made.close)
            return made

        yield open_it


@contextmanager
def drained(made: Spool) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=made.drain)
    thread.start()
    try:
        yield thread
    finally:
        made.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "PAUSE", 0.05)


def new(number: int, size: int = 100) -> NewRecord:
    return NewRecord("events", f"k{number % 3}", b"x" * size, {"id": str(number)}, 1.0 + number)


def in_order_by_key(ids: Sequence[str]) -> bool:
    """By the first of each id: what is written twice counts once."""
    firsts = list(dict.fromkeys(ids))
    lines = [[int(id) for id in firsts if int(id) % 3 == key] for key in range(3)]
    return all(line == sorted(line) for line in lines)


def test_what_was_acknowledged_goes_on_as_it_was_given_and_leaves(
    opened: Callable[..., Spool], target: Target, until: Until
) -> None:
    made = opened()
    for number in range(100):
        made.append_soon([new(number)]).result(20)
    state = made.state()
    assert (state.records, state.drained) == (100, 0)
    assert state.bytes > 100 * 100
    assert 0 <= state.oldest < 60, "since it was acknowledged, whatever the event's own time"
    with drained(made):
        until(lambda: made.state().records == 0, deadline=30)
        made.append_soon([new(100)]).result(20)
        until(lambda: len(target.ids()) == 101, deadline=30)
    assert made.state().drained == 101
    assert in_order_by_key(target.ids())
    record = target.log.read("events", target.log.append([new(0)])[0].partition)[0]
    assert dict(record.headers) == {"id": record.headers["id"]}, "with its own headers alone"
    assert record.time == 1.0 + int(record.headers["id"])


def test_while_the_log_is_away_all_wait_in_order_and_then_go(
    opened: Callable[..., Spool], target: Target, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    made = opened()
    target.error = LogError("nobody answers")
    with drained(made):
        for number in range(60):
            made.append_soon([new(number)]).result(20)
        until(lambda: made.state().away == "nobody answers", deadline=30)
        assert made.state().refused is None
        target.half_next, target.error = True, None
        until(lambda: made.state().records == 0, deadline=30)
        assert made.state().away is None
    assert sorted(set(target.ids()), key=int) == [str(number) for number in range(60)]
    assert in_order_by_key(target.ids())
    assert [r.getMessage() for r in caplog.records if "wait in the spool" in r.getMessage()][1:] == [], "said once"


def test_a_refusal_is_told_with_its_mend_until_it_is_mended(
    opened: Callable[..., Spool], target: Target, until: Until
) -> None:
    made = opened()
    target.error = LogRefused("no permission: 'everloop topics apply' grants it")
    with drained(made):
        made.append_soon([new(1)]).result(20)
        until(lambda: "topics apply" in (made.state().refused or ""), deadline=30)
        target.error = None
        until(lambda: target.ids() == ["1"] and made.state().refused is None, deadline=30)


def test_what_is_too_large_for_the_log_stops_nobody_and_is_tried_at_the_next_start(
    opened: Callable[..., Spool], target: Target, until: Until
) -> None:
    made = opened()
    with pytest.raises(RecordTooLarge):
        made.append_soon([new(0, 2_000_000)])
    target.takes = 1000
    for number in range(6):
        made.append_soon([new(number, 5000 if number == 2 else 100)]).result(20)
    with drained(made):
        until(lambda: made.state().records == 0, deadline=30)
        assert sorted(target.ids()) == ["0", "1", "3", "4", "5"]
        assert made.state().aside == 1
    again = opened()
    with drained(again):
        again.append_soon([new(6)]).result(20)
        until(lambda: "6" in target.ids(), deadline=30)
        assert again.state().aside == 1, "it stays where it is"
    target.takes = 10**9
    last = opened()
    with drained(last):
        until(lambda: "2" in target.ids(), deadline=30)
        until(lambda: last.state().aside == 0, deadline=30)


def test_a_spool_has_one_drainer_and_the_next_begins_with_what_was_left(
    opened: Callable[..., Spool], target: Target, until: Until
) -> None:
    first, second = opened(), opened()
    target.error = LogError("away")
    with drained(second) as waiting:
        second.append_soon([new(0)]).result(20)
        until(lambda: second.state().away == "away", deadline=30)
        with drained(first):
            for number in range(1, 30):
                (first if number % 2 else second).append_soon([new(number)]).result(20)
            assert first.state().away is None, "it does not drain"
            assert first.state().records == second.state().records == 30
            second.stop()
            waiting.join(20)
            until(lambda: first.state().away == "away", deadline=30)
            target.error = None
            until(lambda: first.state().records == 0, deadline=30)
    assert sorted(target.ids(), key=int) == [str(number) for number in range(30)], "each once"
    assert in_order_by_key(target.ids())


def test_beyond_its_cap_it_refuses_and_takes_again_once_it_is_drained(
    opened: Callable[..., Spool], target: Target, until: Until
) -> None:
    made = opened(max_bytes=2_000_000)
    target.error = LogError("away")
    with drained(made):
        told = [made.append_soon([new(number, 50_000)]) for number in range(100)]
        outcomes = [future.exception(30) for future in told]
        taken = [str(number) for number, outcome in enumerate(outcomes) if outcome is None]
        assert 25 < len(taken) < 41
        assert {type(outcome) for outcome in outcomes} == {LogFull, type(None)}
        assert "log.spool_bytes" in str(outcomes[-1])
        assert made.state().bytes < 2_100_000
        target.error = None
        until(lambda: made.append_soon([new(100)]).exception(20) is None, deadline=30)
        until(lambda: made.state().records == 0, deadline=30)
    assert set(taken) <= set(target.ids())
    assert made.state().bytes < 200_000, "what is drained counts no more"


def test_a_log_that_says_nothing_at_all_ends_the_drainer(
    opened: Callable[..., Spool], target: Target, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setattr(spool, "HUNG", 1.0)
    monkeypatch.setattr(spool, "QUIET", 0.2)
    made = opened()
    made.append_soon([new(1)]).result(20)
    target.silent = True
    with pytest.raises(Hung, match="neither"):
        made.drain()
    assert made.state().records == 1
    assert "nothing was acknowledged" in (made.state().away or "")


def test_a_stop_hands_on_what_is_left_but_waits_for_nobody(
    opened: Callable[..., Spool], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = opened()
    for number in range(2000):
        told = made.append_soon([new(number)])
    told.result(20)
    made.stop()
    made.drain()
    assert len(target.ids()) == 2000
    target.silent = True
    monkeypatch.setattr(spool, "FINISH", 0.3)
    silent = opened()
    silent.append_soon([new(1)]).result(20)
    silent.stop()
    silent.drain()
    assert silent.state().records == 1


PROGRAM = """
import sys, threading
from pathlib import Path
from everloop.log import NewRecord
from everloop.log.embedded import EmbeddedLog
from everloop.log.spool import Spool
log = EmbeddedLog(sys.argv[2]); log.rebuilds = 0
spool = Spool(Path(sys.argv[1]), log, "events", max_record_bytes=10**6, max_bytes=10**8)
threading.Thread(target=spool.drain, daemon=True).start()
number = int(sys.argv[3])
while True:
    spool.append_soon([NewRecord("events", f"k{number % 3}", b"x", {"id": str(number)})]).result()
    print(number, flush=True)
    number += 1
"""


def test_kill_9_while_it_writes_and_drains_loses_nothing_and_keeps_the_order(
    opened: Callable[..., Spool], target: Target, tmp_path: Path, until: Until
) -> None:
    told: list[int] = []
    for _ in range(4):
        command = [sys.executable, "-c", PROGRAM, tmp_path / "spool.db", tmp_path / "target.db", str(len(told))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told += [int(line) for line, _ in zip(process.stdout, range(150), strict=False)]
            process.kill()
            told += [int(line) for line in process.stdout if line.endswith("\n")]
    made = opened()
    with drained(made):
        until(lambda: made.state().records == 0, deadline=30)
    ids = target.ids()
    assert {str(number) for number in told} <= set(ids)
    assert in_order_by_key(ids)
    print(f"acknowledged {len(set(told))}, in the log {len(ids)}, unique {len(set(ids))}")


def test_the_disk_is_left_some_room(opened: Callable[..., Spool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "RESERVE", 2**62)
    made = opened()
    with pytest.raises(LogFull, match="free on the disk"):
        made.append_soon([new(1)]).result(20)
