"""The archive: whole files or none, replays that change nothing, rows typed and true."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from everloop import wire
from everloop.errors import ContractError
from everloop.event import Event
from everloop.release import Adapter, Release, ReleaseState, Route
from everloop.run import Command, DeadLetter, RewardVersion, Run, RunState
from everloop.topics import (
    ADAPTERS,
    COMMANDS,
    DEAD_LETTERS,
    EVENTS,
    PAUSES,
    RELEASES,
    REWARDS,
    ROUTES,
    RUNS,
    TOPICS,
)

from pipelines.archive import Archive
from pipelines.store import Store
from pipelines.tables import FEEDS, day_of

OWNER = {"tenant": "acme", "policy": "desk", "time": 1_763_900_000.0}


def files(home):
    return sorted((home.root / "store").rglob("*.parquet"))


def test_every_topic_has_a_table():
    assert set(FEEDS) == set(TOPICS)


def test_token_ids_and_logprobs_are_typed(loop, make, home):
    loop.take(make.event(make.call()))
    (path,) = (home.root / "store" / "trajectories" / "tenant=acme" / "day=2025-11-23").iterdir()
    sequence = pq.read_schema(path).field("sequences").type.value_type
    assert sequence.field("tokens").type == pa.list_(pa.int32())
    assert sequence.field("logprobs").type == pa.list_(pa.float32())
    (row,) = loop.store.rows("SELECT sequences FROM trajectories")
    assert row["sequences"][0]["tokens"] == [1, 5, 7, 2]
    assert row["sequences"][0]["logprobs"] == [0, 0, -0.5, -0.25]
    assert row["sequences"][0]["spans"][0]["call"] == "c1"


def test_a_batch_that_is_handled_again_writes_the_same_files(make, home):
    records = [make.record(make.event(make.call(f"c{n}"), episode=f"ep_{n}"), n) for n in range(6)]

    def handle(batch):
        archive = Archive(home)  # a new process each time
        for record in batch:
            archive.handle(make.State(), record, 0.0)
        archive.flush(make.State(), 0.0)

    handle(records)
    before = files(home)
    handle(records)
    assert files(home) == before
    handle(records[2:])  # where the boundaries of the batch fell elsewhere
    assert len(files(home)) == len(before) + 1
    assert Store(home.root / "store").rows("SELECT count(*) AS n FROM events") == [{"n": 6}]


def test_a_log_begun_anew_overwrites_nothing(make, home):
    for name in ("first", "second"):
        archive = Archive(home)
        archive.handle(make.State(), make.record(make.event(make.call(name), episode=f"ep_{name}"), 0), 0.0)
        archive.flush(make.State(), 0.0)
    assert Store(home.root / "store").rows("SELECT call FROM events ORDER BY call") == [
        {"call": "first"},
        {"call": "second"},
    ]


def test_a_file_that_could_not_be_finished_has_no_name_and_is_written_at_the_next_try(make, home, monkeypatch):
    archive = Archive(home)
    archive.handle(make.State(), make.record(make.event(make.call()), 0), 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            archive.flush(make.State(), 0.0)
    assert list((home.root / "store").rglob("*.p*")) == []
    archive.flush(make.State(), 0.0)
    assert len(files(home)) == 1


def test_what_grows_too_large_is_written_before_the_flush(make, home):
    archive = Archive(home, max_bytes=1000)
    for n in range(20):
        archive.handle(make.State(), make.record(make.event(make.call(f"c{n}")), n), 0.0)
    assert len(files(home)) > 2


@pytest.mark.parametrize("tenant", ["../../outside", "a/b", "", "UPPER", "."])
def test_a_tenant_that_is_no_name_never_becomes_a_path(make, home, tenant):
    with pytest.raises(ContractError, match="is not a name"):
        Archive(home).handle(make.State(), make.record(make.event(make.call(), tenant=tenant), 0), 0.0)


def test_bytes_that_are_no_contract_are_refused_and_a_tombstone_is_not(make, home):
    archive = Archive(home)
    record = make.record(make.event(make.call()), 0)
    with pytest.raises(ContractError):
        archive.handle(make.State(), record._replace(value=b"garbage"), 0.0)
    assert archive.handle(make.State(), record._replace(value=None), 0.0) == []


def test_the_envelope_gives_the_event_again(loop, make):
    event = make.event(make.call(from_the_future=1), seq=3, subject="sue")
    loop.take(event)
    (row,) = loop.store.rows("SELECT envelope FROM newest.events")
    assert wire.decode(Event, row["envelope"]) == event


def test_episodes_come_back_as_contracts(loop, make):
    (episode,) = loop.take(make.event(make.call()), make.event(make.thumb()))
    assert list(loop.store.episodes("tenant = ? AND policy = ?", ["acme", "desk"])) == [episode]


def test_control_topics_are_tables_with_their_history(loop):
    run = Run(id="run_1", state="running", batch="b", parent="base", metrics={"kl": 0.5}, **OWNER)
    done = run.model_copy(update={"state": RunState.PUBLISHED, "step": 3, "adapter": "a" * 8})
    release = Release(id="rel_1", adapter="a" * 8, uri="models:/x/1", evidence={"gate": {"gain": 0.1}}, **OWNER)
    loop.keep([run, done], RUNS.name)
    loop.keep([release, release.to(ReleaseState.REJECTED, "no gain", 1_763_900_001.0)], RELEASES.name)
    adapter = {"hash": "a" * 8, "base": "tiny-k2", "run": "run_1", "batch": "b", "uri": "u", "rank": 8}
    loop.keep([Adapter(targets=("q_a_proj",), **adapter, **OWNER)], ADAPTERS.name)
    loop.keep([RewardVersion(version="rv1", path="p", updates=5, auc=0.7, **OWNER)], REWARDS.name)
    loop.keep([Route(epoch=1, **OWNER), Route(epoch=2, live="a" * 8, **OWNER)], ROUTES.name)
    loop.keep([Command(id="cmd", kind="promote", **OWNER)], COMMANDS.name)
    loop.keep([Command(id=kind, kind=kind, **OWNER) for kind in ("pause", "resume")], PAUSES.name)
    letter = DeadLetter(
        id="d1",
        handler="score",
        topic=EVENTS.name,
        partition=0,
        offset=3,
        record_key="k",
        value=b"\xff",
        cause="x",
        time=1.0,
    )
    loop.keep([letter], DEAD_LETTERS.name)
    ask = loop.store.rows
    assert ask("SELECT state, step, metrics ->> 'kl' AS kl FROM runs") == [
        {"state": "published", "step": 3, "kl": "0.5"}
    ]
    assert ask("SELECT count(*) AS n FROM history.runs") == [{"n": 2}]
    assert ask("SELECT state, reason FROM releases") == [{"state": "rejected", "reason": "no gain"}]
    assert ask("SELECT state FROM history.releases ORDER BY step") == [{"state": "candidate"}, {"state": "rejected"}]
    assert ask("SELECT evidence ->> '$.gate.gain' AS gain FROM releases") == [{"gain": "0.1"}]
    assert ask("SELECT targets, rank FROM adapters") == [{"targets": ["q_a_proj"], "rank": 8}]
    assert ask("SELECT auc FROM rewards") == [{"auc": 0.7}]
    assert ask("SELECT epoch, live FROM routes") == [{"epoch": 2, "live": "a" * 8}]
    assert ask("SELECT kind FROM commands") == [{"kind": "promote"}]
    assert ask("SELECT kind FROM pauses") == [{"kind": "resume"}]
    assert ask("SELECT count(*) AS n FROM history.pauses") == [{"n": 2}]
    assert ask("SELECT cause, value FROM dead_letters") == [{"cause": "x", "value": b"\xff"}]


def test_the_day_is_that_of_utc_and_never_outside_the_calendar():
    assert day_of(1_763_942_399.0) == "2025-11-23"
    assert day_of(1_763_942_400.0) == "2025-11-24"
    assert day_of(-5.0) == "1970-01-01"
    assert day_of(1e300) == "9999-12-31"
