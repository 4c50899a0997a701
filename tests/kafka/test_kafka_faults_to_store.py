"""Faults of the broker under load, with the assembler as a process that is started anew as its supervisor would.

After each, every event that was acknowledged is in the store, in an episode, and once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from services.broker.process import Broker

pytestmark = [pytest.mark.kafka, pytest.mark.processes]
Until = Callable[..., Any]
FROZEN = 60.0


@pytest.fixture
def broker_of_our_own(tmp_path: Path) -> Iterator[Broker]:
    """That a test may hurt."""
    broker = Broker(tmp_path / "broker", tied=True)
    broker.start()
    yield broker
    broker.stop()


def test_a_broker_that_was_killed_and_then_frozen_for_a_minute(
    broker_of_our_own: Broker, plant: Callable[..., Any], until: Until
) -> None:
    its = plant(broker_of_our_own)
    until(lambda: its.stored()["turns"] > 100, deadline=60, every=0.5)
    broker_of_our_own.kill()
    before = len(its.acknowledged)
    broker_of_our_own.start()
    until(lambda: len(its.acknowledged) > before + 100, deadline=60)
    told = len(its.acknowledged)
    until(lambda: its.stored()["turns"] >= told, deadline=90, every=0.5)
    print(f"killed: acknowledged {told}, in the store {its.stored()}")

    broker_of_our_own.freeze()
    try:
        threading.Event().wait(FROZEN)
    finally:
        broker_of_our_own.thaw()
    before, thawed = its.stored()["turns"], time.monotonic()
    until(lambda: its.stored()["turns"] > before, deadline=60, every=0.5)
    print(f"handled and stored again {time.monotonic() - thawed:.1f} s after the thaw, by itself")
    its.check(until)


@pytest.mark.parametrize("small_disk", [120], indirect=True)
def test_a_broker_whose_disk_was_full(small_disk: Path, plant: Callable[..., Any], until: Until) -> None:
    ballast = small_disk / "ballast"
    broker = Broker(small_disk / "broker", tied=True)
    broker.start()
    try:
        its = plant(broker, size=2_000)
        until(lambda: its.stored()["turns"] > 20, deadline=60, every=0.5)
        _fill(ballast)
        until(lambda: broker.pid is None, deadline=60)  # Kafka ends where none of its folders can be written
        before = len(its.acknowledged)
        ballast.unlink()
        broker.start()
        until(lambda: len(its.acknowledged) > before + 20, deadline=60)
        its.check(until)
    finally:
        broker.stop()


def _fill(path: Path) -> None:
    """Take all the room that there is."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(65_536)) == 65_536:
            pass
