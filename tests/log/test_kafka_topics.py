"""Topics as declared: the plan, carrying it out, and what is said where a topic is missing. On the real broker."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from everloop.cli.main import main
from everloop.errors import LogError, RecordTooLarge
from everloop.log import NewRecord, connect, partition_of
from everloop.log.kafka.log import KafkaLog
from everloop.log.kafka.plan import carry_out
from everloop.topics import TOPICS
from kafka import KafkaConsumer

from services.broker.process import Broker

pytestmark = pytest.mark.kafka


@pytest.fixture
def url(broker: Broker) -> str:
    return f"kafka://{broker.address}/{secrets.token_hex(6)}"


@pytest.fixture
def opened(url: str) -> Iterator[Callable[..., KafkaLog]]:
    made: list[KafkaLog] = []

    def open_it(**options: object) -> KafkaLog:
        log = connect(url, **options)  # type: ignore[arg-type]
        assert isinstance(log, KafkaLog)
        made.append(log)
        return log

    yield open_it
    for log in made:
        log.close()


def test_an_empty_cluster_gets_every_topic_and_then_nothing_differs(opened: Callable[..., KafkaLog]) -> None:
    log = opened(partitions=3)
    plan = log.plan()
    assert plan.notes, "a broker without an authorizer keeps no grants, and that is said"
    made = {change.what.split()[2].rstrip(":") for change in plan.changes}
    assert set(TOPICS) < made
    assert "everloop-state-assemble" in made
    carry_out(plan.changes)
    assert log.plan().changes == []
    assert [log.partitions(topic) for topic in ("events", "routes", "everloop-state-assemble")] == [3, 1, 3]


def test_changelogs_are_compacted_soon(opened: Callable[..., KafkaLog]) -> None:
    log = opened()
    log.partitions("everloop-state-score")
    log.partitions("routes")
    found = log.cluster.describe(["everloop-state-score", "routes"])
    its, other = (found[name].settings for name in ("everloop-state-score", "routes"))
    assert (its["cleanup.policy"], its["segment.bytes"], its["segment.ms"]) == ("compact", "67108864", "3600000")
    assert (other["cleanup.policy"], other["segment.bytes"]) == ("compact", "1073741824"), "as the cluster has it"


def test_what_is_read_in_pieces_is_fetched_once(
    opened: Callable[..., KafkaLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(partitions=1)
    log.append([NewRecord("events", "k", b"x" * 100, {"id": str(n)}) for n in range(300)])
    sought: list[int] = []
    seek = KafkaConsumer.seek
    monkeypatch.setattr(KafkaConsumer, "seek", lambda its, at, to: (sought.append(to), seek(its, at, to)))
    offset, found = 0, list[str]()
    while records := log.read("events", 0, offset, 40):
        found += [record.headers["id"] for record in records]
        offset = records[-1].offset + 1
    assert found == [str(n) for n in range(300)]
    assert sought == [0]
    assert log.read("events", 0, 7, 1)[0].headers["id"] == "7", "and elsewhere where that is asked for"


def test_a_difference_is_shown_before_it_is_mended(opened: Callable[..., KafkaLog]) -> None:
    carry_out(opened().plan().changes)
    log = opened(retention_hours=1, max_record_bytes=2_000_000)
    before = log.cluster.describe(["events"])["events"]
    plan = log.plan()
    said = [change.what for change in plan.changes]
    assert "set retention.ms of events: 2592000000 → 3600000" in said
    assert not [line for line in said if "retention.ms of routes" in line], "compacted topics are kept for ever"
    assert log.cluster.describe(["events"])["events"] == before
    carry_out(plan.changes)
    assert log.cluster.describe(["events"])["events"].settings["retention.ms"] == "3600000"
    (position,) = log.append([NewRecord("events", "k", b"x" * 1_900_000)])
    assert len(log.read("events", position.partition)[0].value or b"") == 1_900_000


def test_partitions_are_added_only_where_that_is_asked_for(opened: Callable[..., KafkaLog]) -> None:
    carry_out(opened(partitions=2).plan().changes)
    log = opened(partitions=5)
    keys = [f"k{i}" for i in range(40)]
    log.append([NewRecord("events", key, b"old") for key in keys])
    refused = [change for change in log.plan().changes if "events" in change.what]
    assert [change.make for change in refused] == [None]
    assert "--add-partitions" in refused[0].what
    carry_out(log.plan(add_partitions=True).changes)
    assert log.plan().changes == []
    assert log.partitions("events") == 5
    positions = opened(partitions=5).append([NewRecord("events", key, b"new") for key in keys])
    assert [p.partition for p in positions] == [partition_of(key, 5) for key in keys]
    log.append([NewRecord("events", key, b"of a writer that has not seen them yet") for key in keys])
    fewer = opened(partitions=2).plan().changes
    assert all(change.make is None and "none can be taken away" in change.what for change in fewer)


def test_a_topic_that_is_missing_is_named_with_the_mend(opened: Callable[..., KafkaLog]) -> None:
    log = opened(create_topics=False)
    for ask in (
        lambda: log.append([NewRecord("events", "k", b"v")]),
        lambda: log.read("events", 0),
        lambda: log.consumer("g", ["events"]),
        lambda: log.fenced("w").write([NewRecord("events", "k", b"v")]),
    ):
        with pytest.raises(LogError, match=r"there is no topic .*events.*everloop topics apply"):
            ask()


def test_a_record_that_the_topic_does_not_take_is_too_large(opened: Callable[..., KafkaLog]) -> None:
    opened(max_record_bytes=100_000).append([NewRecord("events", "k", b"fits")])
    log = opened(max_record_bytes=2_000_000)
    with pytest.raises(RecordTooLarge, match=r"max.message.bytes"):
        log.append([NewRecord("events", "k", b"x" * 500_000)])
    log.append([NewRecord("events", "k", b"and goes on")])


def test_the_command_shows_applies_and_says_so_in_its_exit_status(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVERLOOP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EVERLOOP_LOG__URL", url)
    assert main(["topics", "check"]) == 1
    assert "+ make topic events: 4 partitions" in capsys.readouterr().out
    assert main(["topics", "check"]) == 1, "a check changes nothing"
    assert main(["topics", "apply"]) == 0
    assert main(["topics", "check"]) == 0
    assert "Everything is as declared." in capsys.readouterr().out
    monkeypatch.setenv("EVERLOOP_LOG__PARTITIONS", "2")
    assert main(["topics", "apply"]) == 1
    assert "! events has 4 partitions, declared are 2" in capsys.readouterr().out
    monkeypatch.setenv("EVERLOOP_LOG__URL", "sqlite:///log.db")
    assert main(["topics", "check"]) == 2
