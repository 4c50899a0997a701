"""TLS, passwords and permissions on a real broker, with a certificate authority made for it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from everloop.errors import LogError
from everloop.home import Home
from everloop.log import Access, NewRecord, connect
from everloop.log.kafka.grants import Grant, user_of
from everloop.log.kafka.log import KafkaLog
from everloop.log.kafka.plan import carry_out
from everloop.log.kafka.settings import Address
from everloop.log.spool import Spool
from everloop.topics import TOPICS

from services.broker.process import Broker
from services.broker.settings import ADMIN, Secured
from services.faust_worker import FaustWorker
from services.gateway.routes import Routes

pytestmark = pytest.mark.kafka
PREFIX = "team"
Until = Callable[..., Any]


def opened(broker: Broker, ca: Path, user: str, **options: Any) -> KafkaLog:
    access = Access("sasl", ca, user, f"password-of-{user}")
    log = connect(f"kafka://{broker.address}/{PREFIX}", access=access, **options)
    assert isinstance(log, KafkaLog)
    return log


@pytest.fixture
def as_service(secured: Broker, authority: tuple[Path, Path, Path]) -> Iterator[Callable[[str], KafkaLog]]:
    made: list[KafkaLog] = []

    def log_of(service: str) -> KafkaLog:
        made.append(opened(secured, authority[0], user_of(service, Address((), PREFIX)), create_topics=False))
        return made[-1]

    yield log_of
    for log in made:
        log.close()


def new(topic: str) -> NewRecord:
    return NewRecord(topic, "t/ep_1", b"v")


def test_each_service_does_its_own_work(as_service: Callable[[str], KafkaLog], until: Until) -> None:
    (position,) = as_service("gateway").append([new("events")])
    assembler = as_service("assembler")
    consumer = assembler.consumer("assemble", ["events"], member="assemble")
    until(lambda: consumer.poll(timeout=0.2))
    assembler.fenced("assemble-0").write(
        [new("episodes")],
        placed=[(new("everloop-state-assemble"), 0)],
        offsets={("events", position.partition): position.offset + 1},
        group=consumer.membership(),
    )
    until(lambda: assembler.committed("assemble", "events"))
    scorer = as_service("scorer")
    until(lambda: any(scorer.read("episodes", partition) for partition in range(4)))


@pytest.mark.parametrize(
    ("service", "topic"),
    [("assembler", "events"), ("scorer", "episodes"), ("gateway", "routes"), ("learner", "routes")],
)
def test_a_service_cannot_write_a_topic_that_is_not_its_own(
    as_service: Callable[[str], KafkaLog], service: str, topic: str
) -> None:
    with pytest.raises(LogError, match=f"'{PREFIX}-{service}' has no permission.*everloop topics apply"):
        as_service(service).append([new(topic)])


def test_a_service_cannot_read_or_take_what_is_not_its_own(as_service: Callable[[str], KafkaLog]) -> None:
    gateway = as_service("gateway")
    with pytest.raises(LogError, match="has no permission"):
        gateway.read("episodes", 0)
    with pytest.raises(LogError, match="has no permission"):
        gateway.committed("assemble", "events")
    with pytest.raises(LogError, match="has no permission"):
        as_service("scorer").fenced("assemble-0")
    with pytest.raises(LogError, match="has no permission"):
        as_service("learner").plan()


def test_the_operator_may_use_all_of_the_installation(as_service: Callable[[str], KafkaLog]) -> None:
    operator = as_service("operator")
    for topic in TOPICS:
        operator.append([new(topic)])
        assert sum(operator.end_offsets(topic)) > 0


def test_grants_that_are_missing_or_too_many_are_differences(
    secured: Broker, authority: tuple[Path, Path, Path]
) -> None:
    from everloop.log.kafka.grants import Grant

    log = opened(secured, authority[0], ADMIN)
    extra = Grant(f"{PREFIX}-gateway", "WRITE", "TOPIC", f"{PREFIX}.routes")
    missing = Grant(f"{PREFIX}-gateway", "WRITE", "TOPIC", f"{PREFIX}.events")
    log.cluster.grant(extra)
    log.cluster.take(missing)
    plan = log.plan()
    assert [change.what for change in plan.changes] == [f"grant: {missing}", f"take away: {extra}"]
    carry_out(plan.changes)
    assert log.plan().changes == []
    log.close()


def test_tls_alone(tmp_path: Path, authority: tuple[Path, Path, Path]) -> None:
    ca, certificate, key = authority
    broker = Broker(tmp_path / "tls", secured=Secured(certificate, key, ca))
    broker.start()
    try:
        log = connect(f"kafka://{broker.address}", access=Access("tls", ca))
        (position,) = log.append([new("events")])
        assert log.read("events", position.partition)[0].value == b"v"
        log.close()
    finally:
        broker.stop()


@pytest.fixture(scope="module")
def start_seconds() -> float:
    """What a command takes here until it begins: much on busy cores, and nothing that Kafka is to blame for."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import services.commands.up, everloop.log.kafka.log"], check=True)
    return time.monotonic() - began


def command(tmp_path: Path, url: str, *arguments: str, **settings: object) -> tuple[int, str, float]:
    """A command as a person calls it ('topics check'): exit status, what it says, seconds."""
    environment = {
        **os.environ,
        "EVERLOOP_HOME": str(tmp_path / "home"),
        "EVERLOOP_LOG__URL": url,
        **{f"EVERLOOP_LOG__{name.upper()}": json.dumps(str(value)) for name, value in settings.items()},
    }
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "everloop.cli.main", *(arguments or ("topics", "check"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, (done.stderr or done.stdout).strip(), time.monotonic() - began


def told(start_seconds: float, tmp_path: Path, url: str, *arguments: str, **settings: object) -> str:
    """What a command says that cannot begin: one line, soon, and no password."""
    for _ in range(2):  # a broker that has no processor time is told of as one that does not answer
        status, said, seconds = command(tmp_path, url, *arguments, **settings)
        if "does not answer" not in said:
            break
    assert status == 2, said
    assert len(said.splitlines()) == 1, said
    assert "password-of" not in said
    assert seconds - start_seconds < 15
    return said


@pytest.mark.parametrize("arguments", [("topics", "check"), ("up",), ("worker", "assemble")], ids="-".join)
def test_a_command_that_reaches_no_broker_says_so(
    tmp_path: Path, start_seconds: float, arguments: tuple[str, ...]
) -> None:
    Home(tmp_path / "home").secret()  # a worker asks for a home that is known
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        silent_port, free_port = silent.getsockname()[1], nobody.getsockname()[1]
        url = f"kafka://127.0.0.1:{silent_port},127.0.0.1:{free_port}"
        status, said, seconds = command(tmp_path, url, *arguments)
    assert (status, len(said.splitlines())) == (2, 1), said
    assert "takes connections and does not answer" in said
    assert f"nothing listens at 127.0.0.1:{free_port}" in said
    assert seconds - start_seconds < 15


@pytest.mark.parametrize("arguments", [("up",), ("worker", "assemble")], ids="-".join)
def test_what_cannot_begin_says_why(
    tmp_path: Path,
    secured: Broker,
    authority: tuple[Path, Path, Path],
    start_seconds: float,
    arguments: tuple[str, ...],
) -> None:
    Home(tmp_path / "home").secret()  # a worker asks for a home that is known
    at, its = f"kafka://{secured.address}", {"security": "sasl", "ca_file": authority[0]}
    admin, stranger = ({"username": name, "password": f"password-of-{name}"} for name in (ADMIN, f"{PREFIX}-learner"))

    def said(prefix: str, **more: object) -> str:
        return told(start_seconds, tmp_path, f"{at}/{prefix}", *arguments, **its, **more)

    assert "name or password is wrong" in said(PREFIX, **admin | {"password": "wrong"})
    assert "has no permission" in said(PREFIX, **stranger)
    assert "there is no topic 'empty.events'" in said("empty", **admin, create_topics="false")


def test_what_keeps_us_out_is_said_in_one_line(
    tmp_path: Path,
    secured: Broker,
    authority: tuple[Path, Path, Path],
    pem: Callable[..., tuple[Path, Path, Path]],
    start_seconds: float,
) -> None:
    ca = authority[0]
    other = pem(tmp_path / "other", "another")[0]
    url = f"kafka://{secured.address}/{PREFIX}"
    user: dict[str, object] = {"security": "sasl", "username": ADMIN, "password": f"password-of-{ADMIN}"}
    asked: list[tuple[dict[str, object], str]] = [
        (user | {"ca_file": ca, "password": "wrong"}, "log.password_file"),
        (user | {"ca_file": ca, "username": "nobody"}, "name or password is wrong"),
        (user | {"ca_file": other}, "log.ca_file"),
        ({"security": "tls", "ca_file": ca}, "log.security = 'tls'"),
        ({}, "log.security = 'plaintext'"),
        (user | {"ca_file": ca, "username": f"{PREFIX}-gateway", "password": f"password-of-{PREFIX}-gateway"}, "apply"),
    ]
    for settings, says in asked:
        assert says in told(start_seconds, tmp_path, url, **settings)


def test_a_worker_comes_with_its_service_s_password_and_permissions(
    as_service: Callable[[str], KafkaLog], tmp_path: Path, until: Until
) -> None:
    class Echo:
        name, topics = "assemble", ("events",)

        def handle(self, state: Any, record: Any, now: float) -> list[NewRecord]:
            state.put(record.key, b"seen")
            return [NewRecord("episodes", record.key, b"echo")]

        def flush(self, state: Any, now: float) -> list[NewRecord]:
            return []

    log, stop = as_service("assembler"), threading.Event()
    before = sum(log.end_offsets("episodes"))
    as_service("gateway").append([new("events")])
    worker = FaustWorker(Echo, log, Home(tmp_path), stop=stop)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        until(lambda: sum(log.end_offsets("episodes")) > before, deadline=30)
    finally:
        stop.set()
        thread.join(30)


def test_the_gateway_may_read_all_that_it_follows(as_service: Callable[[str], KafkaLog], tmp_path: Path) -> None:
    Routes(as_service("gateway"), Home(tmp_path).blobs).catch_up()


def test_a_spool_keeps_what_may_not_be_written_says_how_to_mend_it_and_goes_on(
    secured: Broker,
    authority: tuple[Path, Path, Path],
    as_service: Callable[[str], KafkaLog],
    tmp_path: Path,
    until: Until,
) -> None:
    user = user_of("learner", Address((), PREFIX))
    spool = Spool(tmp_path / "spool.db", as_service("learner"), "events", max_record_bytes=10**6, max_bytes=10**8)
    draining = threading.Thread(target=spool.drain)
    draining.start()
    admin = opened(secured, authority[0], ADMIN)
    missing = [Grant(user, operation, "TOPIC", f"{PREFIX}.events") for operation in ("WRITE", "DESCRIBE")]
    try:
        spool.append_soon([new("events")]).result(20)
        until(lambda: "'everloop topics apply'" in (spool.state().refused or ""), deadline=60)
        assert spool.state().records == 1
        for grant in missing:
            admin.cluster.grant(grant)
        until(lambda: spool.state().records == 0, deadline=60)
        assert spool.state().refused is None
    finally:
        for grant in missing:
            admin.cluster.take(grant)
        spool.stop()
        draining.join(30)
        spool.close()
        admin.close()
