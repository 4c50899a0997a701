"""The benchmark of the log: its load is what it says, and it fails where an event was not handled."""

from __future__ import annotations

from pathlib import Path

import pytest
from everloop import wire
from everloop.event import Event
from everloop.home import Home
from everloop.log import NewRecord, connect

from benchmarks import log as bench
from benchmarks.log import Case, check, event, measure


def test_events_are_of_one_kilobyte_and_two_make_an_episode():
    records = [event("x", number) for number in range(4 * bench.APART)]
    assert {round(len(record.value or b"") / 1024) for record in records} == {1}
    events = [wire.decode(Event, record.value or b"") for record in records]
    assert len({one.id for one in events}) == len(events)
    seqs: dict[str, list[int | None]] = {}
    for one in events:
        seqs.setdefault(one.episode, []).append(one.seq)
    assert len(seqs) == 2 * bench.APART
    assert all(its == [0, 1] for its in seqs.values())


def test_an_event_without_an_output_or_with_two_fails_the_run(tmp_path: Path):
    log = connect(f"sqlite:///{tmp_path}/log.db")
    log.append([NewRecord("episodes", name, b"noted", {"id": name}) for name in ("a", "b")])
    check(log, "note", {"a", "b"})
    with pytest.raises(SystemExit, match="of 3 events 1 were not handled"):
        check(log, "note", {"a", "b", "c"})
    log.append([NewRecord("episodes", "a", b"noted", {"id": "a"})])
    with pytest.raises(SystemExit, match="1 more than once"):
        check(log, "note", {"a", "b"})
    log.close()


@pytest.mark.processes
def test_a_row_is_measured_and_every_event_found(tmp_path: Path):
    home = Home(tmp_path)
    row = measure(Case("SQLite", 4, 1, "assemble"), home, f"sqlite:///{tmp_path}/log.db", None, 200, 0.2)
    assert row["events/s"] > 0
    assert 0 < row["p50 ms"] <= row["p99 ms"]
    assert row["worker us"] > 0
