"""The supervisor, with small real services: restarts, readiness, the drain, and that nothing outlives it."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from everloop.config import Config, load
from everloop.errors import ConfigError
from everloop.home import Home

from services import supervisor
from services.supervisor import ORDER, PORT_KEYS, only_one, services

SERVICE = """
import http.server, os, subprocess, sys, signal
port, mode = int(sys.argv[1]), sys.argv[2]
if mode == "broken": print("the weights are missing"); sys.exit(1)
if mode == "refuses": print("serving.url: nonsense"); sys.exit(2)
if "stubborn" in mode: signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "parent": print("child", subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ill = "ill" in mode and self.path == "/healthz"
        self.send_response(503 if ill else 200)
        self.end_headers()
        self.wfile.write(b'{"ok": false, "trouble": {"learn": "it hangs"}}' if ill else b"ok")
    def log_message(self, *a): pass
print("pid", os.getpid(), flush=True)
if mode == "counts":
    import threading, time
    def ask(*_):
        print("asked", os.getpid(), flush=True)
        threading.Thread(target=lambda: (time.sleep(1), os._exit(0))).start()
    signal.signal(signal.SIGTERM, ask)
http.server.ThreadingHTTPServer.allow_reuse_address = True
http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""

SUPERVISOR = """
import json, sys
from pathlib import Path
from services import supervisor
from services.supervisor import Service, Stop, Supervisor, ServiceFailed
supervisor.HEALTH_EVERY = 0.2
home, drain, wanted = Path(sys.argv[1]), float(sys.argv[2]), json.loads(sys.argv[3])
made = [Service(n, (sys.executable, "-c", sys.argv[4], str(port), mode), f"http://127.0.0.1:{port}", {})
        for n, port, mode in wanted]
try:
    Supervisor(made, home, drain=drain, say=lambda line: print(line, flush=True)).run(
        Stop(), lambda s: print("ALL READY", flush=True))
except ServiceFailed as error:
    print(error); sys.exit(2)
print("DOWN", flush=True)
"""


class Up:
    """A supervisor in a process of its own, with what it has said so far."""

    def __init__(self, root: Path, *modes: str, drain: float = 4, names: tuple[str, ...] = ("s0", "s1")) -> None:
        self.root = root
        wanted = [(name, free_port(), mode) for name, mode in zip(names, modes, strict=False)]
        self.output = root / "console"
        root.mkdir(parents=True, exist_ok=True)
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISOR, str(root), str(drain), json.dumps(wanted), SERVICE], stdout=file
            )

    def says(self, text: str) -> bool:
        return text in self.output.read_text()

    def pids(self, service: str, word: str = "pid") -> list[int]:
        path = self.root / "logs" / f"{service}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [int(line.split()[1]) for line in lines if line.startswith(word + " ")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    made: list[Up] = []

    def starter(*modes: str, **options: Any) -> Up:
        made.append(Up(tmp_path / f"up{len(made)}", *modes, **options))
        return made[-1]

    yield starter
    for up in made:
        if up.process.poll() is None:
            up.process.kill()
            up.process.wait()


@pytest.mark.processes
def test_restarts_what_dies_and_reaps_everything_at_a_stop(start: Callable[..., Up], until: Callable[..., Any]) -> None:
    up = start("good", "parent")
    until(lambda: up.says("ALL READY"))
    first = up.pids("s0")[0]
    os.kill(first, signal.SIGKILL)
    until(lambda: len(up.pids("s0")) == 2)
    assert up.says("s0 died (killed by SIGKILL)")
    until(lambda: up.output.read_text().count("s0 is ready") == 2)
    everybody = [*up.pids("s0"), *up.pids("s1"), *up.pids("s1", "child")]
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=60) == 0
    assert up.says("DOWN")
    assert len(everybody) == 4
    assert not [pid for pid in everybody if alive(pid)]


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["ill", "ill and stubborn"])
def test_a_service_that_says_it_is_stuck_is_started_again(
    start: Callable[..., Up], until: Callable[..., Any], mode: str
) -> None:
    up = start("good", mode, drain=1)
    until(lambda: len(up.pids("s1")) >= 2)
    assert up.says("s1 is stuck and is started again: it hangs")
    assert up.says("s1 did not stop in time and is killed") == ("stubborn" in mode)
    assert len(up.pids("s0")) == 1, "one that is well is left alone"
    up.process.terminate()
    assert up.process.wait(timeout=60) == 0


@pytest.mark.processes
def test_a_service_that_ignores_the_stop_is_killed_in_time(start: Callable[..., Up], until: Callable[..., Any]) -> None:
    up = start("stubborn", drain=2)
    until(lambda: up.says("ALL READY"))
    up.process.terminate()
    assert up.process.wait(timeout=60) == 0
    assert up.says("did not stop in time")
    assert not alive(up.pids("s0")[0])


class Clock:
    """Time that passes in sleep alone, so that a loaded machine adds none."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Slow:
    """A process that ends so many seconds after it was asked to."""

    pid, returncode = 0, None

    def __init__(self, clock: Clock, takes: float) -> None:
        self.clock, self.takes = clock, takes
        self.asked: float | None = None

    def terminate(self) -> None:
        assert self.asked is None, "a second signal cuts short"
        self.asked = self.clock.now

    def poll(self) -> int | None:
        return 0 if self.asked is not None and self.clock.now >= self.asked + self.takes else None

    def wait(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("gateway", "engine", "learner", "killed"),
    [
        (1.0, 1.0, 1.0, []),
        (7.0, 1.0, 7.0, []),
        (25.0, 1.0, 1.0, ["gateway"]),
        (1.0, 25.0, 1.0, ["engine"]),
        (25.0, 25.0, 25.0, ["gateway", "engine", "learner"]),
    ],
)
def test_a_drain_ends_within_its_limit_whatever_services_do(
    tmp_path: Path, monkeypatch: Any, gateway: float, engine: float, learner: float, killed: list[str]
) -> None:
    clock, said = Clock(), []
    monkeypatch.setattr(supervisor, "time", clock)
    monkeypatch.setattr(supervisor, "_kill_group", lambda pid: None)
    monkeypatch.setattr(supervisor.Supervisor, "_kill_the_rest", lambda self: None)
    taken = {"gateway": gateway, "engine": engine, "learner": learner}
    wanted = [supervisor.Service(name, (), "http://127.0.0.1:9", {}) for name in taken]
    made = supervisor.Supervisor(wanted, tmp_path, drain=10.0, say=said.append)
    for child in made.children:
        child.process = Slow(clock, taken[child.service.name])  # type: ignore[assignment]
    made._take_down()
    assert clock.now <= 10.0
    assert [line.split()[0] for line in said] == killed
    assert killed or clock.now <= gateway + engine + 0.2, "nobody waits for longer than it takes"


@pytest.mark.processes
def test_a_service_that_finishes_its_work_is_asked_once(start: Callable[..., Up], until: Callable[..., Any]) -> None:
    """A second signal means: end at once."""
    up = start("counts", "counts", "good", names=("gateway", "learner", "engine"))
    until(lambda: up.says("ALL READY"))
    up.process.terminate()
    assert up.process.wait(timeout=60) == 0
    assert len(up.pids("gateway", "asked")) == len(up.pids("learner", "asked")) == 1


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_services_do_not_outlive_a_killed_supervisor(start: Callable[..., Up], until: Callable[..., Any]) -> None:
    up = start("good", "good")
    until(lambda: up.says("ALL READY"))
    pids = [*up.pids("s0"), *up.pids("s1")]
    up.process.kill()
    up.process.wait()
    until(lambda: not [pid for pid in pids if alive(pid)])


@pytest.mark.processes
@pytest.mark.parametrize(
    ("mode", "told"), [("broken", "the weights are missing"), ("refuses", "serving.url: nonsense")]
)
def test_a_service_that_never_comes_up_ends_it_with_its_last_words(
    start: Callable[..., Up], tmp_path: Path, mode: str, told: str
) -> None:
    logs = tmp_path / "up0" / "logs"
    logs.mkdir(parents=True)
    (logs / "s1.log").write_text("what an earlier start was refused for\n")
    up = start("good", mode)
    assert up.process.wait(timeout=30) == 2
    assert up.says(told)
    assert not up.says("earlier start"), "that may be mended since"
    assert not [pid for pid in up.pids("s0") if alive(pid)]


def test_a_home_runs_once(home: Home) -> None:
    with (
        only_one(home.root),
        pytest.raises(ConfigError, match=f"already runs on .*process {os.getpid()}"),
        only_one(home.root),
    ):
        pass
    with only_one(home.root):
        pass  # free again


def config_with(home: Home, port: int) -> Config:
    """The gateway's port, and free ones for all others: an Everloop of somebody's may run on the defaults."""
    free = {f"{name}_port": 0 for name in ("assembler", "reward", "learner", "releaser", "engine")}
    return Config.model_validate(
        {"home": home.root, "gateway": {"port": port}, "serving": {"port": 0}, "services": free}
    )


def test_a_taken_port_is_refused_by_the_key_to_change(home: Home) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = config_with(home, port)
        with pytest.raises(ConfigError, match=r"Stop what uses that port, .*\[gateway\] port = "):
            services(config)


def test_an_everloop_that_holds_a_port_is_named(home: Home) -> None:
    class Says(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"service": "gateway", "pid": 7, "home": "/elsewhere"}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Says) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = config_with(home, server.server_port)
        with pytest.raises(ConfigError, match=r"Stop another Everloop, the gateway \(process 7\) of /elsewhere, or"):
            services(config)
        server.shutdown()


def test_every_service_gets_a_port_of_its_own(home: Home) -> None:
    config = config_with(home, 0)
    made = services(config)
    assert [service.name for service in made] == list(ORDER)
    assert len({service.url for service in made}) == len(ORDER)
    section, key = PORT_KEYS["scorer"]
    scorer = next(service for service in made if service.name == "scorer")
    assert scorer.environment[f"EVERLOOP_{section}__{key}".upper()] == scorer.url.rpartition(":")[2]
    elsewhere = config.serving.model_copy(update={"url": "http://10.0.0.1:8000"})
    remote = config.model_copy(update={"serving": elsewhere})
    assert "engine" not in [service.name for service in services(remote)]


def test_vllm_and_the_service_that_looks_after_it_have_a_port_each(home: Home) -> None:
    config = config_with(home, 0)
    config = config.model_copy(update={"serving": config.serving.model_copy(update={"url": "vllm"})})
    made = {service.name: service for service in services(config)}
    assert list(made) == list(ORDER)
    environment = made["gateway"].environment
    assert made["engine"].url.endswith(f":{environment['EVERLOOP_SERVICES__ENGINE_PORT']}")
    assert environment["EVERLOOP_SERVING__PORT"] not in {service.url.rpartition(":")[2] for service in made.values()}


def test_a_service_comes_to_the_log_as_its_own_user_and_the_others_as_the_one_for_all(tmp_path: Path):
    ports = {f"{name}_port": 0 for name in ("assembler", "reward", "learner", "releaser")}
    users = {"gateway": {"username": "007", "password_file": tmp_path / "a file"}}
    log = {"url": "kafka://b", "security": "sasl", "username": "operator", "password": "p", "users": users}
    config = Config(home=tmp_path / "home", log=log, gateway={"port": 0}, serving={"url": "http://x"}, services=ports)
    found = {service.name: service.environment for service in services(config)}
    its = load(
        environment=dict(found["gateway"]) | {"EVERLOOP_LOG__URL": "kafka://b", "EVERLOOP_LOG__SECURITY": "sasl"}
    )
    assert (its.log.username, its.log.password_file) == ("007", tmp_path / "a file")
    assert not any(name.startswith("EVERLOOP_LOG__") for name in found["scorer"])
