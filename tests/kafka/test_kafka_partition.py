"""A partition that changes hands: a cache that is behind takes what follows, tombstones too; else it is built anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from everloop.home import Home
from everloop.log import NewRecord, Record
from everloop.log.kafka.log import KafkaLog
from everloop.stream import State
from prometheus_client import REGISTRY

from services import changelog
from services.partition import Partition
from services.retry import Retry
from services.unit import Tally

pytestmark = pytest.mark.kafka


class Keeping:
    """Keeps the last value of each key; an empty one deletes it."""

    name, topics = "counting", ("events",)

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        if record.value:
            state.put(record.key, record.value)
        else:
            state.delete(record.key)
        return []

    def flush(self, state: State, now: float) -> list[NewRecord]:
        return []


def restored() -> float:
    return REGISTRY.get_sample_value("everloop_handler_restored_entries_total", {"handler": "counting"}) or 0.0


@pytest.fixture
def owner(log: KafkaLog, tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """Have a worker with this folder take the partition over and handle these values by key; the state after it."""
    offset = 0

    def take(folder: str, values: dict[str, bytes]) -> dict[str, bytes]:
        nonlocal offset
        partition = Partition(
            Keeping(), log, ("events", 2), tmp_path / folder, Tally("counting", 300.0),
            blobs=Home(tmp_path).blobs, retry=Retry(),
        )  # fmt: skip
        assert partition.next == offset
        for key, value in values.items():  # a transaction each
            partition.take([Record("events", 2, offset, key, value, {}, time.time())])
            offset += 1
        held = dict(partition._state.scan(""))
        partition.close()
        return held

    log.partitions("events")
    return take


@pytest.mark.parametrize("mark", ["near", "far", "old"])
def test_it_takes_what_another_has_done_since(
    owner: Callable[..., dict[str, bytes]], mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {f"k{number}": b"1" for number in range(12)}
    assert owner("a", first) == first
    since = {"k3": b"", "k4": b"2", **{f"n{number}": b"2" for number in range(8)}}
    held = {key: value for key, value in {**first, **since}.items() if value}
    assert owner("b", since) == held
    if mark == "far":
        monkeypatch.setattr(changelog, "FAR", 16)
    if mark == "old":
        ahead = time.time() + changelog.TOMBSTONE_SECONDS / 2
        monkeypatch.setattr(changelog, "time", SimpleNamespace(time=lambda: ahead))
    before = restored()
    assert owner("a", {}) == held
    assert restored() - before == (len(since) if mark == "near" else len(first) + len(since))
