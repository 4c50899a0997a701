"""Compaction: fewer files, the same rows, at every moment, for readers in other processes too."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from pipelines import compaction
from pipelines.store import Store

WATCH = """
import sys
from pathlib import Path
from pipelines.store import Store
store, seen = Store(Path(sys.argv[1])), 0
print("ready", flush=True)
while not Path(sys.argv[2]).exists() or not seen:
    found = store.rows("SELECT count(*) AS n, count(DISTINCT episode) AS d, sum(version) AS v FROM episodes")[0]
    assert found["n"] == found["d"], found
    assert found["n"] >= seen, f"{found['n']} episodes after {seen}"
    seen = found["n"]
print(seen, flush=True)
"""


def files(home):
    return sorted((home.root / "store").rglob("*.parquet"))


def fill(loop, make, start, count):
    for n in range(start, start + count):
        loop.take(make.event(make.call(f"c{n}"), f"call-{n}", episode=f"ep_{n}"))
        loop.take(make.event(make.thumb(1, f"c{n}", id=f"t{n}"), f"thumb-{n}", episode=f"ep_{n}"))


def answers(store):
    return [
        store.sql(f"SELECT * FROM {view} ORDER BY ALL").to_pylist()
        for view in ("events", "turns", "trajectories", "feedback")
    ]


def test_rows_stay_and_old_versions_go(loop, make, home):
    fill(loop, make, 0, 6)
    before = answers(loop.store)
    many = len(files(home))
    assert loop.store.compact(grace=0, min_files=2) == many
    assert len(files(home)) == 3  # one a table and day
    assert answers(loop.store) == before
    assert loop.store.rows("SELECT count(*) AS n FROM raw.episodes") == [{"n": 6}]
    assert loop.store.rows("SELECT count(*) AS n FROM raw.events") == [{"n": 12}]


def test_sources_stay_for_a_grace_and_are_counted_once(loop, make, home):
    fill(loop, make, 0, 4)
    before, many = answers(loop.store), len(files(home))
    loop.store.compact(grace=3600, min_files=2)
    assert len(files(home)) == many + 3
    assert answers(loop.store) == before
    assert loop.store.compact(grace=3600, min_files=2) == 0  # nothing is folded twice meanwhile
    loop.store.compact(grace=0, min_files=2)
    assert len(files(home)) == 3
    assert answers(loop.store) == before


def test_types_survive(loop, make, home):
    fill(loop, make, 0, 2)
    (day,) = (home.root / "store" / "trajectories").glob("tenant=*/day=*")
    before = pq.read_schema(next(day.iterdir())).field("sequences").type.value_type
    loop.store.compact(grace=0, min_files=2)
    after = pq.read_schema(next(day.iterdir())).field("sequences").type.value_type
    assert [after.field(name).type.value_type for name in ("tokens", "logprobs")] == [
        before.field(name).type.value_type for name in ("tokens", "logprobs")
    ]


def test_killed_after_the_fold_and_before_the_deletion_nothing_is_lost(loop, make, home, monkeypatch):
    fill(loop, make, 0, 4)
    before, many = answers(loop.store), len(files(home))
    fold = compaction._fold

    def killed(*arguments):
        fold(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compaction, "_fold", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.store.compact(grace=0, min_files=2)
    assert len(files(home)) == many + 1
    assert answers(loop.store) == before
    fill(loop, make, 4, 3)
    loop.store.compact(grace=0, min_files=2)
    assert len(files(home)) == 3
    assert loop.store.rows("SELECT count(*) AS n FROM turns WHERE thumb = 1") == [{"n": 7}]


def test_one_compaction_at_a_time(loop, make, home):
    fill(loop, make, 0, 2)
    with compaction._alone(home.root / "store") as mine:
        assert mine
        assert loop.store.compact(grace=0, min_files=2) == 0
    assert loop.store.compact(grace=0, min_files=2) > 0


def test_folds_are_folded_again(loop, make, home):
    for start in (0, 2, 4):
        fill(loop, make, start, 2)
        loop.store.compact(grace=0, min_files=2)
    assert len(files(home)) == 3
    (path,) = (home.root / "store" / "episodes").rglob("*.parquet")
    assert len(json.loads(pq.read_metadata(path).metadata[b"everloop.sources"])) == 5
    assert loop.store.rows("SELECT count(*) AS n FROM episodes") == [{"n": 6}]


def test_a_large_file_joins_only_when_the_small_ones_are_worth_it(tmp_path, monkeypatch):
    def file(name, size):
        (tmp_path / name).write_bytes(bytes(size))
        return tmp_path / name

    monkeypatch.setattr(compaction, "SMALL", 10)
    monkeypatch.setattr(compaction, "LARGE", 1000)
    few = [file(f"s{n}", 5) for n in range(4)]
    assert compaction._tier([*few, file("fold", 200)]) == few
    more = [file(f"s{n}", 5) for n in range(12)]
    assert compaction._tier([*more, file("fold", 200)]) == sorted([*more, tmp_path / "fold"])
    assert compaction._tier([*more, file("whole", 1000)]) == sorted(more)


def test_another_process_reads_while_files_are_written_and_folded(loop, make, home, tmp_path):
    fill(loop, make, 0, 1)
    end = tmp_path / "end"
    watcher = subprocess.Popen(
        [sys.executable, "-c", WATCH, str(home.root / "store"), str(end)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert watcher.stdout.readline() == "ready\n"
        for start in range(1, 9, 2):
            fill(loop, make, start, 2)
            loop.store.compact(grace=0, min_files=2)  # the harshest: sources go at once
        end.touch()
        seen, _ = watcher.communicate(timeout=30)
    finally:
        watcher.kill()
    assert watcher.returncode == 0
    assert 0 < int(seen) <= 9
    assert Store(home.root / "store").rows("SELECT count(*) AS n FROM episodes") == [{"n": 9}]
