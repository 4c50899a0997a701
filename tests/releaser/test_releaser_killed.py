"""The releaser as a process, killed in every state of a release: it goes on, and does nothing twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
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


@pytest.fixture
def process(world: Callable[..., Any], process_of: Callable[..., Any], tiny_base: Path) -> Any:
    return process_of(world(base=str(tiny_base), canary=CANARY), str(tiny_base), CANARY)


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


def test_killed_in_every_state(process: Any, adapters: Callable[..., list[str]], until: Callable[..., Any]) -> None:
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
