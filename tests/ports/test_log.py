"""The contract of the log port, over every backend. A backend is a function that gives the URL of an empty log."""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
import signal
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.errors import LogError, RecordTooLarge
from everloop.log import Consumer, Log, NewRecord, Record, connect, partition_of
from everloop.score import Score


def sqlite_url(request: pytest.FixtureRequest) -> str:
    folder: Path = request.getfixturevalue("tmp_path")
    return f"sqlite:///{folder}/log.db"


def kafka_url(request: pytest.FixtureRequest) -> str:
    """On the session's one broker; the prefix makes the log empty."""
    return f"kafka://{request.getfixturevalue('broker').address}/{secrets.token_hex(6)}"


@pytest.fixture(
    params=[pytest.param(sqlite_url, id="sqlite"), pytest.param(kafka_url, id="kafka", marks=pytest.mark.kafka)]
)
def url(request: pytest.FixtureRequest) -> str:
    return str(request.param(request))


@pytest.fixture
def opened(url: str) -> Iterator[Callable[..., Log]]:
    """Open the log; as often as it is called, each time as another process would."""
    with ExitStack() as stack:

        def open_it(**options: Any) -> Log:
            log = connect(url, **options)
            stack.callback(log.close)
            return log

        yield open_it


@pytest.fixture
def log(opened: Callable[..., Log]) -> Log:
    return opened()


Started = subprocess.Popen[str]


@pytest.fixture
def start(url: str) -> Iterator[Callable[..., Started]]:
    """Start a real process that runs ``code`` with ``log`` open; it says what it did on its standard output."""
    processes: list[Started] = []
    opening = "import sys\nfrom everloop.log import NewRecord, connect\nlog = connect(sys.argv[1])\n"

    def run(code: str, *arguments: str) -> Started:
        command = [sys.executable, "-u", "-c", opening + textwrap.dedent(code), url, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def line(process: Started) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def new(key: str, value: str | None = "v", **fields: Any) -> NewRecord:
    return NewRecord("events", key, None if value is None else value.encode(), **fields)


def everything(log: Log, topic: str = "events") -> list[Record]:
    found: list[Record] = []
    for partition in range(log.partitions(topic)):
        offset = 0
        while records := log.read(topic, partition, offset, max_records=70):
            found += records
            offset = records[-1].offset + 1
    return found


def collect(consumer: Consumer, count: int, until: Callable[..., Any], deadline: float = 10) -> list[Record]:
    """Poll until ``count`` records came."""
    found: list[Record] = []

    def enough() -> bool:
        found.extend(consumer.poll(timeout=0.05))
        return len(found) >= count

    until(enough, deadline=deadline)
    return found


def ends(records: list[Record]) -> dict[tuple[str, int], int]:
    """What to commit after these records."""
    return {(r.topic, r.partition): r.offset + 1 for r in records}


def test_a_record_comes_back_as_it_was_written(log: Log) -> None:
    headers = {"schema": "Event", "id": "e1", "unicode": "é"}
    (position,) = log.append([NewRecord("events", "t/ep_1", b"\x00\xffbody", headers, 12.5)])
    (record,) = log.read("events", position.partition, position.offset)
    assert record == Record("events", position.partition, 0, "t/ep_1", b"\x00\xffbody", headers, 12.5)
    assert record.position == position


def test_a_tombstone_is_none_and_not_empty(log: Log) -> None:
    log.append([new("k", "first"), new("k", None), new("k", "")])
    assert [r.value for r in everything(log)] == [b"first", None, b""]


def test_no_event_time_means_that_of_the_append(log: Log) -> None:
    log.append([new("k"), new("k", time=5.0)])
    first, second = everything(log)
    assert first.time > 1_700_000_000
    assert second.time == 5.0


class Later(Score):
    """A score as the next release has it: one field is new, and may be missing where the older one wrote."""

    schema_version: int = 2
    mood: str = "unknown"


SCORE = {
    "tenant": "acme", "policy": "desk", "episode": "ep_1", "version": 1, "call": "c1", "reward_version": "r1",
    "value": 0.5, "spread": 0.1, "reward": 0.4, "mask": True, "source": "model", "time": 1000.0,
}  # fmt: skip


@pytest.mark.parametrize("reader", [Score, Later])
@pytest.mark.parametrize("writer", [Score, Later])
def test_releases_that_follow_each_other_read_each_other_s_records(
    log: Log, writer: type[Score], reader: type[Score]
) -> None:
    more = {"mood": "calm"} if writer is Later else {}
    (at,) = log.append([NewRecord("scores", "acme/ep_1", wire.encode(writer(**SCORE, **more)), {"schema": "Score"})])
    (record,) = log.read(*at)
    read = wire.decode(reader, record.value or b"")
    assert (read.value, read.schema_version) == (0.5, 2 if writer is Later else 1)
    passed_on = wire.decode(Later, wire.encode(read))
    assert passed_on.mood == more.get("mood", "unknown"), "what one does not know survives it"


def test_records_of_a_key_keep_their_order_in_one_partition(log: Log) -> None:
    for batch in range(20):
        log.append([new(f"k{key}", f"{batch}-{i}") for i in range(3) for key in range(9)])
    by_key: dict[str, list[Record]] = defaultdict(list)
    for record in everything(log):
        by_key[record.key].append(record)
    assert len(by_key) == 9
    for key, records in by_key.items():
        assert [r.value for r in records] == [f"{b}-{i}".encode() for b in range(20) for i in range(3)]
        assert {r.partition for r in records} == {partition_of(key, log.partitions("events"))}


def test_a_route_decides_the_partition_in_place_of_the_key(log: Log) -> None:
    routes = [f"acme/policy-{i}" for i in range(6)]
    log.append([new(f"k{i}")._replace(route=routes[i % 6]) for i in range(30)])
    for record in everything(log):
        assert record.partition == partition_of(routes[int(record.key[1:]) % 6], log.partitions("events"))


def test_offsets_count_up_and_the_end_is_behind_the_last(log: Log) -> None:
    positions = log.append([new(f"k{i}") for i in range(50)]) + log.append([new(f"k{i}") for i in range(50)])
    for partition, end in enumerate(log.end_offsets("events")):
        offsets = [p.offset for p in positions if p.partition == partition]
        assert offsets == sorted(set(offsets))
        assert offsets[0] >= 0
        assert end > offsets[-1]
        assert log.read("events", partition, end) == []
        assert [r.offset for r in log.read("events", partition)] == offsets


def test_a_topic_has_the_partitions_that_it_is_declared_with(opened: Callable[..., Log]) -> None:
    assert opened(partitions=3).partitions("events") == 3
    assert opened(partitions=7).partitions("events") == 3, "a topic that exists keeps its number"
    assert opened(partitions=7).partitions("releases") == 1


def test_what_append_returned_for_is_seen_by_another_process_at_once(log: Log, opened: Callable[..., Log]) -> None:
    other = opened()
    for i in range(5):
        log.append([new("k", str(i))])
        assert len(everything(other)) == i + 1


async def test_append_soon_resolves_once_it_is_durable(log: Log) -> None:
    futures = [log.append_soon([new(f"k{i}", str(i)), new(f"k{i}", str(i))]) for i in range(100)]
    positions = await asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
    assert len({p for pair in positions for p in pair}) == 200
    assert len(everything(log)) == 200


def test_a_record_that_is_too_large_is_refused_with_its_whole_batch(opened: Callable[..., Log]) -> None:
    log = opened(max_record_bytes=1024)
    with pytest.raises(RecordTooLarge, match="log takes 1,024"):
        log.append([new("k", "fits"), new("k", "x" * 1024)])
    assert everything(log) == []
    log.append([new("k", "x" * 1000)])
    assert len(everything(log)) == 1


@pytest.mark.parametrize("time", [float("nan"), float("inf"), -1.0])
def test_a_time_that_is_none_is_refused(log: Log, time: float) -> None:
    with pytest.raises(LogError, match="finite seconds"):
        log.append([new("k", time=time)])


def test_a_partition_that_does_not_exist_is_refused(log: Log) -> None:
    with pytest.raises(LogError, match="partitions 0 to 3, not 4"):
        log.read("events", 4)


def test_nothing_is_appended_to_a_closed_log(opened: Callable[..., Log]) -> None:
    log = opened()
    log.close()
    with pytest.raises(LogError, match="closed"):
        log.append([new("k")])


def test_what_is_not_committed_is_read_again(log: Log, until: Callable[..., Any]) -> None:
    log.append([new(f"k{i}") for i in range(20)])
    first = log.consumer("g", ["events"])
    read = collect(first, 20, until)
    first.close()
    assert sorted(collect(log.consumer("g", ["events"]), 20, until)) == sorted(read)


def test_committed_offsets_hold_across_restarts(opened: Callable[..., Log], until: Callable[..., Any]) -> None:
    log = opened()
    log.append([new(f"k{i}", "old") for i in range(20)])
    consumer = log.consumer("g", ["events"])
    consumer.commit(ends(collect(consumer, 20, until)))
    log.close()

    log = opened()
    log.append([new(f"k{i}", "new") for i in range(5)])
    assert {r.value for r in collect(log.consumer("g", ["events"]), 5, until)} == {b"new"}
    assert sum(log.committed("g", "events").values()) == 20


def test_groups_do_not_know_of_each_other(log: Log, until: Callable[..., Any]) -> None:
    log.append([new(f"k{i}") for i in range(10)])
    one, two = log.consumer("one", ["events"]), log.consumer("two", ["events"])
    one.commit(ends(collect(one, 10, until)))
    assert len(collect(two, 10, until)) == 10
    assert log.committed("two", "events") == {}


def test_latest_begins_at_the_end_and_stays_there_over_a_restart(log: Log, until: Callable[..., Any]) -> None:
    log.append([new(f"k{i}", "old") for i in range(10)])
    log.consumer("g", ["events"], start="latest").close()
    log.append([new(f"k{i}", "new") for i in range(10)])
    assert {r.value for r in collect(log.consumer("g", ["events"], start="latest"), 10, until)} == {b"new"}


def test_a_consumer_reads_several_topics(log: Log, until: Callable[..., Any]) -> None:
    consumer = log.consumer("g", ["events", "commands"])
    log.append([new("k"), NewRecord("commands", "t/p", b"c")])
    assert {r.topic for r in collect(consumer, 2, until)} == {"events", "commands"}


def test_a_poll_is_bounded_and_no_partition_starves(log: Log, until: Callable[..., Any]) -> None:
    log.append([new(f"k{i % 40}") for i in range(2000)])
    consumer = log.consumer("g", ["events"])
    records = consumer.poll(max_records=40)
    assert len(records) <= 40
    assert {r.partition for r in records} == {0, 1, 2, 3}
    assert len({r.position for r in records + collect(consumer, 2000 - len(records), until)}) == 2000


def test_everything_comes_however_little_is_asked_for(log: Log, until: Callable[..., Any]) -> None:
    for batch in range(4):
        log.append([new(f"k{i % 40}", f"{batch}-{i}" + "x" * 1000) for i in range(1500)])
    consumer = log.consumer("g", ["events"])
    found: list[Record] = []
    until(lambda: (found.extend(consumer.poll(max_records=300, timeout=0.2)), len(found) >= 6000)[1], deadline=60)
    for partition in range(4):
        offsets = [r.offset for r in found if r.partition == partition]
        assert offsets == sorted(set(offsets))
        assert len(offsets) == log.end_offsets("events")[partition]


def test_seek_reads_again_from_an_offset(log: Log, until: Callable[..., Any]) -> None:
    log.append([new("k", str(i)) for i in range(10)])
    partition = partition_of("k", 4)
    consumer = log.consumer("g", ["events"])
    collect(consumer, 10, until)
    consumer.seek(("events", partition), 7)
    assert [r.offset for r in collect(consumer, 3, until)] == [7, 8, 9]
    with pytest.raises(LogError, match="does not read"):
        consumer.seek(("scores", 0), 0)


def test_the_position_is_at_the_end_once_all_is_read(log: Log, until: Callable[..., Any]) -> None:
    log.append([new(f"k{i}") for i in range(50)])
    consumer = log.consumer("g", ["events"])
    first = until(lambda: consumer.poll(max_records=5))
    behind = sum(log.end_offsets("events")) - sum(consumer.position(("events", p)) for p in range(4))
    assert behind == 50 - len(first)
    collect(consumer, 50 - len(first), until)
    assert [consumer.position(("events", p)) for p in range(4)] == log.end_offsets("events")


def test_a_replay_starts_from_a_time(log: Log) -> None:
    times = [10, 30, 20, 40, 5, 50]
    log.append([new("k", str(t), time=float(t)) for t in times])
    partition = partition_of("k", 4)
    for asked, value in ((0, b"10"), (10, b"10"), (11, b"30"), (31, b"40"), (50, b"50")):
        offset = log.offset_at("events", partition, asked)
        assert log.read("events", partition, offset, max_records=1)[0].value == value
    assert log.offset_at("events", partition, 51) == len(times)


def test_a_time_is_found_among_many_records(log: Log) -> None:
    rng = random.Random(3)
    times = [1000 + i + rng.uniform(-40, 40) for i in range(1500)]
    log.append([new("k", time=t) for t in times])
    partition = partition_of("k", 4)
    for asked in rng.sample(times, 20):
        expected = next(i for i, t in enumerate(times) if t >= asked)
        assert log.offset_at("events", partition, asked) == expected


def test_two_consumers_share_the_partitions(log: Log, opened: Callable[..., Log], until: Callable[..., Any]) -> None:
    one, two = log.consumer("g", ["events"]), opened().consumer("g", ["events"])

    def shared() -> bool:
        one.poll(timeout=0)
        two.poll(timeout=0)
        return len(one.assignment()) == len(two.assignment()) == 2

    until(shared)
    assert not one.assignment() & two.assignment()
    log.append([new(f"k{i}") for i in range(100)])
    got = [collect(c, sum(log.end_offsets("events")[p] for _, p in c.assignment()), until) for c in (one, two)]
    assert len(got[0]) + len(got[1]) == 100
    assert len({r.position for r in got[0] + got[1]}) == 100
    assert not {r.key for r in got[0]} & {r.key for r in got[1]}


def test_who_leaves_gives_the_partitions_to_the_others(log: Log, until: Callable[..., Any]) -> None:
    one, two = log.consumer("g", ["events"]), log.consumer("g", ["events"])
    one.close()
    until(lambda: (two.poll(timeout=0), len(two.assignment()) == 4)[1], deadline=3)


def test_the_partitions_of_a_killed_consumer_go_to_the_others(
    log: Log, start: Callable[..., Started], until: Callable[..., Any]
) -> None:
    log.append([new(f"k{i}") for i in range(40)])
    process = start("""
        consumer = log.consumer("g", ["events"])
        read = 0
        while read < 40: read += len(consumer.poll())
        print(read)
        while True: consumer.poll()
    """)
    assert line(process) == "40"
    survivor = log.consumer("g", ["events"])
    process.kill()
    records = collect(survivor, 40, until, deadline=20)
    assert len({r.position for r in records}) == 40, "what the dead one had not committed is read again"
    assert len(survivor.assignment()) == 4


def test_who_lost_a_partition_cannot_commit(log: Log, opened: Callable[..., Log], until: Callable[..., Any]) -> None:
    log.append([new("k", str(i)) for i in range(4)])
    old = log.consumer("g", ["events"], member="worker")
    records = collect(old, 4, until)
    replacement = opened().consumer("g", ["events"], member="worker")
    assert len(replacement.assignment()) == 4, "a restarted process does not wait for its predecessor's session"
    with pytest.raises(LogError, match="no longer belongs"):
        old.commit(ends(records))
    assert log.committed("g", "events") == {}
    replacement.commit(ends(collect(replacement, 4, until)))
    assert set(log.committed("g", "events").values()) == {4}


def test_a_new_record_wakes_a_consumer_of_another_process(log: Log, start: Callable[..., Started]) -> None:
    process = start("""
        import time
        consumer = log.consumer("g", ["events"])
        print("ready")
        records = consumer.poll(timeout=20)
        print(time.time() - records[0].time)
    """)
    assert line(process) == "ready"
    log.append([new("k")])
    assert float(line(process)) < 2


WRITER = """
    name = sys.argv[2]
    for batch in range(60):
        log.append([NewRecord("events", f"{name}/{i % 3}", f"{batch * 5 + i}".encode()) for i in range(5)])
    log.close()
    print("done")
"""


def test_several_processes_write_at_once(log: Log, start: Callable[..., Started]) -> None:
    processes = [start(WRITER, f"writer-{n}") for n in range(3)]
    assert [line(process) for process in processes] == ["done"] * 3
    by_key: dict[str, list[int]] = defaultdict(list)
    for record in everything(log):
        by_key[record.key].append(int(record.value or b""))
    assert len(by_key) == 9
    assert sum(len(values) for values in by_key.values()) == 900
    assert all(values == sorted(values) for values in by_key.values())


DOOMED = """
    import hashlib, threading
    def write(name):
        for batch in range(100_000):
            body = f"{name}-{batch}".encode() * 400
            value = hashlib.sha256(body).digest() + body
            log.append([NewRecord("events", f"{name}-{batch}-{i}", value) for i in range(3)])
            sys.stdout.write(f"{name}-{batch}\\n")
            sys.stdout.flush()
    for name in (f"{sys.argv[2]}{thread}" for thread in "abc"): threading.Thread(target=write, args=(name,)).start()
"""


def test_what_a_killed_writer_was_told_is_there_and_no_record_is_torn(log: Log, start: Callable[..., Started]) -> None:
    acknowledged: set[str] = set()
    for lines in (15, 37, 61):
        process = start(DOOMED, str(lines))
        acknowledged |= {line(process) for _ in range(lines)}
        process.send_signal(signal.SIGKILL)
        process.wait()
        acknowledged |= set(process.stdout.read().split()) if process.stdout else set()
        log.append([new("after", "the kill")])
    batches: dict[str, int] = defaultdict(int)
    for record in everything(log):
        if record.key != "after":
            value = record.value or b""
            assert hashlib.sha256(value[32:]).digest() == value[:32]
            batches[record.key.rpartition("-")[0]] += 1
    assert {batches[name] for name in acknowledged} == {3}
