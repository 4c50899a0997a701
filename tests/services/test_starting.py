"""What is said of services that are on their way: which, for how long, and what they wait for."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from everloop.cli.main import main
from everloop.config import Config
from everloop.errors import ConfigError
from everloop.home import Home

from services.commands.up import first_keys
from services.installation import Installation
from services.starting import last_line, not_ready, up
from services.supervisor import only_one

Until = Callable[..., Any]


@pytest.fixture
def here(home: Home) -> Installation:
    home.folder("logs")
    return Installation(Config(home=home.root))


@pytest.fixture
def engine() -> Iterator[subprocess.Popen[bytes]]:
    """A child of this process that runs 'services.engine', as far as anybody can see, and serves nothing."""
    made = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "services.engine"])
    yield made
    made.kill()
    made.wait()


class Unready(http.server.BaseHTTPRequestHandler):
    trouble: dict[str, str] = {"engine": "no engine answers"}

    def do_GET(self) -> None:
        bad = self.path == "/readyz" and self.trouble
        body = json.dumps({"ok": not bad, "trouble": self.trouble}).encode()
        self.send_response(503 if bad else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def gateway(here: Installation) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    said = {"pid": os.getpid(), "url": url, "started": time.time() - 30}
    (here.home.folder("run") / "gateway.json").write_text(json.dumps(said))
    yield url
    server.shutdown()
    server.server_close()


def test_where_nothing_runs_nothing_is_on_its_way(here: Installation) -> None:
    assert up(here) is None
    assert not_ready(here) == []
    lock = here.home.folder("run") / "up.lock"
    lock.write_text(str(os.getpid()))  # left by one that is gone, whose number this process has got
    assert up(here) is None
    with only_one(here.home.root):
        assert up(here) == os.getpid()


def test_a_service_that_loads_is_told_with_its_age_and_the_end_of_its_log(
    here: Installation, engine: subprocess.Popen[bytes], gateway: str, until: Until
) -> None:
    with only_one(here.home.root):
        told = until(lambda: {one.name: one for one in not_ready(here)}.get("engine"))
        assert told.pid == engine.pid
        assert 0 <= told.seconds < 60
        assert told.why == "it has said nothing yet"
        line = json.dumps({"level": "info", "message": "base smollm2 is being loaded"})
        (here.home.root / "logs" / "engine.log").write_text(f"Loading weights: 20%\n{line}\n")
        told = {one.name: one for one in not_ready(here)}
        assert told["engine"].why == "its log says: base smollm2 is being loaded"
        assert told["gateway"].why == "engine: no engine answers"
        assert told["gateway"].seconds >= 30
        assert told["scorer"].pid is None
        assert "its process is not there" in told["scorer"].why


def test_what_was_written_before_a_process_began_is_not_its_word(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("it died\n")
    os.utime(log, (1_000, 1_000))
    assert last_line(log) == "it died"
    assert last_line(log, since=2_000.0) == ""


def test_status_and_doctor_tell_it(
    here: Installation,
    engine: subprocess.Popen[bytes],
    gateway: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVERLOOP_HOME", str(here.home.root))
    (here.home.root / "logs" / "engine.log").write_text("loading\n")
    with only_one(here.home.root):
        assert main(["status"]) == 0
        told = capsys.readouterr().out
        assert "\nengine is not ready after" in told
        assert "its log says: loading" in told
        assert "gateway is not ready after" in told
        main(["doctor"])
        told = capsys.readouterr().out
        assert "the engine is not ready after" in told
        assert "the gateway is not ready after" in told


@pytest.mark.parametrize(
    ("spool", "told"),
    [
        ({}, None),
        ({"records": 0, "bytes": 4096, "oldest": 0.0, "drained": 9}, None),
        (
            {"records": 1200, "bytes": 2_500_000, "oldest": 200.0, "away": "no broker answers at a:9092"},
            "1200 events (2.5 MB) wait in the gateway's spool, the oldest for 3 min: no broker answers at a:9092",
        ),
        (
            {"records": 3, "bytes": 4096, "oldest": 5.0, "aside": 2, "refused": "wrong"},
            "3 events (0.0 MB) wait in the gateway's spool, 2 set aside as too large, the oldest for 5 s: wrong",
        ),
    ],
)
def test_status_tells_what_waits_in_the_spool(
    here: Installation,
    gateway: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spool: dict[str, Any],
    told: str | None,
) -> None:
    monkeypatch.setattr(Unready, "trouble", {"spool": spool})  # what this server says at any path
    monkeypatch.setattr(Installation, "status", lambda self, name: {"service": name, "spool": spool})
    main(["status", "--home", str(here.home.root)])
    said = capsys.readouterr().out
    assert told in said if told else "spool" not in said.partition("not ready")[0]


def test_a_command_does_not_take_another_log_than_the_platform_that_runs(here: Installation) -> None:
    said = {"pid": os.getpid(), "url": "http://127.0.0.1:9", "started": 1.0, "log": "kafka://127.0.0.1:9092/x"}
    announced = here.home.folder("run") / "releaser.json"
    announced.write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=r"the releaser .* runs on the log kafka://.*: give it --log kafka://"):
        _ = here.log
    announced.write_text(json.dumps({**said, "log": here.config.log.url}))
    with here:
        assert here.log.partitions("commands") >= 1


@pytest.mark.parametrize(
    ("its", "ours", "same"),
    [
        ("kafka://a:1,B:9092/p", "kafka://b,a:1/p/", True),
        ("kafka://a", "kafka://a:9092/", True),
        ("kafka://a/p", "kafka://a/q", False),
        ("kafka://a", "kafka://a:9093", False),
        ("sqlite:///log.db", "sqlite:///{home}/log.db", True),
        ("sqlite:///log.db", "sqlite:///log.db?max_bytes=100000000", True),
        ("sqlite:///log.db", "sqlite:///other.db", False),
        ("sqlite:///log.db", "kafka://a", False),
    ],
)
def test_a_log_is_the_same_however_it_is_spelled(home: Home, its: str, ours: str, same: bool) -> None:
    config = Config(home=home.root, log={"url": ours.format(home=home.root)})
    said = {"pid": os.getpid(), "url": "http://127.0.0.1:9", "started": 1.0, "log": its}
    (home.folder("run") / "releaser.json").write_text(json.dumps(said))
    with Installation(config) as here, nullcontext() if same else pytest.raises(ConfigError, match="runs on the log"):
        _ = here.log


def test_the_first_keys_are_made_once(home: Home) -> None:
    config = Config(home=home.root)
    made = first_keys(config, home)
    assert list(made) == ["default"]
    assert first_keys(config, home) == {}
