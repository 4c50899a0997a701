"""``everloop up``: one process that starts the services, restarts what dies, and takes them all down with it.

::

    supervisor (one thread, this file)
      ├─ engine, gateway, scorer, assembler, releaser, learner: a process and a process group each
      │     stdout, stderr ─▶ home/logs/<service>.log        /readyz ◀─ asked until it says 200
      └─ the kernel tells a child when the supervisor is gone (PR_SET_PDEATHSIG), and hands it what a dead
         child leaves behind (PR_SET_CHILD_SUBREAPER), so nothing outlives it, not even after kill -9

Nobody waits for anybody for ever: a child that is not ready is asked again, one that died is started again after
a growing pause, one whose /healthz goes on to complain is ended so that it is started again, and at a stop whoever is
still there shortly before the deadline is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

from everloop.config import Config
from everloop.errors import ConfigError, EverloopError
from everloop.log_config import LogUser

from services.installation import holder

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds before a dead service is started again: doubles up to the longest
STABLE = 60.0  # seconds of life after which earlier deaths are forgotten
GIVE_UP = 4  # deaths in a row of a service that was never ready: it will not come up by trying again
USAGE_ERROR = 2  # exit status of a service that refuses its configuration: trying again is pointless
# Parts of the drain. The gateway finishes answers with the engine, which is asked to stop after it.
SERVICE_PART = 0.7  # what a service has
GATEWAY_PART = 0.75  # after which the engine is asked, gateway or not
ENGINE_PART = 0.12  # what the engine has, then
KILL_PART = 0.9  # after which whoever is left is killed
POLL = 0.1  # seconds between looks at the children
HEALTH_EVERY = 5.0  # seconds between questions to a ready service whether it is alive
ILL = 3  # times in a row that it says no, after which it is started anew
LOG_LIMIT = 16_777_216  # bytes after which a service's log is set aside at its next start
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

# Longest to get ready first: they share few cores, and whoever is left over waits for the engine anyway.
ORDER = ("engine", "scorer", "gateway", "learner", "releaser", "assembler")
PORT_KEYS = {
    "gateway": ("gateway", "port"),
    "engine": ("serving", "port"),
    "assembler": ("services", "assembler_port"),
    "scorer": ("services", "reward_port"),
    "learner": ("services", "learner_port"),
    "releaser": ("services", "releaser_port"),
}


class ServiceFailed(EverloopError):
    """A service that does not come up; the message has the end of its log."""


@dataclass(frozen=True)
class Service:
    """What to start and where it will answer."""

    name: str
    command: tuple[str, ...]
    url: str
    environment: Mapping[str, str]


@dataclass
class Child:
    """One service's process. Times are of a monotonic clock, in seconds.

    ``deaths`` counts those in a row, ``ill`` the times in a row that its health was bad. ``kill_at``: it was asked to
    end for that, and has until then. ``log_at``: the byte of its log at which what this process printed begins.
    """

    service: Service
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    start_at: float = 0.0
    deaths: int = 0
    ready: bool = False
    ever_ready: bool = False
    ill: int = 0
    ask_at: float = 0.0
    kill_at: float | None = None
    log_at: int = 0


def services(config: Config) -> list[Service]:
    """The services that this configuration needs, in starting order, each with a port of its own.

    Port 0 becomes a free port here, once, so that a service that is restarted comes back where others look for it.

    Raises:
        ConfigError: a port is taken by another program; names the key to change.
    """
    keys = port_keys(config)
    with contextlib.ExitStack() as held:  # all at once: a free port that was let go may be given out again
        ports = {name: _claim(config, name, key, held) for name, key in keys.items()}
    environment = {"EVERLOOP_HOME": str(config.home.absolute())}
    for name, port in ports.items():
        section, key = keys[name]
        environment[f"EVERLOOP_{section}__{key}".upper()] = str(port)
    return [
        Service(
            name,
            (sys.executable, "-m", f"services.{name}"),
            base_url(getattr(config, keys[name][0]).host, ports[name]),
            {**environment, **_user(config, name), "EVERLOOP_SERVICES__DRAIN": f"{_drain(config, name):.2f}"},
        )
        for name in ORDER
        if name in keys
    ]


def port_keys(config: Config) -> dict[str, tuple[str, str]]:
    """Section and key of each port that ``everloop up`` gives out. A vLLM has its own beside the engine's service."""
    keys = dict(PORT_KEYS)
    if not config.serving.ours:
        del keys["engine"]
    elif config.serving.url == "vllm":
        keys |= {"engine": ("services", "engine_port"), "vLLM": PORT_KEYS["engine"]}
    return keys


def _user(config: Config, name: str) -> dict[str, str]:
    """What makes a service come to the log as its own user; nothing where it has none. Its processes inherit it."""
    users: Mapping[str, LogUser] = dict(config.log.users)  # by any name: the engine has none
    its = users.get(name)
    if its is None:
        return {}
    return {
        "EVERLOOP_LOG__USERNAME": json.dumps(its.username),  # quoted: else a name such as 007 would be a number
        "EVERLOOP_LOG__PASSWORD_FILE": json.dumps(str(its.password_file.absolute())),
    }


def _drain(config: Config, name: str) -> float:
    """Seconds of the whole that a service has."""
    return (ENGINE_PART if name == "engine" else SERVICE_PART) * config.services.drain


def base_url(host: str, port: int) -> str:
    reachable = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _claim(config: Config, name: str, setting: tuple[str, str], held: contextlib.ExitStack) -> int:
    """The port of a service, bound in ``held`` until all have theirs."""
    section, key = setting
    host, port = str(getattr(config, section).host), int(getattr(getattr(config, section), key))
    probe = held.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host, port))
    except OSError as error:
        held = holder(base_url(host, port)) or "what uses that port"
        raise ConfigError(
            f"the {name} cannot listen on {host}:{port} ({error.strerror}). Stop {held}, or choose "
            f"another: [{section}] {key} = … in everloop.toml, or EVERLOOP_{section.upper()}__{key.upper()}=… "
            "(0: any free one)"
        ) from None
    return int(probe.getsockname()[1])


@contextlib.contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Hold the home's lock. Raises ConfigError where another ``everloop up`` has it; a dead one's is free at once."""
    path = home / "run" / "up.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ConfigError(
                f"Everloop already runs on {home} (process {file.read().strip() or 'unknown'}). 'everloop status' "
                "shows it; stop it there with Ctrl-C, or give this one another folder with --home"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class Stop:
    """The signal that asked this process to stop; None until then.

    The handler does no more than remember: it runs between any two steps of the main thread, which may hold the very
    lock that an Event or a print would take.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._asked)

    def _asked(self, number: int, frame: object) -> None:
        self.signal = self.signal or signal.Signals(number)


class Supervisor:
    """Runs services until told to stop. ``say`` gets one short line for every change of state."""

    def __init__(self, wanted: Sequence[Service], home: Path, *, drain: float, say: Callable[[str], None]) -> None:
        self.children = [Child(service) for service in wanted]
        self.home = home
        self.drain = drain
        self.say = say
        (home / "logs").mkdir(parents=True, exist_ok=True)

    def run(self, stop: Stop, on_ready: Callable[[float], None]) -> None:
        """Start all, call ``on_ready(seconds)`` once when every service is ready, and keep them up until ``stop``.

        Raises:
            ServiceFailed: one never got ready and never will; everything is down again.
        """
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        begun, announced = time.monotonic(), False
        try:
            while not stop.signal:
                for child in self.children:
                    self._look_after(child, time.monotonic())
                self._bury_orphans()
                if not announced and all(child.ready for child in self.children):
                    announced = True
                    on_ready(time.monotonic() - begun)
                time.sleep(POLL)
            self.say(f"{stop.signal.name}: finishing what is under way …")
        finally:
            self._take_down()

    def _look_after(self, child: Child, now: float) -> None:
        if child.process is None:
            if now >= child.start_at:
                self._start(child, now)
        elif child.process.poll() is not None:
            self._died(child, now)
        elif not child.ready and self._answers(child):
            child.ready = child.ever_ready = True
            self.say(f"{child.service.name} is ready ({now - child.started:.1f} s)")
        elif child.ready:
            self._watch(child, now)
            if child.deaths and now - child.started > STABLE:
                child.deaths = 0

    def _watch(self, child: Child, now: float) -> None:
        """End one that goes on to say that it is stuck. One that says nothing may be busy, and is left alone."""
        if child.kill_at is not None:
            if now >= child.kill_at and child.process is not None:
                self.say(f"{child.service.name} did not stop in time and is killed")
                _kill_group(child.process.pid)
            return
        if now < child.ask_at:
            return
        child.ask_at = now + HEALTH_EVERY
        trouble = complaint(child.service.url)
        child.ill = child.ill + 1 if trouble else 0
        if child.ill >= ILL:
            self.say(f"{child.service.name} is stuck and is started again: {trouble}")
            self._ask_to_stop([child])
            child.kill_at = now + SERVICE_PART * self.drain

    def _start(self, child: Child, now: float) -> None:
        with self._log(child.service.name) as log:
            child.log_at = log.tell()
            child.process = subprocess.Popen(
                child.service.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **child.service.environment},
                process_group=0,  # Ctrl-C at the terminal reaches the supervisor alone, which drains
                preexec_fn=die_with_parent,  # safe: this process has one thread
            )
        child.started, child.ready = now, False
        child.ill, child.ask_at, child.kill_at = 0, now, None

    def _log(self, name: str) -> BinaryIO:
        path = self.log_path(name)
        if path.exists() and path.stat().st_size > LOG_LIMIT:
            path.replace(path.with_suffix(".log.1"))
        return path.open("ab")

    def log_path(self, name: str) -> Path:
        return self.home / "logs" / f"{name}.log"

    def _died(self, child: Child, now: float) -> None:
        assert child.process is not None
        status, name = child.process.returncode, child.service.name
        _kill_group(child.process.pid)
        child.process, child.ready, child.deaths = None, False, child.deaths + 1
        if not child.ever_ready and (status == USAGE_ERROR or child.deaths >= GIVE_UP):
            raise ServiceFailed(
                f"the {name} does not start (exit status {status}). The end of {self.log_path(name)}:\n"
                + self._log_end(child)
            )
        pause = min(FIRST_PAUSE * 2 ** (child.deaths - 1), LONGEST_PAUSE)
        child.start_at = now + pause
        self.say(f"{name} died ({_how(status)}), starts again in {pause:g} s; see {self.log_path(name)}")

    def _log_end(self, child: Child, lines: int = 8) -> str:
        """Of what its newest process printed: earlier starts may have failed by what is mended since."""
        text = self.log_path(child.service.name).read_bytes()[child.log_at :][-4096:].decode(errors="replace")
        return "\n".join("    " + line for line in text.splitlines()[-lines:])

    @staticmethod
    def _answers(child: Child) -> bool:
        try:
            with urllib.request.urlopen(f"{child.service.url}/readyz", timeout=1) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError, ValueError):
            return False

    def _bury_orphans(self) -> None:
        """Reap what dead children left behind and the kernel handed to this process."""
        known = {child.process.pid for child in self.children if child.process}
        for pid in _children_of_this_process():
            if pid not in known:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    def _take_down(self) -> None:
        """The engine once the gateway is down, which finishes answers with it; who stays until the end is killed."""
        begun = time.monotonic()
        first = [child for child in self.children if child.service.name != "engine"]
        self._ask_to_stop(first)
        gateway = [child for child in first if child.service.name == "gateway"]
        self._await(gateway, begun + GATEWAY_PART * self.drain)
        self._ask_to_stop([child for child in self.children if child not in first])  # a second signal cuts short
        self._await(self.children, begun + KILL_PART * self.drain)
        for child in self.children:
            if child.process is not None:
                if child.process.poll() is None:
                    self.say(f"{child.service.name} did not stop in time and is killed")
                _kill_group(child.process.pid)
                child.process.wait()
        self._kill_the_rest()

    @staticmethod
    def _ask_to_stop(children: Sequence[Child]) -> None:
        for child in children:
            if child.process is not None and child.process.poll() is None:
                child.process.terminate()

    @staticmethod
    def _await(children: Sequence[Child], deadline: float) -> None:
        while time.monotonic() < deadline and any(c.process and c.process.poll() is None for c in children):
            time.sleep(0.02)

    @staticmethod
    def _kill_the_rest(limit: float = 1.0) -> None:
        end = time.monotonic() + limit
        while (left := _children_of_this_process()) and time.monotonic() < end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)


def complaint(url: str) -> str | None:
    """What a service's /healthz finds wrong; None where that is nothing, or it does not answer."""
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=1):
            return None
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
            return None
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
            return "; ".join(map(str, json.loads(error.read(65_536))["trouble"].values()))
        return "it does not say why"
    except (OSError, ValueError):
        return None


def _how(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _children_of_this_process() -> list[int]:
    """Direct children, adopted ones among them. Empty where the system does not tell (not Linux)."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _prctl(option: int, value: int) -> None:
    if _libc is not None:
        _libc.prctl(option, value, 0, 0, 0)


def die_with_parent() -> None:
    """Runs in the child between fork and exec. SIGTERM, so that the child drains as at any other stop."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
