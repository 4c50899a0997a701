"""One broker process and its folder.

::

    start ─▶ format (the first time) ─▶ java … kafka.Kafka ─▶ its port accepts ─▶ broker.pid
    stop ─▶ SIGTERM, after a while SIGKILL ─▶ broker.pid is gone

A process is known by the pid in ``broker.pid`` and by the folder in its command line, so that a pid that another
program got meanwhile is left alone. It outlives whoever started it, unless it is tied to that one.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
import uuid
from base64 import urlsafe_b64encode
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from services.broker.jars import RECIPE, NoBroker, installed
from services.broker.settings import Secured, Settings, properties

READY_SECONDS = 60.0
STOP_SECONDS = 20.0
HEAP = ("-Xms128m", "-Xmx512m")


class Broker:
    """The broker of ``folder``. ``port`` 0: a free one, kept for the next start of this object.

    ``tied``: it is killed when the thread that started it ends, so that a test run that is killed leaves none behind.
    """

    def __init__(
        self,
        folder: Path,
        port: int = 0,
        *,
        secured: Secured | None = None,
        more: dict[str, str] | None = None,
        tied: bool = False,
    ) -> None:
        self.folder = folder.absolute()
        self._settings = Settings(self.folder, port, 0, secured=secured, more=more or {})
        self._tied = tied

    @property
    def address(self) -> str:
        """``host:port`` for clients. Raises NoBroker before the first start."""
        try:
            found = re.search(r"CLIENT://(127\.0\.0\.1:\d+)", self._file.read_text())
        except OSError:
            found = None
        if found is None:
            raise NoBroker(f"no broker was ever started in {self.folder}")
        return found[1]

    @property
    def pid(self) -> int | None:
        """Of the running process; None where there is none."""
        try:
            pid = int((self.folder / "broker.pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if str(self._file).encode() in command.split(b"\0") else None

    @property
    def _file(self) -> Path:
        return self.folder / "server.properties"

    def start(self) -> float:
        """Start it and wait until its port accepts; returns the seconds that took, 0.0 where it ran already.

        Raises NoBroker: it cannot be installed, its port is taken, or it ended; the message has its last words.
        """
        if self.pid is not None:
            return 0.0
        self._await_end()
        jars = installed()
        began = time.monotonic()
        self._settings = _with_ports(self._settings)
        self._prepare(jars)
        with (self.folder / "broker.log").open("wb") as log:
            process = subprocess.Popen(
                [*self._java(jars), "kafka.Kafka", self._file],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent if self._tied else None,
            )
        (self.folder / "broker.pid").write_text(str(process.pid))
        self._wait_until_ready(process)
        return time.monotonic() - began

    def _await_end(self) -> None:
        """One that is ending has no command line any more, and yet its threads hold its ports for a moment."""
        with suppress(OSError, ValueError):
            pid = int((self.folder / "broker.pid").read_text())
            if not Path(f"/proc/{pid}/cmdline").read_bytes():
                _ended(pid, STOP_SECONDS)

    def _java(self, jars: Path) -> list[str | Path]:
        logging = f"-Dlog4j2.configurationFile={RECIPE / 'log4j2.properties'}"
        java = shutil.which("java") or "java"
        return [java, *HEAP, "-XX:+ExitOnOutOfMemoryError", logging, "-cp", f"{jars}/*"]

    def _prepare(self, jars: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file.write_text(properties(self._settings))
        secured = self._settings.secured
        if secured is not None:
            (self.folder / "identity.pem").touch(mode=0o600)
            (self.folder / "identity.pem").write_text(secured.key.read_text() + secured.certificate.read_text())
        if (self.folder / "data" / "meta.properties").exists():
            return
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A")
        users = secured.users if secured else {}
        arguments = [f"SCRAM-SHA-512=[name={name},password={password}]" for name, password in users.items()]
        command = [*self._java(jars), "kafka.tools.StorageTool", "format", "-t", cluster, "-c", self._file]
        command += [part for argument in arguments for part in ("--add-scram", argument)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoBroker(f"the folder {self.folder / 'data'} could not be formatted: {done.stderr.strip()[-500:]}")

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + READY_SECONDS
        while not _accepts(self._settings.port):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                process.wait()
                (self.folder / "broker.pid").unlink(missing_ok=True)
                raise NoBroker(f"the broker in {self.folder} did not start. Its last words: {self._last_words()}")
            time.sleep(0.05)

    def _last_words(self) -> str:
        lines = (self.folder / "broker.log").read_text(errors="replace").splitlines()
        telling = [line for line in lines if "Exception" in line or "ERROR" in line or "rror:" in line]
        return (telling or lines or ["none"])[-1].strip()[:400]

    def stop(self) -> bool:
        """End it in good order, else by force after 20 s; False where none ran."""
        pid = self.pid
        if pid is not None:
            _send(pid, signal.SIGTERM, signal.SIGCONT)
            if not _ended(pid, STOP_SECONDS):
                self.kill()
        (self.folder / "broker.pid").unlink(missing_ok=True)
        return pid is not None

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        pid = self.pid
        if pid is not None:
            _send(pid, signal.SIGKILL)
            _ended(pid, STOP_SECONDS)

    def freeze(self) -> None:
        """SIGSTOP, and wait until every thread has stopped: its connections stay open and nothing answers."""
        pid = self.pid
        _send(pid, signal.SIGSTOP)
        end = time.monotonic() + STOP_SECONDS
        while pid is not None and not _stopped(pid) and time.monotonic() < end:
            time.sleep(0.01)

    def thaw(self) -> None:
        """SIGCONT."""
        _send(self.pid, signal.SIGCONT)


def _send(pid: int | None, *numbers: signal.Signals) -> None:
    if pid is None:
        return
    with suppress(ProcessLookupError):
        for number in numbers:
            os.kill(pid, number)


def _stopped(pid: int) -> bool:
    states = []
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            states.append(thread.read_text().rpartition(")")[2].split()[0])
    return all(state in "TtZX" for state in states)


def _ended(pid: int, seconds: float) -> bool:
    """Whether the process, all its threads and their sockets with it, is gone within ``seconds``."""
    end = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists():
        with suppress(ChildProcessError):  # reaps it where it is a child of this process
            os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _with_ports(settings: Settings) -> Settings:
    """Every port that is 0 replaced by a free one. Raises NoBroker where the one that was asked for is taken."""
    if settings.port and _accepts(settings.port):
        raise NoBroker(
            f"port {settings.port} of this machine is taken by another program: stop it, or give another with --port"
        )
    with ExitStack() as stack:
        free = [_claimed(stack) for _ in range(3)]
    return replace(
        settings,
        port=settings.port or free[0],
        controller=settings.controller or free[1],
        internal=settings.internal or free[2],
    )


def _claimed(stack: ExitStack) -> int:
    """A port that is free, held until ``stack`` ends so that the next call gives another.

    From below the range that outgoing connections take theirs from: one of those could sit on it at a restart.
    """
    for _ in range(200):
        held = stack.enter_context(socket.socket())
        port = 20_000 + secrets.randbelow(10_000)
        with suppress(OSError):
            held.bind(("127.0.0.1", port))
            return port
    raise NoBroker("no free port between 20000 and 30000 on this machine")
