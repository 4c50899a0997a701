"""The benchmark of engines counts what an engine streams, and fails where a stream breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from benchmarks import _upstream
from benchmarks._upstream import TOKENS, Answering
from benchmarks.serving import Broke, ask, measure, row, speaks, tokens_of
from services.gateway.http1 import Client

ROLE = b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n\n'
WORD = b'data: {"choices": [{"index": 0, "delta": {"content": "card"}}]}\n\n'


@pytest.fixture
async def engine() -> AsyncIterator[str]:
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


def test_the_first_token_is_the_first_text():
    assert not speaks(ROLE)
    assert not speaks(ROLE + WORD[:-20])
    assert speaks(ROLE + WORD)


def test_tokens_are_those_of_the_last_usage():
    assert tokens_of(ROLE + b'data: {"usage": {"completion_tokens": 31, "total_tokens": 40}}\n\ndata: [DONE]') == 31
    assert tokens_of(ROLE) == 0


async def test_every_answer_in_the_window_counts_with_its_tokens(engine: str):
    seen = await measure(engine, ["a", "b"], 4, 0.3)
    assert len(seen.firsts) > 4
    assert seen.tokens == TOKENS * len(seen.firsts)
    made = row("embedded", 2, 4, seen, 0.3)
    assert 0 < made["first token p50 ms"] <= made["first token p99 ms"]
    assert made["tokens/s"] == pytest.approx(seen.tokens / 0.3, rel=0.01)


async def test_an_answer_that_breaks_fails_the_run(engine: str, monkeypatch: pytest.MonkeyPatch):
    client = Client(engine, 5.0)
    whole, tokens = await ask(client, "a", 0)
    assert (whole > 0, tokens) == (True, TOKENS)
    monkeypatch.setattr(_upstream, "PLAIN_STREAM", _upstream.PLAIN_STREAM.replace(b"[DONE]", b"[GONE]"))
    with pytest.raises(Broke, match="an answer of a broke"):
        await ask(client, "a", 1)
    client.close()
