"""The writer of a worker on the real broker: all or nothing over topics and offsets, and one of a name at a time."""

from __future__ import annotations

import secrets
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from everloop.errors import LogError, RecordTooLarge
from everloop.log import NewRecord, Record, connect
from everloop.log.kafka import clients
from everloop.log.kafka.clients import Fenced
from everloop.log.kafka.log import KafkaLog
from everloop.log.kafka.member import Member

from services.broker.process import Broker

pytestmark = pytest.mark.kafka
Until = Callable[..., Any]
STATE = "everloop-state-test"


@pytest.fixture
def url(broker: Broker) -> str:
    return f"kafka://{broker.address}/{secrets.token_hex(6)}"


@pytest.fixture
def log(url: str) -> Iterator[KafkaLog]:
    log = connect(url, max_record_bytes=100_000)
    assert isinstance(log, KafkaLog)
    yield log
    log.close()


def values(log: KafkaLog, topic: str) -> list[bytes | None]:
    return [r.value for p in range(log.partitions(topic)) for r in log.read(topic, p)]


def out(value: str, topic: str = "episodes") -> NewRecord:
    return NewRecord(topic, "k", value.encode())


def test_outputs_changes_and_offsets_are_committed_together(log: KafkaLog, until: Until) -> None:
    writer = log.fenced("handle-3")
    log.partitions("events")
    writer.write(
        [out("a"), out("t", "trajectories")],
        placed=[(out("state", STATE), 3)],
        offsets={("events", 3): 17},
        group="handle",
    )
    until(lambda: log.committed("handle", "events") == {3: 17})
    assert values(log, "episodes") == [b"a"]
    assert values(log, "trajectories") == [b"t"]
    assert [r.value for r in log.read(STATE, 3)] == [b"state"], "where it was placed, whatever its key"


def test_a_consumer_reads_on_where_the_transaction_left_its_group(log: KafkaLog, until: Until) -> None:
    positions = log.append([NewRecord("events", "k", str(i).encode()) for i in range(4)])
    partition = positions[0].partition
    log.fenced("w").write([out("a")], offsets={("events", partition): 3}, group="g")
    until(lambda: log.committed("g", "events"))
    consumer = log.consumer("g", ["events"])
    found: list[Record] = []
    until(lambda: (found.extend(consumer.poll(timeout=0.1)), found)[1])
    assert [r.value for r in found] == [b"3"]


def test_a_reader_comes_to_the_end_past_the_marks_of_transactions(log: KafkaLog, until: Until) -> None:
    log.fenced("w").write([out("a"), out("b")])
    consumer = log.consumer("g", ["episodes"])
    found: list[Record] = []

    def at_the_end() -> bool:
        found.extend(consumer.poll(timeout=0.1))
        return [consumer.position(("episodes", p)) for p in range(4)] == log.end_offsets("episodes")

    until(lambda: at_the_end() and found)
    assert [r.value for r in found] == [b"a", b"b"]
    assert sum(log.end_offsets("episodes")) > found[-1].offset + 1, "a gap that no record will fill"


def test_the_later_writer_of_a_name_fences_the_earlier(log: KafkaLog, until: Until) -> None:
    first = log.fenced("w")
    first.write([out("of the first")])
    second = log.fenced("w")
    for _ in range(2):
        with pytest.raises(Fenced, match="taken the place"):
            first.write([out("of a zombie")], offsets={("events", 0): 99}, group="g")
    second.write([out("of the second")])
    until(lambda: values(log, "episodes") == [b"of the first", b"of the second"])
    assert log.committed("g", "events") == {}
    log.fenced("another").write([out("of another name")])
    second.write([out("still there")])


def test_what_a_fenced_writer_left_open_is_never_seen(log: KafkaLog, until: Until) -> None:
    first = log.fenced("w")
    producer = first._producer
    producer.begin_transaction()
    for sent in first._send([out("left open")]):
        sent.wait(time.monotonic() + 30)
    assert values(log, "episodes") == []
    log.fenced("w").write([out("committed")])
    until(lambda: values(log, "episodes") == [b"committed"])


def test_a_record_that_is_too_large_writes_nothing_and_ends_nothing(log: KafkaLog, until: Until) -> None:
    writer = log.fenced("w")
    with pytest.raises(RecordTooLarge):
        writer.write([out("fits"), out("x" * 100_001)], offsets={("events", 0): 5}, group="g")
    writer.write([out("after")])
    until(lambda: values(log, "episodes") == [b"after"])
    assert log.committed("g", "events") == {}


def test_a_batch_that_is_too_large_for_the_topic_goes_through_in_parts(log: KafkaLog, url: str, until: Until) -> None:
    log.partitions("episodes")  # as made for records of 100,000 bytes
    wider = connect(url, max_record_bytes=1_000_000)
    assert isinstance(wider, KafkaLog)
    numbers = [f"{number}".rjust(1000) for number in range(1500)]
    wider.fenced("w").write([out(number) for number in numbers], offsets={("events", 0): 5}, group="g")
    until(lambda: log.committed("g", "events") == {0: 5})
    partition = out("").partition(log.partitions("episodes"))
    found: list[Record] = []
    while more := log.read("episodes", partition, found[-1].offset + 1 if found else 0, 1000):
        found += more
    assert [r.value for r in found] == [number.encode() for number in numbers]
    wider.close()


def test_what_the_broker_finds_too_large_writes_nothing_and_ends_nothing(log: KafkaLog, until: Until) -> None:
    log.partitions("trajectories")
    log.cluster.configure("trajectories", {"max.message.bytes": "20000"})
    writer = log.fenced("w")
    for number in range(3):
        with pytest.raises(RecordTooLarge, match=r"raise the topic's max\.message\.bytes"):
            writer.write(
                [out("fits"), out("too", "trajectories"), out("x" * 50_000, "trajectories")],
                offsets={("events", 0): 5},
                group="g",
            )
        writer.write([out(f"after {number}"), out(f"{number}", "trajectories")])
    assert values(log, "episodes") == [f"after {number}".encode() for number in range(3)]
    assert values(log, "trajectories") == [b"0", b"1", b"2"]
    assert log.committed("g", "events") == {}


def test_a_place_that_the_topic_does_not_have_ends_the_writer(log: KafkaLog) -> None:
    writer = log.fenced("w")
    with pytest.raises(LogError, match="Unrecognized partition 9"):
        writer.write([out("a")], placed=[(out("state", STATE), 9)])
    with pytest.raises(LogError, match="has ended"):
        writer.write([out("b")])
    log.fenced("w").write([out("c")])
    assert b"a" not in values(log, "episodes")


def test_a_member_that_the_group_gave_up_commits_nothing(log: KafkaLog, url: str, until: Until) -> None:
    other = connect(url)
    consumer = log.consumer("g", ["events"], member="worker")
    assert isinstance(consumer, Member)
    its = consumer.membership()
    replacement = other.consumer("g", ["events"], member="worker")
    assert len(replacement.assignment()) == 4
    with pytest.raises(LogError):
        log.fenced("w").write([out("of one that was replaced")], offsets={("events", 0): 7}, group=its)
    assert values(log, "episodes") == []
    assert log.committed("g", "events") == {}
    assert isinstance(replacement, Member)
    log.fenced("w").write([out("fine")], offsets={("events", 0): 7}, group=replacement.membership())
    until(lambda: log.committed("g", "events") == {0: 7})
    other.close()


WORKER = """
import sys
from everloop.log import NewRecord, connect
log = connect(sys.argv[1])
writer = log.fenced("w")
for batch in range(int(sys.argv[2]), 100_000):
    key = f"{batch}"
    writer.write(
        [NewRecord("episodes", f"{key}/{i}", key.encode()) for i in range(5)],
        offsets={("events", 0): batch + 1},
        group="g",
    )
    print(batch, flush=True)
"""


def test_killed_at_any_moment_offsets_and_outputs_agree(log: KafkaLog, url: str, until: Until) -> None:
    log.partitions("events")
    log.partitions("episodes")
    start = 0
    for told in (1, 4, 9):
        command = [sys.executable, "-c", textwrap.dedent(WORKER), url, str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            last = [int(process.stdout.readline()) for _ in range(told)][-1]
            process.kill()
        log.fenced("w").close()  # ends what the dead one left open, as the next worker would
        until(lambda last=last: log.committed("g", "events").get(0, 0) > last)
        start = log.committed("g", "events")[0]
        expected = sorted(str(batch).encode() for batch in range(start) for _ in range(5))
        until(lambda expected=expected: sorted(values(log, "episodes")) == expected)


def test_a_writer_lives_through_a_restart_of_the_broker(tmp_path_factory: Any, until: Until) -> None:
    own = Broker(tmp_path_factory.mktemp("own"))
    own.start()
    log = connect(f"kafka://{own.address}")
    assert isinstance(log, KafkaLog)
    writer = log.fenced("w")
    writer.write([out("before")], offsets={("events", 0): 1}, group="g")
    own.kill()
    failure: list[Exception] = []

    def write() -> None:
        try:
            writer.write([out("during")], offsets={("events", 0): 2}, group="g")
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    own.start()
    thread.join(clients.REQUEST_SECONDS * 6)
    assert not thread.is_alive()
    assert not failure, failure
    until(lambda: values(log, "episodes") == [b"before", b"during"])
    until(lambda: log.committed("g", "events") == {0: 2})
    log.close()
    own.stop()
