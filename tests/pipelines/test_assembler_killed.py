"""The assembler process, killed at its worst moments: nothing lost, nothing doubled, and it goes on by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from everloop import wire
from everloop.config import Config
from everloop.episode import Episode
from everloop.event import Ended
from everloop.log import open_log
from everloop.log.base import NewRecord
from everloop.topics import EPISODES, EVENTS

from pipelines.store import Store

pytestmark = pytest.mark.processes

# Runs the real process, and ends it with SIGKILL when a function is called for the nth time.
KILLED_AT = """
import importlib, os, runpy, signal, sys
module, name, times, after, run = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "after", sys.argv[5]
owner, _, attribute = name.rpartition(".")
at = importlib.import_module(module)
at = getattr(at, owner) if owner else at
real, calls = getattr(at, attribute), [0]
def killed(*arguments, **options):
    calls[0] += 1
    if calls[0] == times and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*arguments, **options)
    if calls[0] == times:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(at, attribute, killed)
runpy.run_module(run, run_name="__main__")
"""


def environment(home) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
    return {**own, "EVERLOOP_HOME": str(home.root), "EVERLOOP_SERVICES__ASSEMBLER_PORT": "0", "OMP_NUM_THREADS": "1"}


@contextmanager
def assembler(home) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-m", "services.assembler"], env=environment(home), cwd=Path.cwd())
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()


def append(log, events) -> None:
    log.append([NewRecord(EVENTS.name, event.key, wire.encode(event), {}, event.time) for event in events])


def numbers(store) -> dict[str, int]:
    (row,) = store.rows("""
        SELECT (SELECT count(*) FROM episodes) AS episodes, (SELECT count(*) FROM events) AS events,
               (SELECT count(*) FROM trajectories) AS trajectories, (SELECT count(*) FROM feedback) AS feedback,
               (SELECT count(*) FROM turns WHERE thumb = 1) AS rated, (SELECT sum(version) FROM episodes) AS versions
    """)
    return row


def raw_events(store) -> tuple[int, int]:
    """(records of the log that have a row, most rows of one record), as they lie in the files: views count one."""
    (row,) = store.rows("""
        SELECT count(*) AS records, max(times) AS most
        FROM (SELECT count(*) AS times FROM raw.events GROUP BY log_partition, log_offset)
    """)
    return row["records"], row["most"]


def raw_episodes(log) -> dict[tuple[str, int], list[bytes]]:
    """Every record of each version of an episode on the log."""
    found = defaultdict(list)
    for partition in range(log.partitions(EPISODES.name)):
        for record in log.read(EPISODES.name, partition, max_records=10_000):
            episode = wire.decode(Episode, record.value)
            found[episode.id, episode.version].append(record.value)
    return found


@pytest.mark.parametrize(
    ("run", "module", "name", "times", "when"),
    [
        # outputs are in the log, the state is not
        ("services.assembler", "services.state", "StateStore.commit", 1, "before"),
        # the rows of a batch are written, and their file has no name yet
        ("services.assembler.filing", "pipelines.archive", "publish", 1, "before"),
    ],
)
def test_killed_between_write_and_commit_nothing_is_lost_or_doubled(home, make, until, run, module, name, times, when):
    config = Config(home=home.root)
    log = open_log(config)
    calls = [make.event(make.call(f"c{n}"), f"call-{n}", episode=f"ep_{n}") for n in range(120)]
    append(log, calls)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_AT, module, name, str(times), when, run],
        env=environment(home),
        cwd=Path.cwd(),
        stdin=subprocess.PIPE,
    )
    try:
        append(log, [make.event(make.thumb(1, f"c{n}", id=f"t{n}"), f"t-{n}", episode=f"ep_{n}") for n in range(60)])
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
    append(log, [make.event(make.thumb(1, f"c{n}", id=f"t{n}"), f"t-{n}", episode=f"ep_{n}") for n in range(60, 120)])
    append(log, calls[:10])  # and producers repeat themselves
    store = Store(home.root / "store")
    expected = {"episodes": 120, "events": 240, "trajectories": 120, "feedback": 120, "rated": 120, "versions": 240}
    with assembler(home):
        until(lambda: numbers(store) == expected, deadline=60)
        until(lambda: raw_events(store)[0] == 250, deadline=60)  # every record of the log, repeats included
    assert raw_events(store)[1] <= 2, "killed once, a batch is written twice at most"
    made = raw_episodes(log)
    assert len({name for name, _ in made}) == 120
    assert max(len(values) for values in made.values()) <= 2, "as above"
    assert all(len(set(values)) == 1 for values in made.values()), "what is written twice is the same"
    log.close()


def test_feedback_long_after_and_a_poison_event_while_it_runs(home, make, until):
    log = open_log(Config(home=home.root))
    store = Store(home.root / "store")
    with assembler(home):
        append(log, [make.event(make.call(), seq=0), make.event(Ended(events=1), "end")])
        until(lambda: store.rows("SELECT complete FROM episodes") == [{"complete": True}], deadline=30)
        log.append([NewRecord(EVENTS.name, "acme/ep_1", b"poison")])
        append(log, [make.event(make.thumb(-1), time=1_999_999_999.0)])
        until(lambda: store.rows("SELECT thumb FROM turns") == [{"thumb": -1}], deadline=30)
        letters = "SELECT handler, topic FROM dead_letters ORDER BY handler"
        until(lambda: [row["handler"] for row in store.rows(letters)] == ["archive", "assemble"], deadline=30)
        announced = json.loads((home.root / "run" / "assembler.json").read_text())
        with urllib.request.urlopen(announced["url"] + "/status", timeout=30) as answer:
            status = json.load(answer)
        assert status["assemble"]["dead_letters"] == 1
        assert status["compaction"]["trouble"] == ""
    log.close()


def test_the_archives_process_is_watched_and_goes_with_the_assembler(home, make, until):
    log = open_log(Config(home=home.root))
    store = Store(home.root / "store")

    def archiving(parent):
        found = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True, check=False).stdout
        return [int(pid) for pid in found.split()]

    def status():
        announced = json.loads((home.root / "run" / "assembler.json").read_text())
        with urllib.request.urlopen(announced["url"] + "/status", timeout=30) as answer:
            return json.load(answer)

    with assembler(home) as process:
        append(log, [make.event(make.call(), seq=0)])
        until(lambda: store.rows("SELECT turns FROM episodes") == [{"turns": 1}], deadline=30)
        until(lambda: status()["archive"].get("records", 0) >= 3, deadline=30)
        (child,) = archiving(process)
    until(lambda: not Path(f"/proc/{child}").exists(), deadline=30)  # it went with an orderly stop

    process = subprocess.Popen([sys.executable, "-m", "services.assembler"], env=environment(home), cwd=Path.cwd())
    (child,) = until(lambda: archiving(process), deadline=30)
    os.kill(child, signal.SIGKILL)
    assert process.wait(30) == 1  # so that it is started anew, with its archive

    process = subprocess.Popen([sys.executable, "-m", "services.assembler"], env=environment(home), cwd=Path.cwd())
    (child,) = until(lambda: archiving(process), deadline=30)
    process.kill()
    process.wait()
    until(lambda: not Path(f"/proc/{child}").exists(), deadline=30)
    log.close()
