"""HTTP/1.1 as the gateway speaks it to an engine: any split, any framing, and nothing that is not HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.gateway.http1 import UNREAD_LIMIT, Broken, Client, Expired, Framing

Behave = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


def chunked(blocks: list[bytes], extension: bytes = b"", trailer: bytes = b"") -> bytes:
    parts = [b"%x%b\r\n%b\r\n" % (len(block), extension, block) for block in blocks if block]
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n" + b"".join(parts) + b"0\r\n" + trailer + b"\r\n"


def sized(body: bytes) -> bytes:
    return b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\ncontent-length:%d\r\nA: b\r\n\r\n%b" % (
        len(body),
        body,
    )


@settings(max_examples=300, deadline=None)
@given(
    blocks=st.lists(st.binary(max_size=20), max_size=4),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    extension=st.sampled_from([b"", b";a=b"]),
    trailer=st.sampled_from([b"", b"X-Sum: 1\r\n"]),
)
@example(blocks=[b"\r\n0\r\n\r\n"], cuts=list(range(200)), extension=b"", trailer=b"X: y\r\n")
def test_an_answer_is_the_same_however_it_is_split(
    blocks: list[bytes], cuts: list[int], extension: bytes, trailer: bytes
) -> None:
    for raw, status in ((chunked(blocks, extension, trailer), 200), (sized(b"".join(blocks)), 404)):
        framing, body = Framing(), b""
        places = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
        for start, end in pairwise(places):
            assert not framing.done
            framing.feed(raw[start:end])
            body += framing.take()
        assert (framing.status, framing.done, framing.lasting) == (status, True, True)
        assert body == b"".join(blocks)
        framing.end()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"SSH-2.0-x\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 abc\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "no number"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "no number"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "garbled"),
        (OK + b"more", "more than its answer"),
        (b"x" * 100_000, "without end"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 10_000, "without end"),
    ],
)
def test_what_is_not_an_answer_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(Broken, match=words):
        Framing().feed(raw)


def test_an_answer_may_last_until_the_connection_ends() -> None:
    framing = Framing()
    framing.feed(b"HTTP/1.0 200 OK\r\n\r\nall")
    assert not framing.done
    framing.end()
    assert (framing.done, framing.lasting, framing.take()) == (True, False, b"all")
    for cut in (b"", b"HTTP/1.1 2", OK[:-1]):
        framing = Framing()
        framing.feed(cut)
        with pytest.raises(Broken, match="in the middle") as broken:
            framing.end()
        assert broken.value.fresh is (cut == b"")


@pytest.fixture
async def server() -> AsyncIterator[Callable[[Behave], Awaitable[str]]]:
    async with AsyncExitStack() as stack:

        async def start(behave: Behave) -> str:
            made = await asyncio.start_server(behave, "127.0.0.1", 0)
            stack.callback(made.close)
            return f"http://127.0.0.1:{made.sockets[0].getsockname()[1]}"

        yield start


async def test_a_connection_is_kept_only_after_a_whole_answer(server: Callable[[Behave], Awaitable[str]]) -> None:
    connections = []

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(OK)

    client = Client(await server(behave), seconds=5)
    for read in (True, True, False, True):
        connection = await client.ask("GET", "/", b"", "1")
        if read:
            assert await connection.body() == b"hi"
        else:
            connection.framing.blocks = [b"unread"]
        client.give_back(connection)
    assert len(connections) == 2
    client.close()


async def test_an_answer_that_takes_too_long_expires_in_head_and_body(
    server: Callable[[Behave], Awaitable[str]],
) -> None:
    for first in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1"):

        async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes = first) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(first)
            await reader.read()

        client = Client(await server(behave), seconds=0.1)
        with pytest.raises(Expired, match="too long"):
            await (await client.ask("GET", "/", b"", "1")).body()
        client.close()


async def test_what_is_not_read_is_not_taken_in(server: Callable[[Behave], Awaitable[str]]) -> None:
    """An engine that is faster than its agent waits: memory stays bounded."""
    size = 64 * UNREAD_LIMIT

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
        await writer.drain()

    client = Client(await server(behave), seconds=30)
    connection = await client.ask("GET", "/", b"", "1")
    most = got = 0
    for _ in range(20):
        await asyncio.sleep(0.005)
        most = max(most, connection.framing.unread)
    assert 0 < most < 8 * UNREAD_LIMIT
    while block := await connection.block():
        got += len(block)
    assert got == size
    client.close()
