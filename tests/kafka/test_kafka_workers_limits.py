"""What is too large for the log, through a worker: it becomes a dead letter that says so, and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.home import Home
from everloop.log import NewRecord, Record, connect
from everloop.log.kafka.log import KafkaLog
from everloop.run import DeadLetter
from everloop.stream import State

pytestmark = pytest.mark.kafka
Until = Callable[..., Any]
LARGEST = 20_000


class Gathering:
    """Keeps all that came under a key, and says how much that is; ``wide`` makes an output as large as it asks."""

    name, topics = "counting", ("events",)

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        held = (state.get(record.key) or b"") + (record.value or b"")
        state.put(record.key, held)
        said = b"x" * int(record.headers.get("wide", 0)) or str(len(held)).encode()
        return [NewRecord("episodes", record.key, said, {"id": record.headers["id"]})]

    def flush(self, state: State, now: float) -> list[NewRecord]:
        return []


@pytest.fixture
def log(url: str) -> Any:
    log = connect(url, max_record_bytes=LARGEST)
    yield log
    log.close()


def letters(log: KafkaLog, home: Path) -> dict[str, DeadLetter]:
    found = [wire.decode(DeadLetter, record.value or b"", Home(home).blobs) for record in log.read("dead-letters", 0)]
    return {letter.headers["id"]: letter for letter in found}


def said(log: KafkaLog) -> dict[str, list[bytes | None]]:
    found: dict[str, list[bytes | None]] = {}
    for partition in range(4):
        for record in log.read("episodes", partition):
            found.setdefault(record.key, []).append(record.value)
    return found


def test_an_output_that_only_the_broker_finds_too_large(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until, done: Any
) -> None:
    log.partitions("episodes")
    log.cluster.configure("episodes", {"max.message.bytes": "8000"})
    feed = [NewRecord("events", "k", b"v", {"id": str(i), "wide": "15000" if i == 3 else "0"}) for i in range(6)]
    log.append(feed)
    worker = work(tmp_path, Gathering)
    until(lambda: done() == len(feed) or worker.ended, deadline=40)
    assert worker.failure is None
    assert list(letters(log, tmp_path)) == ["3"]
    assert said(log) == {"k": [b"1", b"2", b"3", b"4", b"5"]}


def test_a_state_and_an_output_that_grow_too_large(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until, done: Any
) -> None:
    piece = b"v" * 4_000
    feed = [NewRecord("events", key, piece, {"id": f"{key}/{i}"}) for i in range(8) for key in ("grows", "other")]
    feed[7:7] = [NewRecord("events", "wide", b"v", {"id": "too wide", "wide": str(LARGEST)})]
    feed = [record for record in feed if record.key != "other" or int(record.headers["id"][-1]) < 4]
    log.append(feed)
    worker = work(tmp_path, Gathering)
    until(lambda: done() == len(feed), deadline=30)
    found = letters(log, tmp_path)
    assert sorted(found) == [*(f"grows/{i}" for i in range(4, 8)), "too wide"]
    assert "what 'counting' knows under 'grows' would have 20,000 bytes, and its changelog takes 20,000" in (
        found["grows/4"].cause
    )
    assert "a record for 'episodes' has" in found["too wide"].cause
    assert found["grows/4"].value == piece, "as it came"
    assert said(log) == {
        "grows": [b"4000", b"8000", b"12000", b"16000"],
        "other": [b"4000", b"8000", b"12000", b"16000"],
    }
    assert worker.failure is None
    print(f"acknowledged {len(feed)}: {len(feed) - len(found)} handled, {len(found)} in dead letters")
