"""The log's writing process: what it was sent is durable or refused, whoever of the two dies."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import ormsgpack
import pytest
from everloop.errors import LogError, LogFull, RecordTooLarge
from everloop.home import Home
from everloop.log import connect
from everloop.log.base import NewRecord
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.scribe import SIZE, Scribe, split


@given(replies=st.lists(st.one_of(st.none(), st.lists(st.text(), max_size=2))), cuts=st.lists(st.integers(0, 99)))
def test_frames_are_whole_however_they_are_split(replies: list[Any], cuts: list[int]) -> None:
    raw = b"".join(SIZE.pack(len(body)) + body for body in map(ormsgpack.packb, replies))
    found, rest, before = [], b"", 0
    for cut in [*sorted(cuts), len(raw)]:
        whole, rest = split(rest + raw[before : max(before, cut)])
        found += whole
        before = max(before, cut)
    assert (found, rest) == (replies, b"")


@pytest.fixture
async def start(home: Home, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Awaitable[Scribe]]]:
    scribes = []

    async def started(url: str = "sqlite:///log.db", *command: str) -> Scribe:
        monkeypatch.setenv("EVERLOOP_HOME", str(home.root))
        monkeypatch.setenv("EVERLOOP_LOG__URL", url)
        scribe = Scribe(command) if command else Scribe()
        await scribe.start()
        scribes.append(scribe)
        return scribe

    yield started
    for scribe in scribes:
        await scribe.close()


def record(value: bytes = b"x", key: str = "k") -> NewRecord:
    return NewRecord("events", key, value, {"id": "1"}, 5.0)


def written(home: Home) -> list[bytes | None]:
    log = connect(f"sqlite:///{home.root / 'log.db'}")
    try:
        return [r.value for p in range(log.partitions("events")) for r in log.read("events", p, 0, 1000)]
    finally:
        log.close()


@pytest.mark.processes
async def test_what_is_answered_is_written_in_order(home: Home, start: Any) -> None:
    scribe = await start()
    futures = [scribe.append_soon([record(b"%d" % at), record(b"%d again" % at)]) for at in range(20)]
    await asyncio.gather(*map(asyncio.wrap_future, futures))
    assert written(home) == [value for at in range(20) for value in (b"%d" % at, b"%d again" % at)]
    assert scribe.trouble is None
    with pytest.raises(RecordTooLarge):
        await asyncio.wrap_future(scribe.append_soon([record(b"x" * 2_000_000)]))
    await asyncio.wrap_future(scribe.append_soon([record(b"last")]))
    assert written(home)[-1] == b"last"


@pytest.mark.processes
async def test_a_full_log_is_told_as_such(home: Home, start: Any) -> None:
    scribe = await start("sqlite:///log.db?max_bytes=400000")
    sent = [asyncio.wrap_future(scribe.append_soon([record(b"x" * 50_000)])) for _ in range(20)]
    outcomes = await asyncio.gather(*sent, return_exceptions=True)
    refused = [outcome for outcome in outcomes if outcome != []]
    assert 0 < len(refused) < 20
    assert {type(outcome) for outcome in refused} == {LogFull}


@pytest.mark.processes
async def test_a_scribe_that_dies_is_replaced_and_nothing_is_believed_written(
    home: Home, start: Any, soon: Any
) -> None:
    scribe = await start()
    await asyncio.wrap_future(scribe.append_soon([record(b"first")]))
    os.kill(scribe._process.pid, 9)
    await soon(lambda: scribe.trouble is not None)
    with pytest.raises(LogError, match="not running"):
        scribe.append_soon([record(b"lost")])
    await soon(lambda: scribe.trouble is None)
    await asyncio.wrap_future(scribe.append_soon([record(b"second")]))
    assert written(home) == [b"first", b"second"]


@pytest.mark.processes
async def test_what_was_on_its_way_to_a_scribe_that_dies_is_refused(start: Any) -> None:
    scribe = await start("sqlite:///log.db", sys.executable, "-c", "import sys; sys.stdin.readline()")
    waiting = scribe.append_soon([record()])
    scribe._process.kill()
    with pytest.raises(LogError, match="may be written yet"):
        await asyncio.wrap_future(waiting)


@pytest.mark.processes
async def test_a_scribe_outlives_its_gateway_only_to_finish(home: Home, start: Any, soon: Any) -> None:
    scribe = await start()
    scribe.append_soon([record(b"sent and gone")])
    scribe._closing = True
    scribe._transport.write_eof()
    await soon(lambda: scribe._process.poll() is not None)
    assert scribe._process.returncode == 0
    assert written(home) == [b"sent and gone"]
