"""HTTP/1.1 to one engine: as much of a client as the gateway needs, and no more.

A general client does a good deal for each request that is the same for every one of ours (cookies, proxies,
redirects, middlewares): measured, 100 of 160 µs of a bare relay. Here a request is one write, and an answer is read
by :class:`Framing`.

::

    Client.ask() ─▶ an idle connection, else a new one ─▶ one write
    event loop ─▶ data_received ─▶ Framing.feed ─▶ wakes who waits in head() or block()
                      └─ pauses the socket while more than 256 kB lie unread

An answer that is not read to its end closes its connection: the engine sees it and stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
import time
from typing import cast
from urllib.parse import urlsplit

HEAD_LIMIT = 65_536
LINE_LIMIT = 4_096
UNREAD_LIMIT = 262_144
IDLE = 4.0  # seconds a connection is kept: less than the five after which uvicorn closes it
CONNECT = 5.0


class Broken(ConnectionError):
    """The answer ended before it should, or is not HTTP. ``fresh``: not one byte of it had come."""

    def __init__(self, message: str, *, fresh: bool = False) -> None:
        super().__init__(message)
        self.fresh = fresh


class Expired(Broken):
    """The answer did not come in time."""


class Framing:
    """Takes the bytes of one answer as they come, however they are split. Pure.

    ``status`` is 0 until the head is there; ``blocks`` are the body's bytes, to be taken out by whoever reads;
    ``done`` says that the whole answer has come, ``lasting`` that the connection may be used again.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.blocks: list[bytes] = []
        self.unread = 0
        self.done = False
        self.lasting = True
        self._rest = b""
        self._left = 0  # bytes of the body or of the chunk; below 0: until the connection ends
        self._chunked = False

    @property
    def fresh(self) -> bool:
        return not self.status and not self._rest

    def feed(self, data: bytes) -> None:
        """Raises Broken where this is not HTTP/1.1, or more than one answer."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        while data and not self.status:
            data = self._head(data)
        while data and not self.done:
            data = self._chunk(data) if self._chunked else self._body(data)
        if data:
            raise Broken("the engine sent more than its answer")

    def end(self) -> None:
        """The connection has ended. Raises Broken where the answer has not."""
        if self.status and self._left < 0:
            self.done = True
        elif not self.done:
            raise Broken("the engine closed the connection in the middle of its answer", fresh=self.fresh)

    def _head(self, data: bytes) -> bytes:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return self._wait(data, HEAD_LIMIT)
        line, *fields = data[:end].split(b"\r\n")
        version, _, rest = line.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
            raise Broken("the engine does not speak HTTP/1.1")
        status = int(rest[:3])
        if status >= 200:  # what comes before is a notice, and the answer follows
            self.status = status
            for field in fields:
                name, _, value = field.partition(b":")
                self.headers[name.strip().lower()] = value.strip()
            self._measure(version)
        return data[end + 4 :]

    def _measure(self, version: bytes) -> None:
        connection = self.headers.get(b"connection", b"").lower()
        self.lasting = connection != b"close" and (version == b"HTTP/1.1" or connection == b"keep-alive")
        length = self.headers.get(b"content-length")
        self._chunked = self.headers.get(b"transfer-encoding", b"").lower().endswith(b"chunked")
        if self._chunked:
            return
        if length is None:
            self._left, self.lasting = (0, self.lasting) if self.status in (204, 304) else (-1, False)
        elif length.isdigit():
            self._left = int(length)
        else:
            raise Broken("the engine's Content-Length is no number")
        self.done = self._left == 0

    def _body(self, data: bytes) -> bytes:
        if self._left < 0:
            self._give(data)
            return b""
        taken = data[: self._left]
        self._give(taken)
        self._left -= len(taken)
        self.done = self._left == 0
        return data[len(taken) :]

    def _chunk(self, data: bytes) -> bytes:
        """One step: a size line, or what is there of a chunk (with its line end: ``_left`` counts both)."""
        if self._left:
            taken = data[: self._left]
            self._left -= len(taken)
            block = taken[: len(taken) - max(0, 2 - self._left)] if self._left < 2 else taken
            self._give(block)
            return data[len(taken) :]
        end = data.find(b"\r\n")
        if end < 0:
            return self._wait(data, LINE_LIMIT)
        try:
            size = int(data[:end].partition(b";")[0], 16)
        except ValueError:
            raise Broken("the engine's chunks are garbled") from None
        if size:
            self._left = size + 2
            return data[end + 2 :]
        trailers = data.find(b"\r\n\r\n", end)
        if trailers < 0:
            return self._wait(data, HEAD_LIMIT)
        self.done = True
        return data[trailers + 4 :]

    def take(self) -> bytes:
        """What has come of the body and was not taken yet."""
        body = self.blocks[0] if len(self.blocks) == 1 else b"".join(self.blocks)
        self.blocks.clear()
        self.unread = 0
        return body

    def _give(self, block: bytes) -> None:
        if block:
            self.blocks.append(block)
            self.unread += len(block)

    def _wait(self, data: bytes, limit: int) -> bytes:
        if len(data) > limit:
            raise Broken("the engine's answer has a head without end")
        self._rest = data
        return b""


class Connection(asyncio.Protocol):
    """One connection: one answer at a time, waited on by one task at a time."""

    def __init__(self) -> None:
        self.framing = Framing()
        self.idle_since = 0.0
        self.lost = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._paused = False
        self._ends = math.inf  # when the answer must have come; never while there is none to come
        self._clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        framing = self.framing
        try:
            framing.feed(data)
        except Broken as error:
            self._fail(error)
            return
        if framing.unread > UNREAD_LIMIT and not framing.done and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        try:
            self.framing.end()
        except Broken as broken:
            self._error = self._error or broken
        self._wake()

    def ask(self, request: bytes, seconds: float) -> None:
        """Send a request whose answer must have come within ``seconds``, the same at every call.

        A clock that runs already is left alone: it looks again when it finds that it went off too early.
        """
        self.framing = Framing()
        self._transport.write(request)
        loop = asyncio.get_running_loop()
        self._ends = loop.time() + seconds
        if self._clock is None:
            self._clock = loop.call_at(self._ends, self._look)

    async def head(self) -> Framing:
        """Wait for the answer's status and headers. Raises Broken."""
        while not self.framing.status:
            await self._more()
        return self.framing

    async def block(self) -> bytes:
        """The next bytes of the body; empty at its end. Raises Broken."""
        framing = self.framing
        while not framing.blocks and not framing.done:
            await self._more()
        return framing.take()

    async def body(self) -> bytes:
        """The whole body. Raises Broken."""
        framing = self.framing
        blocks = [framing.take()]
        while not framing.done:
            await self._more()
            blocks.append(framing.take())
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    async def end(self, seconds: float) -> None:
        """Wait a little for the answer to end, whatever else it says; what does not end is closed later."""
        with contextlib.suppress(TimeoutError, Broken):
            async with asyncio.timeout(seconds):
                while await self.block():
                    pass

    def rest(self) -> bool:
        """Wait for nothing; whether the connection may be used again: its answer was read to the end."""
        self._ends = math.inf
        framing = self.framing
        return framing.done and framing.lasting and not framing.blocks and not self.lost

    def close(self) -> None:
        self._ends = math.inf
        if self._clock is not None:
            self._clock.cancel()
        self._transport.abort()

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._clock = None
        if self._ends <= loop.time():
            self._fail(Expired("it took too long"))
        elif self._ends < math.inf:
            self._clock = loop.call_at(self._ends, self._look)

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._transport.abort()
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _checking() -> ssl.SSLContext:
    """TLS with certificates and names checked. Made once: it reads the whole list of authorities."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


class Client:
    """Connections to one server, kept for a few seconds. Made and used inside one event loop."""

    def __init__(self, url: str, seconds: float) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or "127.0.0.1"
        self._tls = _checking() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        self._fields = f"Host: {parts.netloc}\r\nContent-Type: application/json\r\n"
        self._seconds = seconds
        self._idle: list[Connection] = []
        self._closed = False

    async def ask(self, method: str, path: str, body: bytes, request_id: str, fields: str = "") -> Connection:
        """Send a request; returns the connection once the answer's head is there. Give it back afterwards.

        ``fields``: more header lines, each with its end.

        A kept connection may be closed by the server just as it is used: then once more, on a new one.

        Raises Broken (Expired), or another OSError where nobody takes the connection.
        """
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._fields}{fields}X-Request-Id: {request_id}\r\n"
        request = b"%bContent-Length: %d\r\n\r\n%b" % (head.encode(), len(body), body)
        kept = self._kept()
        if kept is not None:
            try:
                return await self._answered(kept, request)
            except Broken as broken:
                if not broken.fresh:
                    raise
                return await self._answered(await self._connected(broken), request)
        return await self._answered(await self._connected(), request)

    def give_back(self, connection: Connection) -> None:
        """Keep the connection of an answer that was read to its end; close any other."""
        if connection.rest() and not self._closed:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        self._closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _answered(self, connection: Connection, request: bytes) -> Connection:
        connection.ask(request, self._seconds)
        try:
            await connection.head()
        except BaseException:
            connection.close()
            raise
        return connection

    async def _connected(self, broken: Broken | None = None) -> Connection:
        """A new connection. Raises OSError where there is none; after ``broken`` that: the server ended meanwhile."""
        loop = asyncio.get_running_loop()
        making = loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        try:
            return (await asyncio.wait_for(making, CONNECT))[1]
        except TimeoutError:
            raise broken or ConnectionError(f"no connection within {CONNECT:g} s") from None
        except OSError as error:
            raise broken or error from None

    def _kept(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost and time.monotonic() - connection.idle_since < IDLE:
                return connection
            connection.close()
        return None
