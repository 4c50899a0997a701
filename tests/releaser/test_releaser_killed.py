"""The releaser as a process, killed in every state of a release: it goes on, and does nothing twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from everloop.release import Release, ReleaseState
from everloop.run import CommandKind
from everloop.topics import RELEASES

pytestmark = [pytest.mark.processes, pytest.mark.models]
S = ReleaseState
CANARY = {"share": 0.5, "margin": 0.15, "alpha": 0.1, "min_units": 20}
SLOW = 120.0  # the files process imports torch


class Process:
    """``python -m services.releaser`` on a world's home."""

    def __init__(self, world: Any, base: Path) -> None:
        self.world = world
        self.config = world.home.root / "everloop.toml"
        world.home.folder()
        self.config.write_text(
            f'home = "{world.home.root}"\ncache = "{world.home.root}/cache"\n'
            f'[serving]\nurl = "http://127.0.0.1:{world.engine.port}"\n[services]\nreleaser_port = 0\n'
            f'[mlflow]\nuri = "http://127.0.0.1:9"\n'
            f'[tenants.default.policies.assistant]\nbase = "{base}"\nmax_tokens = 8\n'
            "[tenants.default.policies.assistant.canary]\n"
            + "\n".join(f"{name} = {value}" for name, value in CANARY.items())
        )
        self.running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
        with (self.world.home.root / "releaser.log").open("ab") as log:
            self.running = subprocess.Popen(
                [sys.executable, "-m", "services.releaser"],
                env={**environment, "EVERLOOP_CONFIG": str(self.config), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        assert self.running is not None
        self.running.send_signal(signal.SIGKILL)
        self.running.wait()

    def killed_and_started(self) -> None:
        self.kill()
        self.start()


@pytest.fixture
def process(world: Callable[..., Any], tiny_base: Path) -> Iterator[Process]:
    made = Process(world(base=str(tiny_base), canary=CANARY), tiny_base)
    yield made
    if made.running is not None and made.running.poll() is None:
        made.kill()


def hold(world: Any) -> None:
    """What is in the log makes sense: every step once and in order, one canary at most, epochs without a gap."""
    steps: dict[str, list[int]] = defaultdict(list)
    states: dict[str, ReleaseState] = {}
    for release in world.releases():
        steps[release.id].append(release.step)
        states[release.id] = release.state
        assert list(states.values()).count(S.CANARY) <= 1
        assert list(states.values()).count(S.LIVE) <= 1
    assert all(its == list(range(len(its))) for its in steps.values())
    epochs = [route.epoch for route in world.routes()]
    assert epochs == list(range(1, len(epochs) + 1))


def test_killed_in_every_state(process: Process, adapters: Callable[..., list[str]], until: Callable[..., Any]) -> None:
    w = process.world
    w.gold()
    w.engine.base = w.config.policy("default", "assistant").base
    a, b = adapters(w.home.folder("adapters"), 2)
    process.start()

    w.announce(a, skill=0.8)
    until(lambda: w.state(a) == "candidate", 30)
    process.killed_and_started()  # while it is examined
    until(lambda: w.state(a) == "canary", SLOW)
    process.killed_and_started()  # as a canary, before any traffic
    assert w.engine.adapters[a] <= w.route().time

    w.traffic(150, {"canary": 0.7, "control": 0.6})
    process.killed_and_started()  # with some of its traffic read
    w.traffic(400, {"canary": 0.7, "control": 0.6}, first=200)
    until(lambda: w.state(a) == "live", 30)
    assert w.newest(a).evidence["canary"]["canary"]["episodes"] > 200  # what came before the kill counts too
    hold(w)

    w.engine.stop()  # the engine forgets, while nobody watches
    process.kill()
    w.engine.start()
    process.start()  # as the live release
    until(lambda: a in w.engine.adapters, 30)
    assert w.live() == a

    process.kill()
    left = Release(id="rel_left", tenant="default", policy="assistant", adapter=b, uri="u", incumbent=a, time=1.0)
    w.append(RELEASES, left, left.to(S.GATED, "Passed.", 2.0))  # as a process leaves it that dies when it has gated
    process.start()
    until(lambda: w.state(b) == "canary", 30)
    assert w.engine.adapters[b] <= w.route().time

    w.order(CommandKind.PROMOTE, release="rel_left", without_evidence=True)
    until(lambda: w.live() == b, 30)
    process.killed_and_started()  # just after an order
    w.order(CommandKind.ROLLBACK)
    until(lambda: w.live() == a, 30)
    process.killed_and_started()  # before the order may be committed: it is not done twice
    w.order(CommandKind.PAUSE)
    third = w.order(CommandKind.VETO, release="rel_left")  # which has ended: refused, and nothing happens
    until(lambda: w.log.committed("releaser", "commands").get(0, 0) >= w.log.end_offsets("commands")[0], 30)
    assert third.id
    assert (w.state(a), w.state(b), w.live()) == ("live", "rolled_back", a)
    hold(w)
