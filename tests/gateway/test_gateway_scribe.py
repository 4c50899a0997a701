"""The log's writing process: what it was sent is durable or refused, whoever of the two dies."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from everloop.errors import LogError, LogFull, RecordTooLarge
from everloop.event import CallTokens
from everloop.home import Home
from everloop.log import connect
from everloop.wire import unseal
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.capture import event_fields
from services.gateway.scribe import Scribe, framed, split
from services.gateway.sealing import Sampled, Unsealed


@given(replies=st.lists(st.one_of(st.none(), st.lists(st.text(), max_size=2))), cuts=st.lists(st.integers(0, 99)))
def test_frames_are_whole_however_they_are_split(replies: list[Any], cuts: list[int]) -> None:
    raw = b"".join(map(framed, replies))
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


def event(words: str = "x", id: str = "ev_1") -> Unsealed:
    payload = {"kind": "tool", "call": "call_1", "name": "find", "result": words}
    return Unsealed(event_fields("bank", "assistant", "ep_1", id, 5.0, payload), {"request": "r"})


def written(home: Home) -> list[str]:
    """The words of every event, in the log's order."""
    log = connect(f"sqlite:///{home.root / 'log.db'}")
    try:
        found = [r.value for p in range(log.partitions("events")) for r in log.read("events", p, 0, 1000)]
        return [unseal(value, home.blobs)["payload"]["result"] for value in found if value is not None]
    finally:
        log.close()


@pytest.mark.processes
async def test_what_is_answered_is_written_in_order(home: Home, start: Any) -> None:
    scribe = await start()
    futures = [scribe.append_soon([event(f"{at}"), event(f"{at} again")]) for at in range(20)]
    sizes = await asyncio.gather(*map(asyncio.wrap_future, futures))
    assert written(home) == [words for at in range(20) for words in (f"{at}", f"{at} again")]
    assert all(size > 100 for size in sizes)
    assert scribe.trouble is None
    with pytest.raises(RecordTooLarge):
        await asyncio.wrap_future(scribe.append_soon([event(id="x" * 2_000_000)]))
    with pytest.raises(LogError):
        await asyncio.wrap_future(scribe.append_soon([Unsealed({"nobody's": "event"})]))
    await asyncio.wrap_future(scribe.append_soon([event("last")]))
    assert written(home)[-1] == "last"


@pytest.mark.processes
async def test_what_is_large_goes_to_the_blob_store(home: Home, start: Any) -> None:
    scribe = await start()
    large = ["x" * 2_000_000, "y" * 2_000_000]
    await asyncio.gather(*(asyncio.wrap_future(scribe.append_soon([event(words)])) for words in large))
    assert sorted(written(home)) == large


@pytest.mark.processes
async def test_what_the_engine_said_of_tokens_is_read_by_the_scribe(home: Home, start: Any) -> None:
    scribe = await start()
    content = b'[{"token":"a","logprob":-0.5,"bytes":[97]},{"token":"b","logprob":-0.25,"bytes":[98]}]'
    call = event()._replace(sampled=Sampled([1, 2], [7, 8], content, True))
    await asyncio.wrap_future(scribe.append_soon([call]))
    log = connect(f"sqlite:///{home.root / 'log.db'}")
    (record,) = [r for p in range(log.partitions("events")) for r in log.read("events", p)]
    log.close()
    assert CallTokens.model_validate(unseal(record.value or b"")["payload"]["tokens"]) == CallTokens(
        prompt=[1, 2], completion=[7, 8], logprobs=[-0.5, -0.25]
    )
    assert dict(record.headers) == {"schema": "Event", "id": "ev_1", "request": "r"}


@pytest.mark.processes
async def test_a_full_log_is_told_as_such(home: Home, start: Any) -> None:
    scribe = await start("sqlite:///log.db?max_bytes=400000")
    await asyncio.wrap_future(scribe.append_soon([event("x" * 50_000)]))
    sent = [asyncio.wrap_future(scribe.append_soon([event("x" * 50_000)])) for _ in range(19)]
    outcomes = await asyncio.gather(*sent, return_exceptions=True)
    refused = [outcome for outcome in outcomes if not isinstance(outcome, int)]
    assert refused, "all of them, where they came as one batch"
    assert {type(outcome) for outcome in refused} == {LogFull}


@pytest.mark.processes
async def test_a_scribe_that_dies_is_replaced_and_nothing_is_believed_written(
    home: Home, start: Any, soon: Any
) -> None:
    scribe = await start()
    await asyncio.wrap_future(scribe.append_soon([event("first")]))
    os.kill(scribe._process.pid, 9)
    await soon(lambda: scribe.trouble is not None)
    with pytest.raises(LogError, match="not running"):
        scribe.append_soon([event("lost")])
    await soon(lambda: scribe.trouble is None)
    await asyncio.wrap_future(scribe.append_soon([event("second")]))
    assert written(home) == ["first", "second"]


@pytest.mark.processes
async def test_what_was_on_its_way_to_a_scribe_that_dies_is_refused(start: Any) -> None:
    scribe = await start("sqlite:///log.db", sys.executable, "-c", "import sys; sys.stdin.readline()")
    waiting = scribe.append_soon([event()])
    scribe._process.kill()
    with pytest.raises(LogError, match="may be written yet"):
        await asyncio.wrap_future(waiting)


@pytest.mark.processes
async def test_a_scribe_outlives_its_gateway_only_to_finish(home: Home, start: Any, soon: Any) -> None:
    scribe = await start()
    scribe.append_soon([event("sent and gone")])
    scribe._closing = True
    scribe._transport.write_eof()
    await soon(lambda: scribe._process.poll() is not None)
    assert scribe._process.returncode == 0
    assert written(home) == ["sent and gone"]


@pytest.mark.processes
async def test_what_a_person_must_mend_makes_it_unready_and_is_no_answer_to_an_append(home: Home, start: Any) -> None:
    scribe = await start()
    assert scribe.spool == {}
    scribe.data_received(framed((None, 0, None, {"records": 3, "refused": "no permission for events"})))
    assert scribe.trouble == "no permission for events"
    await asyncio.wrap_future(scribe.append_soon([event("served all the same")]))
    scribe.data_received(framed((None, 0, None, {"records": 0, "refused": None})))
    assert scribe.trouble is None
    assert written(home) == ["served all the same"]
