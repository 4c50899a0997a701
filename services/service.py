"""What every service has: HTTP for health, metrics and status, an announcement in the home, and an orderly end.

::

    main thread: event loop ── /healthz /readyz /metrics /status, and the service's own routes
        ▲ wakes                    │ SIGTERM, SIGINT, or a loop that ended: sets ``stop``
        │                          ▼
    loop threads: blocking work (stream handlers, learner), each until ``stop`` is set

A loop that raises ends the process with a non-zero code; the supervisor starts it anew. At a stop, requests and
loops under way have ``services.drain`` seconds to finish.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web
from everloop.config import Config, load
from everloop.errors import ConfigError, EverloopError
from everloop.home import Home
from prometheus_client import CONTENT_TYPE_LATEST, disable_created_metrics, generate_latest

from services.logs import log_to_stderr
from services.state import owned

disable_created_metrics()  # one more series for each counter, which nobody reads
logger = logging.getLogger(__name__)
USAGE_ERROR = 2
IDLE = 75.0  # seconds for which a connection may ask nothing: more than the 60 that proxies usually keep one
UNREAD = 60.0
BACKLOG = 512
Trouble = Callable[[], str | None]
"""None where all is well, else one sentence that says what is wrong."""


class Service:
    """One process of the platform.

    Add routes to ``app``, blocking loops with :meth:`loop`, health with :meth:`check` and :meth:`ready`, and parts
    of ``/status`` with :meth:`describe`; then :meth:`run`. ``port`` 0 takes a free one.
    """

    def __init__(self, name: str, config: Config, port: int, *, host: str | None = None, max_body: int = 1_048_576):
        self.name = name
        self.config = config
        self.home = Home(config.home)
        self.stop = threading.Event()
        self.url = ""
        self.app = web.Application(client_max_size=max_body)
        self._host = host or config.services.host
        self._port = port
        self._loops: dict[str, Callable[[], None]] = {}
        self._threads: list[threading.Thread] = []
        self._failed = threading.Event()
        self._alive: dict[str, Trouble] = {}
        self._ready: dict[str, Trouble] = {}
        self._status: dict[str, Callable[[], Any]] = {}
        self._wake: Callable[[], None] = lambda: None
        self.started = time.time()
        self.app.router.add_get("/healthz", self._healthz)
        self.app.router.add_get("/readyz", self._readyz)
        self.app.router.add_get("/metrics", _metrics)
        self.app.router.add_get("/status", self._get_status)

    def loop(self, name: str, run: Callable[[], None]) -> None:
        """Run ``run`` in a thread of its own; it must return soon after ``self.stop`` is set, and not before."""
        self._loops[name] = run

    def alone(self, name: str, run: Callable[[], None]) -> None:
        """As :meth:`loop`, in one process of a home at a time: a second one waits until the first has ended."""

        def owning() -> None:
            with owned(self.home.folder("state") / name, self.stop) as mine:
                if mine:
                    run()

        self.loop(name, owning)

    def check(self, name: str, trouble: Trouble) -> None:
        """Liveness: while ``trouble`` says something, ``/healthz`` answers 503, and a restart is called for."""
        self._alive[name] = trouble

    def ready(self, name: str, trouble: Trouble) -> None:
        """Readiness: while ``trouble`` says something, ``/readyz`` answers 503, and no requests should come."""
        self._ready[name] = trouble

    def describe(self, name: str, status: Callable[[], Any]) -> None:
        """Show what ``status`` returns (JSON values) under ``name`` in ``/status``. Called in a thread."""
        self._status[name] = status

    def run(self) -> int:
        """Serve until a signal or a failure; returns the exit code: 0 after an orderly stop."""
        log_to_stderr(self.name, self.config.log_level)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(self._serve())
        if any(thread.is_alive() for thread in self._threads):
            logging.shutdown()
            os._exit(1)  # a loop that does not end would keep the interpreter from ending
        return code

    async def _serve(self) -> int:
        woken = asyncio.Event()
        event_loop = asyncio.get_running_loop()
        self._wake = lambda: event_loop.call_soon_threadsafe(woken.set)
        for number in (signal.SIGTERM, signal.SIGINT):
            event_loop.add_signal_handler(number, self._signalled, woken)
        half = 0.5 * self.config.services.drain  # aiohttp waits for it twice before it cancels a handler
        runner = await runner_of(self.app, half)
        try:
            if not await self._listen(runner):
                return 1
            self._start_loops()
            logger.info("serving on %s", self.url)
            await woken.wait()
            return await self._drain(runner)
        finally:
            self._withdraw()
            await runner.cleanup()

    def _signalled(self, woken: asyncio.Event) -> None:
        if woken.is_set():
            logger.warning("a second signal: ending at once")
            logging.shutdown()
            os._exit(1)
        woken.set()

    async def _listen(self, runner: web.AppRunner) -> bool:
        try:
            await listen(runner, self._host, self._port)
        except OSError as error:
            logger.error("cannot listen on %s:%d: %s; is it running already?", self._host, self._port, error)
            return False
        port = runner.addresses[0][1]
        reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self._host, self._host)
        self.url = f"http://{reachable}:{port}"
        self._announce()
        return True

    @property
    def _announcement(self) -> Path:
        return self.home.folder("run") / f"{self.name}.json"

    def _announce(self) -> None:
        partial = self._announcement.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(
            json.dumps({"pid": os.getpid(), "url": self.url, "started": self.started, "log": self.config.log.url})
        )
        partial.rename(self._announcement)

    def _withdraw(self) -> None:
        """Remove the announcement, unless a successor has written its own."""
        try:
            if json.loads(self._announcement.read_text())["pid"] == os.getpid():
                self._announcement.unlink()
        except (OSError, ValueError, KeyError):
            pass

    def _start_loops(self) -> None:
        for name, run in self._loops.items():
            thread = threading.Thread(target=self._run_loop, args=(name, run), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run_loop(self, name: str, run: Callable[[], None]) -> None:
        try:
            run()
            if not self.stop.is_set():
                raise RuntimeError("it returned although nobody asked it to")
        except BaseException:
            logger.exception("loop %s failed; this process ends so that it is started anew", name)
            self._failed.set()
            self._wake()

    async def _drain(self, runner: web.AppRunner) -> int:
        logger.info("stopping: up to %g s for what is under way", self.config.services.drain)
        end = time.monotonic() + self.config.services.drain
        self.stop.set()
        await runner.cleanup()
        for thread in self._threads:
            await asyncio.to_thread(thread.join, max(0.0, end - time.monotonic()))
        late = [thread.name for thread in self._threads if thread.is_alive()]
        if late:
            logger.warning("not finished in time: %s; nothing unfinished was committed", ", ".join(late))
        return 1 if late or self._failed.is_set() else 0

    def _trouble(self, checks: dict[str, Trouble]) -> dict[str, str]:
        found = {}
        for name, check in checks.items():
            try:
                trouble = check()
            except Exception as error:
                trouble = f"the check itself failed: {error!r}"
            if trouble:
                found[name] = trouble
        return found

    async def _healthz(self, request: web.Request) -> web.Response:
        return _health(await asyncio.to_thread(self._trouble, self._alive))

    async def _readyz(self, request: web.Request) -> web.Response:
        if self.stop.is_set():
            return _health({"service": "stopping"})
        return _health(await asyncio.to_thread(self._trouble, self._alive | self._ready))

    async def _get_status(self, request: web.Request) -> web.Response:
        if not from_this_machine(request):
            message = "/status tells of tenants and policies: it answers this machine alone; ask it here"
            fields = {"message": message, "type": "permission_error", "code": "not_this_machine", "param": None}
            return web.json_response({"error": fields}, status=403)
        return web.json_response(await asyncio.to_thread(self._whole_status))

    def _whole_status(self) -> dict[str, Any]:
        status: dict[str, Any] = {
            "service": self.name,
            "pid": os.getpid(),
            "home": str(self.home.root),
            "started": self.started,
        }
        for name, describe in self._status.items():
            try:
                status[name] = describe()
            except Exception as error:
                logger.exception("status of %s", name)
                status[name] = {"error": repr(error)}
        return status


async def runner_of(app: web.Application, shutdown: float) -> web.AppRunner:
    """An application ready to listen. A connection without a whole request's head for ``IDLE`` seconds is closed,
    also one that sends its head byte by byte."""
    runner = web.AppRunner(
        app, access_log=None, shutdown_timeout=shutdown, handler_cancellation=True, keepalive_timeout=IDLE
    )
    await runner.setup()
    return runner


async def listen(runner: web.AppRunner, host: str, port: int) -> None:
    """Listen at an address; port 0: a free one. Raises OSError where that cannot be.

    The kernel ends a connection whose client takes nothing for ``UNREAD`` seconds: what is written to it would stay.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux; every connection that is taken up here inherits it
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * UNREAD))
    await web.SockSite(runner, listening, backlog=BACKLOG).start()


FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")


def from_this_machine(request: web.Request) -> bool:
    """Whether a request comes from a process of this machine, and no proxy on it asks for somebody elsewhere."""
    transport = request.transport
    if transport is None or any(name in request.headers for name in FORWARDED):
        return False
    peer, own = (ipaddress.ip_address(transport.get_extra_info(name)[0]) for name in ("peername", "sockname"))
    inner = getattr(peer, "ipv4_mapped", None) or peer
    return inner.is_loopback or peer == own


def collect_seldom() -> None:
    """For a process that has made what it keeps, and from here on hundreds of small objects for each thing that it
    does, gone with it: looking for cycles among all of them would be a part of its work that shows."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def main(name: str, serve: Callable[[Config], int]) -> int:
    """A service's ``main``: ``serve`` runs it until it is stopped and returns the exit status.

    What cannot be begun is told in one line on stderr: a configuration that is refused (status 2: starting it again
    is pointless), or anything else that has a name (status 1).
    """
    try:
        return serve(load())
    except ConfigError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except EverloopError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1


def _health(trouble: dict[str, str]) -> web.Response:
    return web.json_response({"ok": not trouble, "trouble": trouble}, status=503 if trouble else 200)


async def _metrics(request: web.Request) -> web.Response:
    body = await asyncio.to_thread(generate_latest)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
