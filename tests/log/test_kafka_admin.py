"""Questions to the cluster on the real broker: many at once, and after a client lost touch."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from everloop.errors import LogError
from everloop.log import NewRecord
from everloop.log.kafka import cluster
from everloop.log.kafka.log import KafkaLog
from kafka import errors as kafka_errors

pytestmark = pytest.mark.kafka
THREADS, EACH = 32, 20


def _lost(admin: object) -> None:
    raise kafka_errors.KafkaConnectionError("gone")


def test_many_threads_ask_at_once_and_each_has_its_answer(log: KafkaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "UNSETTLED", ())  # nothing is asked twice
    log.append([NewRecord("events", f"k{i}", b"v") for i in range(40)])
    begin = threading.Barrier(THREADS)

    def ask(number: int) -> set[int]:
        begin.wait()
        if number % 8 == 0:  # one that lost touch: its client is thrown away, and nobody else's
            with pytest.raises(LogError):
                log.cluster.ask("asking for nothing", _lost)
        return {sum(log.end_offsets("events")) for _ in range(EACH)}

    with ThreadPoolExecutor(THREADS) as pool:
        answers = set().union(*pool.map(ask, range(THREADS)))
    assert answers == {40}
    assert len(log.cluster._idle) <= cluster.MOST
