"""The log's broker is away, or refuses: what commands say, for how long they ask, and what an order comes to."""

from __future__ import annotations

import http.server
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from everloop.cli.main import main
from everloop.config import Config
from everloop.home import Home
from everloop.log import connect
from everloop.log.kafka.log import KafkaLog
from everloop.log.kafka.plan import carry_out
from everloop.run import CommandKind

from services.broker.process import Broker
from services.broker.settings import ADMIN
from services.installation import Installation
from services.learner.facts import FactsHandler
from services.releaser.journal import Journal
from services.stream import run_handler

LONGEST = 15.0  # seconds that a command may take where no broker answers
SPOOL = {"records": 12, "bytes": 300_000, "oldest": 40.0, "away": "gone"}


@pytest.fixture
def mute() -> Iterator[str]:
    """Where connections are taken, as by a frozen broker, and nothing is answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def nobody() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


class Gateway(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"service": "gateway", "spool": SPOOL, "home": "h", "pid": 1}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def gateway(home: Home) -> Iterator[None]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = {"pid": os.getpid(), "url": f"http://127.0.0.1:{server.server_port}", "started": time.time()}
        (home.folder("run") / "gateway.json").write_text(json.dumps(said))
        yield
        server.shutdown()


def command(capsys: pytest.CaptureFixture[str], home: Home, url: str, *words: str) -> tuple[int, str, str]:
    begun = time.monotonic()
    status = main([*words, "--home", str(home.root), "--log", url])
    assert time.monotonic() - begun < LONGEST
    out, err = capsys.readouterr()
    return status, out, err


def test_status_says_first_that_the_broker_is_away_what_works_and_what_to_do(
    home: Home, gateway: None, nobody: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = command(capsys, home, f"kafka://{nobody}", "status")
    first, second, *_ = out.splitlines()
    assert status == 1
    assert first == (
        f"The log's broker at {nobody} does not answer: nothing listens at {nobody}: start the broker ('make kafka' "
        "here), or mend log.url."
    )
    assert "Requests are served" in second
    assert "in the gateway's spool: 12 events (0.3 MB), the oldest for 40 s" in second
    assert out.count("0.3 MB") == 1
    status, out, _ = command(capsys, home, f"kafka://{nobody}", "status", "--json")
    assert (status, nobody in json.loads(out)["log"]["trouble"]) == (1, True)


@pytest.mark.parametrize("order", ["pause", "resume"])
def test_an_order_that_no_broker_takes_is_refused_in_one_line_in_bounded_time(
    home: Home, gateway: None, mute: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, order: str
) -> None:
    (tmp_path / "two.toml").write_text("[tenants.a.policies.x]\n[tenants.a.policies.y]\n")  # asked for once, not twice
    status, out, err = command(capsys, home, f"kafka://{mute}", order, "--config", str(tmp_path / "two.toml"))
    assert (status, out) == (1, "")
    for policy, line in zip(("a/x", "a/y"), err.splitlines(), strict=True):
        assert line.startswith(f"{policy}: {order} is NOT ordered: the log's broker at {mute} does not answer")
        assert "12 events (0.3 MB)" in line
        assert "Give the order again" in line


def test_where_no_gateway_answers_that_is_said(home: Home, nobody: str, capsys: pytest.CaptureFixture[str]) -> None:
    home.folder()
    _, _, err = command(capsys, home, f"kafka://{nobody}", "pause")
    assert "No gateway answers here" in err
    assert "everloop up" in err


def logs_findings(capsys: pytest.CaptureFixture[str], home: Home, url: str) -> list[tuple[str, str, str]]:
    """What doctor says of the log: (level, what, fix)."""
    _, out, _ = command(capsys, home, url, "doctor", "--json")
    words = ("log", "broker", "topic", "retention", "password", "permission", "cluster")
    found = [(f["level"], f["what"], f["fix"]) for f in json.loads(out)]
    return [one for one in found if any(word in one[1].replace(str(home.root), "") for word in words)]


def test_doctor_says_that_no_broker_answers_and_how_one_is_started(
    home: Home, nobody: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ((level, what, fix),) = logs_findings(capsys, home, f"kafka://{nobody}")
    assert level == "wrong"
    assert f"broker at {nobody} does not answer" in what
    assert f"everloop kafka start --home {home.root}" in fix


@pytest.mark.kafka
def test_doctor_compares_the_cluster_with_what_is_declared(
    home: Home, broker: Broker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"kafka://{broker.address}/{secrets.token_hex(6)}"
    levels = {level for level, *_ in logs_findings(capsys, home, url)}
    assert levels == {"ok", "note"}, "the first start makes the topics"
    monkeypatch.setenv("EVERLOOP_LOG__CREATE_TOPICS", "false")
    missing = [one for one in logs_findings(capsys, home, url) if one[0] == "wrong"]
    assert any("make topic" in what and ".events" not in fix for _, what, fix in missing)
    assert all(fix.startswith("everloop topics apply") and url in fix for *_, fix in missing)
    log = connect(url)
    assert isinstance(log, KafkaLog)
    carry_out(log.plan().changes)
    assert {level for level, *_ in logs_findings(capsys, home, url)} == {"ok"}
    log.cluster.configure("events", {"retention.ms": "1000"})
    log.close()
    ((_, what, fix),) = (one for one in logs_findings(capsys, home, url) if one[0] == "wrong")
    assert what.startswith("set retention.ms of events")
    assert fix.startswith("everloop topics apply")


@pytest.mark.kafka
def test_doctor_names_a_password_that_is_refused(
    home: Home,
    secured: Broker,
    authority: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"SECURITY": "sasl", "CA_FILE": str(authority[0]), "USERNAME": ADMIN, "PASSWORD": "wrong"}
    for name, value in settings.items():
        monkeypatch.setenv(f"EVERLOOP_LOG__{name}", value)
    for _ in range(3):  # a broker that has no processor time is told of as one that does not answer
        ((level, what, _),) = logs_findings(capsys, home, f"kafka://{secured.address}/team")
        if "does not answer" not in what:
            break
    assert level == "wrong"
    assert "name or password is wrong. Mend log.username and log.password_file" in what


@pytest.mark.parametrize("where", ["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)])
def test_orders_given_before_the_first_start_are_there_when_it_comes(
    home: Home, where: str, request: pytest.FixtureRequest
) -> None:
    home.folder()
    url = "sqlite:///log.db"
    if where == "kafka":
        url = f"kafka://{request.getfixturevalue('broker').address}/{secrets.token_hex(6)}"
    with Installation(Config(home=home.root, log={"url": url})) as here:
        pause = here.order(CommandKind.PAUSE, "default", "assistant")
        retrain = here.order(CommandKind.RETRAIN, "default", "assistant", seed=7)
        assert [one.id for one in Journal(here.log, home.blobs).pauses()] == [pause.id]
        facts = FactsHandler(home.blobs)
        run_handler(facts, here.log, home.folder("state"), until_idle=True)
        known = facts.known("default/assistant")
        assert known.paused
        assert [order["id"] for order in known.orders] == [retrain.id]
