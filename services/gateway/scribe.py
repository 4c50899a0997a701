"""The gateway's writing hand: seals events and appends them to the log, in a process of its own.

::

    gateway: append_soon ─▶ numbered frames ─▶ scribe: seal ─▶ log.append_soon ─▶ durable ─▶ a reply of that number
                                             (the next are sealed while the last one waits for the disk)
                                 on Kafka: ─▶ spool.append_soon ─▶ durable;  drain ─▶ Kafka   (see spool.py)

SQLite takes the interpreter's lock at every row, and the gateway's event loop holds it: in one process each waits
for the other many times a request. What the engine said of each token, nine tenths of an answer, is read here too:
that is a third of the work of a call, and the event loop has only one core.

When the gateway ends, however it ends, the scribe finishes what it was sent and ends too. When the scribe dies, what
was on its way is refused (it may be written yet: ids make a retry harmless), and another one is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, Protocol, cast

import ormsgpack
from everloop.config import load
from everloop.errors import LogError, LogFull, RecordTooLarge
from everloop.home import Home
from everloop.log import open_log

from services.gateway.sealing import Unsealed, sealed_log
from services.gateway.spool import draining, open_spool
from services.logs import log_to_stderr

logger = logging.getLogger(__name__)
SIZE = struct.Struct("<I")
ERRORS: dict[str, type[LogError]] = {error.__name__: error for error in (LogError, LogFull, RecordTooLarge)}
STALLED = 20.0  # seconds without an answer, after which new work is refused instead of queued
PAUSE = 0.5  # seconds between two scribes
LATEST_END = 30.0
LARGE = 262_144  # bytes of an event, above which it may go to the blob store
READ_AHEAD = 262_144
LARGE_AT_ONCE = 4
SWITCH = 0.0005  # seconds for which sealing may hold up the log's writer, whose answer somebody waits for


class Appends(Protocol):
    """The part of a log that capture needs."""

    def append_soon(self, events: Sequence[Unsealed]) -> Future[int]: ...


class Scribe(asyncio.Protocol):
    """The gateway's end. Made and used inside one event loop; :meth:`start` before the first append."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "services.gateway.scribe")) -> None:
        self._command = command
        self._transport: asyncio.Transport | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._sent: dict[int, tuple[Future[int], float]] = {}  # by number, the oldest first
        self._numbers = itertools.count()
        self._rest = b""
        self._closing = False
        self._restart: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.spool: dict[str, Any] = {}
        """What the scribe said last of its spool (``everloop.log.spool.SpoolState``); empty where there is none."""

    @property
    def trouble(self) -> str | None:
        """None while appends are answered, and the spool behind them has nothing that a person must mend."""
        if self._transport is None:
            return "the log's writing process is not running"
        waited = time.monotonic() - next(iter(self._sent.values()))[1] if self._sent else 0.0
        if waited > STALLED:
            return f"the log has given no answer for {waited:.0f} s"
        return self.spool.get("refused")

    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            handle = theirs.fileno()
            self._process = subprocess.Popen([*self._command, str(handle)], pass_fds=[handle])
        await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)

    def append_soon(self, events: Sequence[Unsealed]) -> Future[int]:
        """As a sealed log's. Raises LogError where it cannot be tried now."""
        if self._transport is None or self._closing:
            raise LogError("the log's writing process is not running; nothing was written: try again later")
        future: Future[int] = Future()
        number = next(self._numbers)
        parts = [framed(event.plain()) for event in events]  # apart: one large piece of memory costs more to get
        self._transport.writelines([framed((number, len(parts))), *parts])
        self._sent[number] = (future, time.monotonic())
        return future

    async def close(self) -> None:
        """Let the scribe finish what it was sent, and end."""
        self._closing = True
        if self._restart is not None:
            self._restart.cancel()
        if self._transport is not None:
            self._transport.write_eof()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, LATEST_END)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        replies, self._rest = split(self._rest + data)
        for number, size, kind, message in replies:
            if number is None:
                self.spool = message
                continue
            future, _ = self._sent.pop(number)
            if kind is None:
                future.set_result(size)
            else:
                future.set_exception(ERRORS.get(kind, LogError)(message))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        lost, self._sent = self._sent, {}
        for future, _ in lost.values():
            future.set_exception(LogError("the log's writing process ended; it may be written yet: try again"))
        if not self._closing:
            logger.error("the log's writing process ended (%s); another one is started", self._code())
            self._restart = asyncio.get_running_loop().call_later(PAUSE, self._start_again)

    def _start_again(self) -> None:
        task = asyncio.get_running_loop().create_task(self.start())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _code(self) -> int | None:
        return None if self._process is None else self._process.poll()


def framed(message: Any) -> bytes:
    body = ormsgpack.packb(message)
    return SIZE.pack(len(body)) + body


def split(data: bytes) -> tuple[list[Any], bytes]:
    """(whole frames, unpacked; the beginning of the next)."""
    whole, at = [], 0
    while len(data) - at >= SIZE.size:
        end = at + SIZE.size + SIZE.unpack_from(data, at)[0]
        if len(data) < end:
            break
        whole.append(ormsgpack.unpackb(data[at + SIZE.size : end]))
        at = end
    return whole, data[at:]


class Desk:
    """The scribe's end: appends what comes and answers it, until the other end closes."""

    def __init__(self, connection: socket.socket, log: Appends) -> None:
        self._connection = connection
        self._log = log
        self._sending = threading.Lock()

    def serve(self) -> None:
        """What is large may wait for the disk to be sealed, and is done beside the rest."""
        with self._connection.makefile("rb", READ_AHEAD) as stream, ThreadPoolExecutor(LARGE_AT_ONCE) as pool:
            while head := _body(stream):
                number, count = ormsgpack.unpackb(head)
                parts = [_body(stream) for _ in range(count)]
                if not all(parts):
                    return
                if max(map(len, parts)) < LARGE:
                    self._append(number, parts)
                else:
                    pool.submit(self._append, number, parts)

    def _append(self, number: int, parts: list[bytes]) -> None:
        try:
            done = self._log.append_soon([Unsealed(*ormsgpack.unpackb(part)) for part in parts])
        except Exception as error:  # whatever it is, somebody waits for the answer
            self._answer(number, 0, error)
        else:
            done.add_done_callback(lambda done: self._answer(number, *_outcome(done)))

    def _answer(self, number: int, size: int, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, LogError):
            logger.error("events could not be appended", exc_info=error)
        kind, message = (None, "") if error is None else (type(error).__name__, str(error))
        self._send((number, size, kind, message))

    def tell(self, spool: dict[str, Any]) -> None:
        """The state of the spool, for the gateway's metrics."""
        self._send((None, 0, None, spool))

    def _send(self, reply: tuple[Any, ...]) -> None:
        with self._sending, contextlib.suppress(OSError):  # the gateway is gone; what it sent is written all the same
            self._connection.sendall(framed(reply))


def _body(stream: BinaryIO) -> bytes:
    """The next frame's; empty where the other end has closed before it was whole."""
    size = stream.read(SIZE.size)
    if len(size) < SIZE.size:
        return b""
    (length,) = SIZE.unpack(size)
    body = stream.read(length)
    return body if len(body) == length else b""


def _outcome(done: Future[int]) -> tuple[int, BaseException | None]:
    error = done.exception()
    return (done.result(), None) if error is None else (0, error)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # the gateway says when: it may still have answers to record
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH)
    config = load()
    home = Home(config.home)
    log_to_stderr("scribe", config.log_level)
    log = open_log(config)
    try:
        with socket.socket(fileno=int(sys.argv[1])) as connection:
            spool = open_spool(config, home, log)
            desk = Desk(connection, sealed_log(config, home, spool or log))
            with draining(spool, desk.tell):
                desk.serve()
    finally:
        log.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
