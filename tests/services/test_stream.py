"""Stream handlers on the log: what is kept, what is retried, what becomes a dead letter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.errors import ContractError, LogFull
from everloop.home import Home
from everloop.log import Log, NewRecord, Record, connect
from everloop.run import DeadLetter
from everloop.stream import State
from prometheus_client import REGISTRY

from services.stream import Retry, StateStore, Stream, run_handler

FAST = Retry(tries=3, first=0.001, longest=0.002)
Until = Callable[..., Any]


class Counting:
    """Counts records by key and says each count. ``trouble`` may raise after the state was changed."""

    topics = ("events",)

    def __init__(self, trouble: Callable[[Record], None] = lambda record: None, name: str = "counting") -> None:
        self.name = name
        self.trouble = trouble
        self.batches: list[int] = []
        self.handled = 0

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        count = int(state.get(record.key) or b"0") + 1
        state.put(record.key, str(count).encode())
        self.trouble(record)
        self.handled += 1
        return [NewRecord("episodes", record.key, str(count).encode(), {"id": record.headers.get("id", "")})]

    def flush(self, state: State, now: float) -> list[NewRecord]:
        self.batches.append(self.handled)
        return []


def refuse(*values: bytes, error: type[Exception] = ContractError) -> Callable[[Record], None]:
    def trouble(record: Record) -> None:
        if record.value in values:
            raise error(f"cannot take {record.value!r}")

    return trouble


@pytest.fixture
def log(home: Home) -> Iterator[Log]:
    log = connect(f"sqlite:///{home.root}/log.db")
    yield log
    log.close()


@pytest.fixture
def folder(home: Home) -> Path:
    return home.folder("state")


def feed(log: Log, *values: bytes, key: str = "k") -> None:
    log.append([NewRecord("events", key, value, {"id": str(n)}) for n, value in enumerate(values)])


def records(log: Log, topic: str) -> list[Record]:
    return [r for p in range(log.partitions(topic)) for r in log.read(topic, p, max_records=10_000)]


def outputs(log: Log) -> list[bytes | None]:
    return [r.value for r in records(log, "episodes")]


def letters(log: Log, home: Home) -> list[DeadLetter]:
    return [wire.decode(DeadLetter, r.value or b"", home.blobs) for r in records(log, "dead-letters")]


def count_in(folder: Path, key: str = "k") -> bytes | None:
    store = StateStore(folder / "counting.db")
    try:
        return store.get(key)
    finally:
        store.close()


def metric(name: str, handler: str) -> float:
    return REGISTRY.get_sample_value(f"everloop_handler_{name}", {"handler": handler}) or 0.0


def in_thread(stream: Stream) -> threading.Thread:
    thread = threading.Thread(target=stream.run, daemon=True)
    thread.start()
    return thread


def test_records_change_the_state_and_give_outputs(log: Log, folder: Path) -> None:
    feed(log, *[b"v"] * 1200)
    handler = Counting(name="plain")
    stream = run_handler(handler, log, folder, until_idle=True)
    assert sorted(int(v or b"") for v in outputs(log)) == list(range(1, 1201))
    assert stream.lag() == 0
    assert sum(log.committed("plain", "events").values()) == 1200, "shown in the log"
    assert metric("records_total", "plain") == 1200
    assert metric("record_seconds_count", "plain") == 1200


def test_a_second_run_goes_on_where_the_first_ended(log: Log, folder: Path) -> None:
    for _ in range(2):
        feed(log, b"a", b"b")
        run_handler(Counting(), log, folder, until_idle=True)
    assert outputs(log) == [b"1", b"2", b"3", b"4"]


def test_a_record_that_can_never_be_taken_becomes_a_dead_letter_and_the_rest_goes_on(
    log: Log, folder: Path, home: Home
) -> None:
    feed(log, b"good", b"\xffbad", b"good")
    stream = run_handler(Counting(refuse(b"\xffbad"), name="counting"), log, folder, until_idle=True)
    assert outputs(log) == [b"1", b"2"], "nothing of the refused record is in the state"
    (letter,) = letters(log, home)
    assert (letter.handler, letter.topic, letter.offset, letter.record_key) == ("counting", "events", 1, "k")
    assert (letter.value, letter.headers) == (b"\xffbad", {"id": "1"})
    assert letter.cause == "ContractError: cannot take b'\\xffbad'"
    assert "in trouble" in letter.stack
    assert stream.status()["dead_letters"] == 1


def test_a_dead_letter_as_large_as_the_log_takes_goes_to_the_blob_store(log: Log, folder: Path, home: Home) -> None:
    huge = b"x" * 1_048_000
    feed(log, huge, b"good")
    run_handler(Counting(refuse(huge)), log, folder, until_idle=True)
    assert letters(log, home)[0].value == huge
    assert outputs(log) == [b"1"]


def test_an_error_that_passes_is_tried_again_and_counts_once(log: Log, folder: Path, home: Home) -> None:
    failures = [ConnectionError("away"), LogFull("full"), None, KeyError("x"), None]

    def trouble(record: Record) -> None:
        failure = failures.pop(0) if failures else None
        if failure:
            raise failure

    feed(log, b"a", b"b")
    before = metric("retries_total", "counting")
    run_handler(Counting(trouble), log, folder, until_idle=True, retry=FAST)
    assert outputs(log) == [b"1", b"2"]
    assert metric("retries_total", "counting") == before + 3
    assert letters(log, home) == []


def test_an_error_of_the_surroundings_ends_the_run_and_commits_nothing(log: Log, folder: Path, home: Home) -> None:
    feed(log, b"good", b"bad")
    for _ in range(5):
        with pytest.raises(OSError, match="cannot take"):
            run_handler(Counting(refuse(b"bad", error=OSError)), log, folder, until_idle=True, retry=FAST)
    assert outputs(log) == []
    assert count_in(folder) is None
    assert letters(log, home) == [], "however often: the record is not to blame"
    run_handler(Counting(), log, folder, until_idle=True)
    assert outputs(log) == [b"1", b"2"]


def test_a_record_that_the_program_fails_on_again_and_again_does_not_stop_the_partition(
    log: Log, folder: Path, home: Home
) -> None:
    feed(log, b"good", b"bad", b"good")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run_handler(Counting(refuse(b"bad", error=ZeroDivisionError)), log, folder, until_idle=True, retry=FAST)
    run_handler(Counting(refuse(b"bad", error=ZeroDivisionError)), log, folder, until_idle=True, retry=FAST)
    assert outputs(log) == [b"1", b"2"]
    assert [letter.offset for letter in letters(log, home)] == [1]


def test_an_output_that_is_too_large_costs_its_record_alone(log: Log, folder: Path, home: Home) -> None:
    class Wordy(Counting):
        def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
            (output,) = super().handle(state, record, now)
            return [output._replace(value=bytes(2_000_000)) if record.value == b"bad" else output]

    feed(log, b"good", b"bad", b"good")
    run_handler(Wordy(), log, folder, until_idle=True, retry=FAST)
    assert outputs(log) == [b"1", b"2"]
    assert [letter.cause.split(":")[0] for letter in letters(log, home)] == ["RecordTooLarge"]


def test_a_dead_letter_that_cannot_be_taken_is_no_new_one(log: Log, folder: Path, home: Home) -> None:
    class Reader(Counting):
        topics = ("dead-letters",)

    log.append([NewRecord("dead-letters", "h", b"broken")])
    run_handler(Reader(refuse(b"broken")), log, folder, until_idle=True)
    assert len(records(log, "dead-letters")) == 1


def test_the_states_offset_overrides_the_one_in_the_log(log: Log, folder: Path) -> None:
    feed(log, b"a", b"b", b"c")
    consumer = log.consumer("counting", ["events"])
    consumer.commit({(r.topic, r.partition): r.offset + 1 for r in consumer.poll()})
    consumer.close()
    run_handler(Counting(), log, folder, until_idle=True)
    assert outputs(log) == [b"1", b"2", b"3"]


def test_a_state_that_was_deleted_is_built_anew(log: Log, folder: Path) -> None:
    feed(log, b"a", b"b", b"c")
    run_handler(Counting(), log, folder, until_idle=True)
    for file in folder.glob("counting.db*"):
        file.unlink()
    run_handler(Counting(), log, folder, until_idle=True)
    assert count_in(folder) == b"3"
    assert outputs(log) == [b"1", b"2", b"3"] * 2, "the same outputs once more, with the same ids"


def test_a_stop_keeps_what_was_handled_of_the_batch(log: Log, folder: Path) -> None:
    stop = threading.Event()

    def trouble(record: Record) -> None:
        if record.value == b"3":
            stop.set()

    feed(log, *[str(i).encode() for i in range(10)])
    run_handler(Counting(trouble), log, folder, stop=stop)
    assert outputs(log) == [b"1", b"2", b"3", b"4"]
    run_handler(Counting(), log, folder, until_idle=True)
    assert len(outputs(log)) == 10


def test_a_stop_does_not_wait_for_the_next_try(log: Log, folder: Path, until: Until) -> None:
    feed(log, b"bad")
    stop, tried = threading.Event(), threading.Event()

    def trouble(record: Record) -> None:
        tried.set()
        raise OSError("away")

    stream = Stream(Counting(trouble), log, folder, stop=stop, retry=Retry(tries=3, first=600, longest=600))
    thread = in_thread(stream)
    assert tried.wait(10)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert count_in(folder) is None


def test_a_second_process_of_a_handler_stands_by_and_takes_over(log: Log, folder: Path, until: Until) -> None:
    stops = threading.Event(), threading.Event()
    first, second = (Counting() for _ in stops)
    one, two = (Stream(h, log, folder, stop=stop) for h, stop in zip((first, second), stops, strict=True))
    threads = [in_thread(one)]
    feed(log, b"a")
    until(lambda: first.handled == 1)
    threads.append(in_thread(two))
    feed(log, b"b")
    until(lambda: first.handled == 2)
    assert second.handled == 0
    stops[0].set()
    feed(log, b"c")
    until(lambda: second.handled == 1)
    stops[1].set()
    for thread in threads:
        thread.join(10)
    assert outputs(log) == [b"1", b"2", b"3"]


def test_what_flush_says_is_appended_and_it_is_called_while_idle(log: Log, folder: Path, until: Until) -> None:
    class Totals(Counting):
        def flush(self, state: State, now: float) -> list[NewRecord]:
            super().flush(state, now)
            state.put("flushes", str(len(self.batches)).encode())
            return [NewRecord("scores", "total", str(self.handled).encode())]

    stop, handler = threading.Event(), Totals()
    stream = Stream(handler, log, folder, stop=stop)
    thread = in_thread(stream)
    feed(log, b"a", b"b")
    until(lambda: handler.batches and handler.batches[-1] == 2 and handler.batches.count(2) > 1)
    stop.set()
    thread.join(10)
    assert records(log, "scores")[-1].value == b"2"
    assert int(count_in(folder, "flushes") or b"") == len(handler.batches)


def test_a_flush_that_fails_is_tried_again_alone(log: Log, folder: Path) -> None:
    class Failing(Counting):
        failures = 2

        def flush(self, state: State, now: float) -> list[NewRecord]:
            state.put("k", b"1000")
            if self.failures:
                self.failures -= 1
                raise OSError("away")
            return []

    feed(log, b"a")
    handler = Failing()
    run_handler(handler, log, folder, until_idle=True, retry=FAST)
    assert handler.handled == 1
    assert count_in(folder) == b"1000"


def test_records_are_gathered_while_a_batch_lingers(log: Log, folder: Path, until: Until) -> None:
    stop, handler = threading.Event(), Counting()
    thread = in_thread(Stream(handler, log, folder, stop=stop, linger=0.5, max_records=50))
    until(lambda: handler.batches)
    feed(log, b"a")
    feed(log, *[b"b"] * 60)
    until(lambda: handler.handled == 61)
    stop.set()
    thread.join(10)
    assert 50 in handler.batches, "a full batch does not linger"


def test_a_handler_that_hangs_shows_in_liveness_and_status(log: Log, folder: Path, until: Until) -> None:
    release, stop = threading.Event(), threading.Event()
    stream = Stream(Counting(lambda record: release.wait(20) and None), log, folder, stop=stop, stuck_after=0.2)
    assert stream.trouble() is None, "it has not begun"
    thread = in_thread(stream)
    feed(log, b"a", b"b")
    until(lambda: "counting has not moved for 1 s with 2 records to go" in (stream.trouble() or ""))
    assert stream.status()["lag"] == 2
    assert metric("lag_records", "counting") == 2
    assert 0.2 < (metric("oldest_waiting_seconds", "counting") or 0) < 60, "since it was appended"
    release.set()
    until(lambda: stream.trouble() is None and stream.lag() == 0)
    stop.set()
    thread.join(10)
