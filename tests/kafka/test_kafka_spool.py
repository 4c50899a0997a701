"""The spool before a real broker: what a topic takes, and what it does not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from everloop.log import NewRecord, connect
from everloop.log.kafka.log import KafkaLog
from everloop.log.spool import Spool

pytestmark = pytest.mark.kafka


@pytest.fixture
def draining(log: KafkaLog, tmp_path: Path) -> Iterator[Callable[[], Spool]]:
    with ExitStack() as stack:

        def start() -> Spool:
            spool = Spool(tmp_path / "spool.db", log, "events", max_record_bytes=10**6, max_bytes=10**8)
            thread = threading.Thread(target=spool.drain)
            thread.start()
            stack.callback(spool.close)
            stack.callback(thread.join, 30)
            stack.callback(spool.stop)
            return spool

        yield start


def new(number: int, size: int = 100) -> NewRecord:
    return NewRecord("events", "t/ep_1", b"x" * size, {"id": str(number)}, 5.0)


def test_a_topic_that_takes_less_than_was_acknowledged_stops_nobody(
    url: str, log: KafkaLog, draining: Callable[[], Spool], until: Callable[..., Any]
) -> None:
    narrow = connect(url, max_record_bytes=100_000)
    narrow.partitions("events")
    narrow.close()
    first = draining()
    for number in range(10):
        first.append_soon([new(number, 400_000 if number == 4 else 100)]).result(20)
    until(lambda: first.state().aside == 1 and first.state().records == 0, deadline=60)

    def ids() -> list[str]:
        found = [record.headers["id"] for p in range(log.partitions("events")) for record in log.read("events", p)]
        return list(dict.fromkeys(found))

    assert ids() == [str(number) for number in range(10) if number != 4]
    first.append_soon([new(10)]).result(20)
    until(lambda: ids()[-1] == "10", deadline=60)
    first.stop()
    log.cluster.configure("events", {"max.message.bytes": "1100000"})
    last = draining()
    until(lambda: last.state().aside == 0, deadline=60)
    assert ids()[-1] == "4"


def test_many_records_go_through_once_and_in_order(
    log: KafkaLog, draining: Callable[[], Spool], until: Callable[..., Any]
) -> None:
    spool = draining()
    for number in range(3000):
        told = spool.append_soon([new(number, 1000)])
    told.result(30)
    until(lambda: spool.state().records == 0, deadline=60)
    (ids,) = [found for p in range(log.partitions("events")) if (found := all_ids(log, p))]
    assert ids == [str(number) for number in range(3000)]
    assert spool.state().drained == 3000
    assert spool.state().rebuilds == 0


def all_ids(log: KafkaLog, partition: int) -> list[str]:
    found: list[str] = []
    offset = 0
    while records := log.read("events", partition, offset):
        found += [record.headers["id"] for record in records]
        offset = records[-1].offset + 1
    return found
