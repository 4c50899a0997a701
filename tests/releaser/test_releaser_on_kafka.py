"""The releaser's journal on the real broker: a change whole or not at all, and one releaser at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.home import Home
from everloop.log.base import NewRecord
from everloop.log.kafka.clients import Fenced
from everloop.log.kafka.log import KafkaLog
from everloop.names import Pin, PinState
from everloop.release import Release, ReleaseState, Route
from everloop.topics import ADAPTERS, PINS, RELEASES, ROUTES

from services.gateway.routes import Routes
from services.releaser.journal import Journal
from services.releaser.state import Change

pytestmark = pytest.mark.kafka
Until = Callable[..., Any]


def change(epoch: int) -> Change:
    """A route, and the two releases that make it true."""
    fields: dict[str, Any] = {"tenant": "default", "policy": "assistant", "time": 1.0}
    names = (f"a{epoch}", f"b{epoch}")
    both = [Release(id=f"rel_{name}", adapter=name, uri="u", incumbent="base", **fields) for name in names]
    both = [release.to(ReleaseState.GATED, "Passed.", 2.0) for release in both]
    return Change(tuple(both), Route(epoch=epoch, live="base", **fields))


def held(journal: Journal) -> tuple[list[int], int]:
    """Epochs of the routes that a reader sees, and how many versions of releases."""
    return [route.epoch for route in journal.routes()], len(list(journal.releases()))


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from everloop.home import Home
from everloop.log import connect
from everloop.log.kafka.fenced import FencedWriter
from services.releaser.journal import Journal
from test_releaser_on_kafka import change

sends = FencedWriter._begin_and_send

def sent(*arguments):
    sends(*arguments)
    print("sent", flush=True)
    sys.stdin.readline()

journal = Journal(connect(sys.argv[1]), Home(Path(sys.argv[2])).blobs)
journal.open()
journal.write(change(1))
FencedWriter._begin_and_send = sent
journal.write(change(2))
"""


@pytest.mark.processes
def test_a_change_that_was_cut_short_by_a_kill_leaves_nothing(log: KafkaLog, url: str, home: Home) -> None:
    command = [sys.executable, "-c", PROGRAM, url, str(home.root), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sent\n", "the broker has the second change, not its end"
        process.kill()
    after = Journal(log, home.blobs)
    assert held(after) == ([1], 2)
    after.open()
    after.write(change(2))
    assert held(after) == ([1, 2], 4)


def test_who_opens_the_journal_fences_the_one_before(log: KafkaLog, home: Home) -> None:
    first, second = Journal(log, home.blobs), Journal(log, home.blobs)
    first.open()
    first.write(change(1))
    second.open()
    for _ in range(2):
        with pytest.raises(Fenced, match="taken the place"):
            first.write(change(7))
    second.write(change(2))
    assert held(second) == ([1, 2], 4)


CONFIG = """
home = "{home}"
cache = "{home}/cache"
[log]
url = "{url}"
[serving]
url = "http://127.0.0.1:9"
[services]
releaser_port = 0
[mlflow]
uri = "http://127.0.0.1:9"
[tenants.default.policies.assistant]
base = "tiny-k2"
"""


@pytest.mark.processes
def test_a_releaser_that_was_paused_while_another_took_over_cannot_write(
    url: str, log: KafkaLog, world: Any, tmp_path: Path, until: Until
) -> None:
    w = world()
    w.log.close()
    w.log = log
    running: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str) -> None:
        home = tmp_path / name
        home.mkdir()
        (home / "everloop.toml").write_text(CONFIG.format(home=home, url=url))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("EVERLOOP_")}
        with (home / "said").open("wb") as said:
            running[name] = subprocess.Popen(
                [sys.executable, "-m", "services.releaser"],
                env={**environment, "EVERLOOP_CONFIG": str(home / "everloop.toml"), "OMP_NUM_THREADS": "1"},
                stdout=said,
                stderr=said,
            )

    try:
        start("first")
        w.announce("aaa", files=False)
        until(lambda: w.state("aaa"), deadline=60)
        running["first"].send_signal(signal.SIGSTOP)
        start("second")
        w.announce("bbb", files=False)
        until(lambda: w.state("bbb"), deadline=60)
        ends = {topic.name: log.end_offsets(topic.name) for topic in (ADAPTERS, RELEASES, ROUTES)}
        running["first"].send_signal(signal.SIGCONT)  # and it reads of the second adapter
        assert running["first"].wait(60) == 1
        assert "another process has taken the place" in (tmp_path / "first" / "said").read_text()
        assert ends == {topic: log.end_offsets(topic) for topic in ends}, "it wrote nothing"
        w.announce("ccc", files=False)
        until(lambda: w.state("ccc"), deadline=30)
        assert running["second"].poll() is None
        assert sorted((r.adapter, r.step) for r in w.releases() if r.step == 0) == [("aaa", 0), ("bbb", 0), ("ccc", 0)]
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def test_a_pin_is_asked_for_and_answered_over_the_broker(log: KafkaLog, home: Home, until: Until) -> None:
    journal, routes = Journal(log, home.blobs), Routes(log, home.blobs)
    journal.open()
    routes.catch_up()
    routes.names.awaited.add("pin_1")
    asked = Pin(id="pin_1", tenant="default", policy="assistant", adapter="a1", time=1.0)
    log.append([NewRecord(PINS.name, asked.key, wire.encode(asked))])
    assert until(lambda: list(journal.new_pins())) == [asked]
    journal.answer(asked.model_copy(update={"state": PinState.HELD, "time": 2.0}))
    until(lambda: routes.catch_up() or routes.names.said)
    assert routes.names.said["pin_1"].state is PinState.HELD
