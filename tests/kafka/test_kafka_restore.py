"""A copy of a stopped installation, broker and home, goes on where it was, whatever came after it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from everloop.home import Home
from everloop.log import NewRecord, connect
from everloop.log.kafka.log import KafkaLog

from services.broker.process import Broker
from services.faust_worker import FaustWorker
from tests.kafka.conftest import SESSION, Counting

pytestmark = pytest.mark.kafka


def counts(broker: Broker, home: Path, appended: range, until: Callable[..., Any]) -> list[int]:
    """Append these events, have a worker handle all, and end; what was counted since the log began, in order."""
    log = connect(f"kafka://{broker.address}/restored")
    assert isinstance(log, KafkaLog)
    log.append([NewRecord("events", "k", b"v", {"id": str(number)}) for number in appended])
    stop = threading.Event()
    thread = threading.Thread(target=FaustWorker(Counting, log, Home(home), stop=stop, session=SESSION).run)
    thread.start()
    whole = sum(log.end_offsets("events"))
    until(lambda: sum(log.committed("counting", "events").values()) == whole, deadline=60)
    stop.set()
    thread.join(30)
    read = [record for number in range(log.partitions("episodes")) for record in log.read("episodes", number)]
    log.close()
    return [int(record.value or b"") for record in read]


def test_a_copy_that_is_put_back_goes_on_where_it_was(tmp_path: Path, until: Callable[..., Any]) -> None:
    its, kept = tmp_path / "home", tmp_path / "kept"
    broker = Broker(its / "kafka", tied=True)
    broker.start()
    try:
        assert counts(broker, its, range(5), until) == [1, 2, 3, 4, 5]
        broker.stop()
        shutil.copytree(its, kept)
        broker.start()
        assert counts(broker, its, range(5, 8), until) == [1, 2, 3, 4, 5, 6, 7, 8]
        broker.stop()
        shutil.rmtree(its)
        shutil.copytree(kept, its)
        broker.start()
        assert counts(broker, its, range(8, 10), until) == [1, 2, 3, 4, 5, 6, 7], "what the copy had, and what came"
    finally:
        broker.stop()
