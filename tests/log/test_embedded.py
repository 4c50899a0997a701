"""The embedded log alone: its file, full disks, retention, what holds it up."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from everloop.config import Config
from everloop.errors import ConfigError, LogError, LogFull
from everloop.log import NewRecord, connect, embedded, open_log
from everloop.log.embedded import EmbeddedLog
from everloop.log.sqlite import writer as writer_module
from everloop.log.sqlite.database import WriteLock
from everloop.log.sqlite.retention import clean

Until = Callable[..., Any]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., EmbeddedLog]]:
    with ExitStack() as stack:

        def open_it(path: Path | None = None, **options: Any) -> EmbeddedLog:
            log = EmbeddedLog(path or tmp_path / "log.db", **options)
            stack.callback(log.close)
            return log

        yield open_it


def values(log: EmbeddedLog, topic: str = "events") -> list[bytes | None]:
    return [r.value for p in range(log.partitions(topic)) for r in log.read(topic, p, max_records=100_000)]


def fill(log: EmbeddedLog, size: int = 50_000) -> int:
    """Append until the log is full; how many records it took."""
    for count in range(10_000):
        failure = log.append_soon([NewRecord("events", "k", os.urandom(size))]).exception(20)
        if failure is not None:
            assert isinstance(failure, LogFull)
            assert "nothing was written" in str(failure)
            return count
    pytest.fail("it never became full")


def test_the_installations_log_lies_below_its_home(tmp_path: Path) -> None:
    log = open_log(Config(home=tmp_path / "home"))
    log.append([NewRecord("events", "k", b"v")])
    log.close()
    assert (tmp_path / "home" / "log.db").stat().st_size > 0


@pytest.mark.parametrize("url", ["sqlite://host/log.db", "sqlite:///", "log.db", ""])
def test_a_url_that_names_no_log_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:///<file>"):
        connect(url)


@pytest.mark.parametrize("query", ["max_bytes=lots", "size=3", "max_bytes"])
def test_an_unknown_option_is_refused(tmp_path: Path, query: str) -> None:
    with pytest.raises(ConfigError, match="max_bytes"):
        connect(f"sqlite:///{tmp_path}/log.db?{query}")


def test_the_log_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    connect(f"sqlite:///{tmp_path}/log.db").close()
    with sqlite3.connect(tmp_path / "log.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(LogError, match="format 99"):
        connect(f"sqlite:///{tmp_path}/log.db")


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.db").write_bytes(b"something else" * 1000)
    with pytest.raises(LogError, match="not a database"):
        connect(f"sqlite:///{tmp_path}/log.db")


def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "log.db") as connection:
        connection.execute("CREATE TABLE runs (id INTEGER)")
    with pytest.raises(LogError, match="another program's"):
        connect(f"sqlite:///{tmp_path}/log.db")
    with sqlite3.connect(tmp_path / "log.db") as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("runs",)]


def test_commits_are_synced_to_the_disk(opened: Callable[..., EmbeddedLog]) -> None:
    log = opened()
    settings = log.writer.do(
        lambda t: [t.connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    )
    assert settings == ["wal", 2]


def test_a_full_log_refuses_keeps_what_it_has_and_recovers(opened: Callable[..., EmbeddedLog]) -> None:
    log = opened(max_bytes=2_000_000)
    count = fill(log)
    assert 20 < count < 41
    assert sum(log.end_offsets("events")) == count
    assert len(values(log)) == count
    log.writer.do(lambda t: t.connection.execute("PRAGMA max_page_count = 100000") and None)
    log.append([NewRecord("events", "k", b"after room was made")])
    assert values(log)[-1] == b"after room was made"
    assert len(values(log)) == count + 1


def test_a_full_log_is_full_for_a_batch_as_a_whole(opened: Callable[..., EmbeddedLog]) -> None:
    log = opened(max_bytes=2_000_000)
    futures = [log.append_soon([NewRecord("events", f"k{i}", os.urandom(50_000)) for i in range(10)]) for _ in range(9)]
    written = sum(future.exception(20) is None for future in futures)
    assert all(isinstance(future.exception(), LogFull | None) for future in futures)
    assert len(values(log)) == written * 10


@pytest.mark.parametrize("small_disk", [6], indirect=True)
def test_a_full_disk_refuses_loses_nothing_and_recovers_by_itself(
    opened: Callable[..., EmbeddedLog], small_disk: Path, until: Until
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3_000_000))
    log = opened(small_disk / "log.db")
    count = fill(log, 20_000)
    assert count > 10
    assert len(values(log)) == count, "reading goes on"
    with pytest.raises(LogFull):
        log.append([NewRecord("events", "k", os.urandom(500_000))])
    ballast.unlink()
    log.append([NewRecord("events", "k", b"after")])
    log.close()
    again = opened(small_disk / "log.db")
    assert len(values(again)) == count + 1
    assert _check(small_disk / "log.db") == "ok"


def _check(path: Path) -> str:
    with sqlite3.connect(path) as connection:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])


def test_old_records_go_by_the_time_of_their_append_and_new_ones_stay(opened: Callable[..., EmbeddedLog]) -> None:
    log = opened(partitions=1)
    log.append([NewRecord("events", "k", str(i).encode(), time=1.0) for i in range(600)])
    assert log.writer.do(lambda t: clean(t.connection, t.now - 60)) is False
    assert len(values(log)) == 600, "event time does not count: a producer's clock may be wrong"
    log.writer.do(lambda t: clean(t.connection, t.now + 60))
    kept = values(log)
    assert kept == [str(i).encode() for i in range(512, 600)], "whole blocks of 256 go"
    assert log.end_offsets("events") == [600]
    assert log.consumer("g", ["events"]).poll()[0].offset == 512
    assert log.offset_at("events", 0, 0.5) == 512


def test_retention_goes_on_turn_by_turn_until_nothing_old_is_left(opened: Callable[..., EmbeddedLog]) -> None:
    log = opened(partitions=1)
    log.append([NewRecord("events", "k", b"") for i in range(256 * 40)])
    assert log.writer.do(lambda t: clean(t.connection, t.now + 60)) is True
    assert log.writer.do(lambda t: clean(t.connection, t.now + 60)) is False
    assert values(log) == []


def test_a_log_cleans_itself(opened: Callable[..., EmbeddedLog], until: Until) -> None:
    log = opened()
    log.append([NewRecord("events", "k", b"")] * 256)
    second = opened(retention_seconds=0.0)
    until(lambda: values(second) == [])


def test_a_compacted_topic_keeps_the_newest_of_each_key(opened: Callable[..., EmbeddedLog]) -> None:
    log = opened()
    log.append([NewRecord("routes", f"k{i % 3}", str(i).encode()) for i in range(254)])
    log.append([NewRecord("routes", "gone", b"x"), NewRecord("routes", "gone", None)])
    log.append([NewRecord("routes", "k0", b"newest")])
    log.writer.do(lambda t: clean(t.connection, t.now + 60))
    newest = {r.key: r.value for r in log.read("routes", 0)}
    assert newest == {"k0": b"newest", "k1": b"253", "k2": b"251"}
    assert len(log.read("routes", 0)) == 3


def test_calls_end_where_another_process_holds_the_log_up(
    opened: Callable[..., EmbeddedLog], monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    log = opened()
    log.append([NewRecord("events", "k", b"before")])
    monkeypatch.setattr(writer_module, "WAIT_SECONDS", 0.2)
    lock = WriteLock(log.database.path)
    with lock.held():
        soon = log.append_soon([NewRecord("events", "k", b"under way")])
        until(soon.running)
        with pytest.raises(LogError, match="held up"):
            log.append([NewRecord("events", "k", b"given up")])
        behind = log.append_soon([NewRecord("events", "k", b"behind")])
        monkeypatch.setattr(writer_module, "STALLED_SECONDS", 0.0)
        with pytest.raises(LogError, match="nothing was written"):
            log.append_soon([NewRecord("events", "k", b"refused")])
        assert isinstance(behind.exception(10), LogError)
        assert values(log) == [b"before"], "reading goes on"
    lock.close()
    soon.result(10)
    monkeypatch.undo()
    log.append([NewRecord("events", "k", b"after")])
    assert values(log) == [b"before", b"under way", b"after"]


def test_what_waits_is_bounded(opened: Callable[..., EmbeddedLog], monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened()
    log.append([NewRecord("events", "k", b"")])
    monkeypatch.setattr(writer_module, "MAX_WAITING_BYTES", 100_000)
    lock = WriteLock(log.database.path)
    batch = [NewRecord("events", "k", bytes(1000))] * 30
    with lock.held():
        waiting = [log.append_soon(batch) for _ in range(3)]
        with pytest.raises(LogError, match="try again later"):
            [log.append_soon(batch) for _ in range(3)]
    assert all(future.result(10) for future in waiting)
    lock.close()


def test_a_hung_consumer_loses_its_partitions_and_cannot_commit(
    opened: Callable[..., EmbeddedLog], until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, other = opened(session=0.4), opened(session=0.4)
    log.append([NewRecord("events", f"k{i}", b"") for i in range(8)])
    hung, healthy = log.consumer("g", ["events"]), other.consumer("g", ["events"])
    records = hung.poll()
    monkeypatch.setattr(embedded, "POLL_SECONDS", 0.3)
    until(lambda: (healthy.poll(timeout=0.05), len(healthy.assignment()) == 4)[1])
    with pytest.raises(LogError, match="no longer belongs"):
        hung.commit({(r.topic, r.partition): r.offset + 1 for r in records})
    assert log.committed("g", "events") == {}

    def shared() -> bool:
        hung.poll(timeout=0.02)
        healthy.poll(timeout=0.02)
        return len(hung.assignment()) == len(healthy.assignment()) == 2

    until(shared)


DOOMED = """
import sys
from everloop.log import NewRecord, connect
log = connect(sys.argv[1])
for batch in range(100_000):
    log.append([NewRecord("events", f"{sys.argv[2]}-{batch}-{i}", b"x" * 4000) for i in range(3)])
    print(batch, flush=True)
"""


def test_a_killed_writer_leaves_whole_batches(tmp_path: Path, opened: Callable[..., EmbeddedLog]) -> None:
    for lines in (7, 20, 31):
        command = [sys.executable, "-c", DOOMED, f"sqlite:///{tmp_path}/log.db", str(lines)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(lines):
                process.stdout.readline()
            process.kill()
    log = opened()
    keys = [r.key for p in range(log.partitions("events")) for r in log.read("events", p, max_records=100_000)]
    batches = Counter(key.rpartition("-")[0] for key in keys)
    assert len(batches) >= 7 + 20 + 31
    assert set(batches.values()) == {3}


def test_threads_share_one_log(opened: Callable[..., EmbeddedLog]) -> None:
    log = opened()
    failures: list[Exception] = []

    def work(name: str) -> None:
        try:
            for i in range(30):
                log.append([NewRecord("events", name, str(i).encode())])
                assert len(values(log)) > i
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(values(log)) == 180
