"""The benchmark of engines counts what an engine streams, and fails where a stream breaks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator

import pytest

from benchmarks import _upstream
from benchmarks._upstream import TOKENS, Answering
from benchmarks.serving import Broke, Seen, ask, measure, row, tokens_of
from services.gateway.http1 import Client


@pytest.fixture
async def engine() -> AsyncIterator[str]:
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


def test_tokens_and_first_tokens_count_where_they_lie_in_the_time():
    seen = Seen(10.0, 12.0)
    for now, tokens in ((9.9, 5), (10.0, 7), (11.9, 3), (12.0, 9)):
        seen.take(now, tokens)
    for asked, now in ((9.9, 10.5), (10.0, 10.5), (11.9, 13.0), (12.0, 12.5)):
        seen.begun(asked, now)
    assert seen.tokens == 10
    assert seen.firsts == pytest.approx([0.5, 1.1])


def test_a_line_brings_the_tokens_whose_ids_it_has():
    assert tokens_of(b'data: {"choices": [{"index": 0, "delta": {"role": "assistant"}}]}') == 0
    assert tokens_of(b'data: {"choices": [{"index": 0, "token_ids": [7, 8]}, {"index": 1, "token_ids": [9]}]}') == 3
    assert tokens_of(b"data: [DONE]") == tokens_of(b": a comment") == tokens_of(b"") == 0


async def test_what_comes_in_the_time_is_measured(engine: str):
    seen = await measure(engine, ["a", "b"], 4, 0.3)
    assert len(seen.firsts) > 4
    assert seen.tokens == pytest.approx(TOKENS * len(seen.firsts), abs=4 * TOKENS)
    made = row("embedded", 2, 4, seen, 0.3)
    assert 0 < made["first token p50 ms"] <= made["first token p99 ms"]
    assert made["tokens/s"] == pytest.approx(seen.tokens / 0.3, rel=0.01)


async def test_an_answer_that_breaks_fails_the_run(engine: str, monkeypatch: pytest.MonkeyPatch):
    client, seen = Client(engine, 5.0), Seen(0.0, math.inf)
    await ask(client, "a", 0, seen)
    assert (seen.tokens, len(seen.firsts)) == (TOKENS, 1)
    monkeypatch.setattr(_upstream, "STREAM", _upstream.STREAM.replace(b"data: [DONE]", b"data: [GONE]"))
    with pytest.raises(Broke, match="an answer of a broke: status 200, 256 tokens, no end"):
        await ask(client, "a", 1, seen)
    client.close()
