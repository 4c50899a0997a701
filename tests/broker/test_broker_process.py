"""A broker of one's own: started, found again, stopped, killed; and what is said where it cannot be."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from everloop.cli.main import main

from services.broker.jars import KAFKA, RECIPE, NoBroker
from services.broker.process import Broker
from services.broker.settings import ADMIN, Secured, Settings, properties

ROOT = Path(__file__).resolve().parents[2]


def test_it_listens_on_this_machine_alone_and_makes_no_topic_by_itself(tmp_path: Path) -> None:
    text = properties(Settings(tmp_path, 9092, 9093))
    assert set(re.findall(r"://([\d.]+):", text)) == {"127.0.0.1"}
    assert "auto.create.topics.enable=false\n" in text
    assert "authorizer" not in text


def test_a_secured_one_denies_what_is_not_granted(tmp_path: Path) -> None:
    secured = Secured(tmp_path / "c", tmp_path / "k", tmp_path / "ca", {ADMIN: "secret", "gateway": "hush"})
    text = properties(Settings(tmp_path, 1, 2, 3, secured))
    assert "CLIENT:SASL_SSL" in text
    assert "StandardAuthorizer" in text
    assert "allow.everyone" not in text
    assert "secret" not in text, "passwords go to the format command alone, and from there into the broker's own log"
    assert "CLIENT:SSL" in properties(Settings(tmp_path, 1, 2, 3, Secured(Path("c"), Path("k"), Path("a"))))


def test_a_broker_that_cannot_be_installed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setattr("services.broker.jars.RECIPE", tmp_path)
    (tmp_path / "install.sh").write_text("#!/bin/sh\necho 'kafka: no way to get a JDK here' >&2\nexit 1\n")
    (tmp_path / "install.sh").chmod(0o755)
    with pytest.raises(NoBroker, match="no way to get a JDK here"):
        Broker(tmp_path / "kafka").start()


def test_one_version_of_kafka_everywhere() -> None:
    compose = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())
    images = {name: service.get("image", "") for name, service in compose["services"].items()}
    assert images["kafka"] == f"apache/kafka:{KAFKA}"
    assert f"<kafka.version>{KAFKA}</kafka.version>" in (RECIPE / "pom.xml").read_text()
    assert all(re.search(r":v?\d+\.\d+\.\d+$", image) for image in images.values() if image)
    locked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (mlflow,) = [line for line in locked if line.startswith("mlflow==")]
    assert mlflow in compose["services"]["mlflow"]["build"]["dockerfile_inline"]


def test_containers_are_reached_from_this_machine_alone() -> None:
    compose = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.kafka
def test_it_is_started_found_killed_and_stopped(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "kafka")
    with pytest.raises(NoBroker, match="ever started"):
        _ = broker.address
    assert broker.start() > 0
    again = Broker(tmp_path / "kafka")
    assert (again.pid, again.address) == (broker.pid, broker.address)
    assert again.start() == 0.0, "it runs already"
    for _ in range(3):  # what it takes on cores that are busy says little
        broker.kill()
        assert again.pid is None
        seconds = broker.start()
        print(f"started again within {seconds:.1f} s")
        if seconds < 15:
            break
    assert seconds < 15, "at the same port, on the same data"
    assert again.address == broker.address
    broker.freeze()
    assert again.stop() is True, "a frozen one too"
    assert again.stop() is False
    assert not (tmp_path / "kafka" / "broker.pid").exists()


@pytest.mark.kafka
def test_the_command_starts_one_and_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVERLOOP_HOME", str(tmp_path))
    assert main(["kafka", "status"]) == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["kafka", "start", "--port", str(taken.getsockname()[1])]) == 2
    assert "is taken by another program" in capsys.readouterr().err
    try:
        assert main(["kafka", "start", "--port", "0"]) == 0
        assert re.search(r"--log kafka://127\.0\.0\.1:\d+", capsys.readouterr().out)
        at = Broker(tmp_path / "kafka").address
        for words in (["--port", at.rpartition(":")[2]], ["--port", "0"], []):
            assert main(["kafka", "start", *words]) == 0
            assert f"runs already at {at}" in capsys.readouterr().out
        assert main(["kafka", "start", "--port", "1"]) == 2
        assert re.search(rf"already, at {at} .* not on port 1: stop it first \('everloop", capsys.readouterr().err)
        assert main(["kafka", "status"]) == 0
        assert f"runs at {at}" in capsys.readouterr().out
    finally:
        assert main(["kafka", "stop"]) == 0
    assert main(["kafka", "status"]) == 1


@pytest.mark.kafka
def test_a_broker_that_is_tied_ends_with_who_started_it(tmp_path: Path, until: Callable[..., object]) -> None:
    start = (
        "import sys, pathlib; from services.broker.process import Broker;"
        " Broker(pathlib.Path(sys.argv[1]), tied=True).start(); print('up', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", start, str(tmp_path / "kafka")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert Broker(tmp_path / "kafka").pid is not None
        process.kill()
    until(lambda: Broker(tmp_path / "kafka").pid is None)
