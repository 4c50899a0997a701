"""Workers on the real broker: sharing, poison, what comes back, what is shown, and episodes from any order."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.config import Config
from everloop.episode import Episode, Turn
from everloop.errors import LogError
from everloop.event import Call, Ended, Event, FeedbackGiven, Message
from everloop.feedback import Feedback
from everloop.home import Home
from everloop.log import NewRecord, partition_of
from everloop.log.kafka.log import KafkaLog
from everloop.run import DeadLetter
from everloop.topics import CHANGELOG, EPISODES, EVENTS, HANDLERS, SCORES
from prometheus_client import REGISTRY

from pipelines.assemble import Assembler
from services import faust_worker
from services.faust_worker import FaustWorker, Line
from services.partition import check_changelog

pytestmark = pytest.mark.kafka
Until = Callable[..., Any]
KEYS = 9


def feed(log: KafkaLog, times: int = 5, value: bytes = b"v") -> None:
    log.append([NewRecord("events", f"k{k}", value, {"id": f"{k}/{i}"}) for i in range(times) for k in range(KEYS)])


def metric(name: str) -> float | None:
    return REGISTRY.get_sample_value(f"everloop_handler_{name}", {"handler": "counting"})


def test_two_workers_share_the_partitions_and_one_goes_on_alone(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until, done: Any, said: Any
) -> None:
    feed(log)
    first = work(tmp_path / "1")
    until(lambda: len(first.worker.handlers()) == 4, deadline=30)
    second = work(tmp_path / "2")
    both = lambda: (set(first.worker.handlers()), set(second.worker.handlers()))  # noqa: E731
    until(lambda: [len(its) for its in both()] == [2, 2] and not both()[0] & both()[1], deadline=40)
    feed(log)
    until(lambda: done() == 2 * KEYS * 5, deadline=30)
    second.stop()
    until(lambda: len(first.worker.handlers()) == 4, deadline=40)
    feed(log)
    until(lambda: done() == 3 * KEYS * 5, deadline=30)
    assert said() == {f"k{k}": list(range(1, 16)) for k in range(KEYS)}
    assert first.failure is second.failure is None


def test_poison_becomes_a_dead_letter_and_the_partition_goes_on(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until, done: Any, said: Any
) -> None:
    feed(log, 2)
    (at,) = log.append([NewRecord("events", "k1", b"poison", {"id": "bad"})])
    feed(log, 2)
    worker = work(tmp_path)
    until(lambda: done() == KEYS * 4 + 1, deadline=30)
    (found,) = log.read("dead-letters", 0)
    letter = wire.decode(DeadLetter, found.value or b"", Home(tmp_path).blobs)
    assert (letter.topic, letter.partition, letter.offset) == at
    assert (letter.value, letter.record_key, letter.headers) == (b"poison", "k1", {"id": "bad"})
    assert letter.cause == "ContractError: poison cannot be counted"
    assert "in handle" in letter.stack
    assert said()["k1"] == [1, 2, 3, 4]
    assert worker.worker.status()["dead_letters"] == 1


def test_a_state_that_is_gone_everywhere_is_built_again_from_the_beginning(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until, done: Any, said: Any
) -> None:
    feed(log)
    first = work(tmp_path)
    until(lambda: done() == KEYS * 5, deadline=30)
    first.stop()
    name = log.clients.address.qualified(CHANGELOG + "counting")
    log.cluster.ask("deleting", lambda admin: admin.delete_topics([name]))
    log.cluster._known.clear()
    log.partitions(CHANGELOG + "counting")
    work(tmp_path)
    until(lambda: all(len(its) == 10 for its in said().values()), deadline=30)
    assert said() == {f"k{k}": [1, 2, 3, 4, 5] * 2 for k in range(KEYS)}, "the offsets of the group do not count"


def test_what_is_not_delivered_is_read_from_the_log(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until, done: Any, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Line.put
    monkeypatch.setattr(Line, "put", lambda line, its: put(line, [it for it in its if it.offset % 5 == 1]))
    feed(log)
    work(tmp_path)
    until(lambda: done() == KEYS * 5, deadline=30)
    assert said() == {f"k{k}": [1, 2, 3, 4, 5] for k in range(KEYS)}


def test_a_partition_that_is_slow_fills_no_memory(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until, done: Any, counting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faust_worker, "FULL_BYTES", 1_000_000)
    go = threading.Event()

    class Slow(counting):
        def flush(self, state: Any, now: float) -> list[NewRecord]:
            go.wait(60)
            return []

    log.append([NewRecord("events", "k", b"x" * 20_000, {"id": str(i)}) for i in range(1000)])
    seen: list[int] = []
    put = Line.put
    monkeypatch.setattr(Line, "put", lambda line, its: (put(line, its), seen.append(line.bytes)))
    worker = work(tmp_path, Slow, max_records=10)
    until(lambda: worker.worker.lag() == 1000 and max(seen, default=0) >= 1_000_000, deadline=30)
    go.set()
    until(lambda: done() == 1000, deadline=40)
    assert max(seen) < 6_000_000, "of 20,000,000 that are there"


def test_a_state_is_read_back_only_where_the_cache_is_not_that_of_the_changelog(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until, done: Any
) -> None:
    for folder, restored in (("a", 0), ("a", 0), ("b", 2 * KEYS), ("a", KEYS), ("a", 0)):
        before = metric("restored_entries_total") or 0
        feed(log, 1)
        wanted = sum(log.end_offsets("events"))
        worker = work(tmp_path / folder)
        until(lambda wanted=wanted: done() == wanted, deadline=30)
        worker.stop()
        read = (metric("restored_entries_total") or 0) - before
        assert read == restored, "none, all, or what another worker has done since"


def test_what_does_not_pass_ends_the_worker_with_nothing_committed(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until, done: Any, counting: Any
) -> None:
    class Failing(counting):
        def flush(self, state: Any, now: float) -> list[NewRecord]:
            raise OSError("the disk is gone")

    feed(log)
    worker = work(tmp_path, Failing)
    until(lambda: worker.ended, deadline=30)
    assert isinstance(worker.failure, OSError)
    assert done() == 0
    assert log.end_offsets("episodes") == [0] * 4


def test_what_an_operator_watches_is_in_the_metrics(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until, done: Any
) -> None:
    feed(log)
    before = metric("rebalances_total") or 0
    worker = work(tmp_path, stuck_after=20.0)
    until(lambda: done() == KEYS * 5 and metric("lag_records") == 0, deadline=30)
    assert (metric("rebalances_total") or 0) > before
    assert metric("oldest_waiting_seconds") == 0
    until(lambda: (metric("progress_age_seconds") or 9) < 1.5)
    assert worker.worker.trouble() is None
    assert sum(worker.worker.status()["offsets"].values()) == KEYS * 5


def test_what_is_not_committed_or_was_given_up_is_not_handled(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until
) -> None:
    log.partitions("events")
    given_up, open_still = log.fenced("given up"), log.fenced("open")
    for writer in (given_up, open_still):
        writer._producer.begin_transaction()
        for sent in writer._send([NewRecord("events", f"k{k}", b"never", {"id": f"{k}"}) for k in range(KEYS)]):
            sent.wait(time.monotonic() + 30)
    log.fenced("given up").close()
    worker = work(tmp_path)
    until(lambda: len(worker.worker.handlers()) == 4, deadline=30)
    time.sleep(3.0)  # in which all of it would be fetched and handled
    assert worker.worker.handled == 0
    log.fenced("open").close()
    feed(log, 1)
    until(lambda: worker.worker.handled == KEYS, deadline=30)
    time.sleep(0.5)
    assert worker.worker.handled == KEYS, "what was committed, and no more"


def test_a_partition_that_hangs_is_seen_though_the_others_go_on(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until, counting: Any
) -> None:
    go = threading.Event()

    class Hanging(counting):
        def handle(self, state: Any, record: Any, now: float) -> list[NewRecord]:
            if record.value == b"hang":
                go.wait(60)
            return list(super().handle(state, record, now))

    log.append([NewRecord("events", "k0", b"hang", {"id": "x"}, time.time() - 100.0)])
    worker = work(tmp_path, Hanging, stuck_after=3.0).worker
    hung = partition_of("k0", 4)
    other = next(f"k{k}" for k in range(9) if partition_of(f"k{k}", 4) != hung)

    def trouble() -> str | None:
        log.append([NewRecord("events", other, b"", {"id": "y"})])
        return str(worker.trouble() or "")

    try:
        said = until(trouble, deadline=30, every=0.3)
        assert "counting has not moved" in said
        assert worker.handled > 3, "the others did"
        assert 100 < (metric("oldest_waiting_seconds") or 0) < 200, "of the one that hangs, though it was taken"
    finally:
        go.set()
    until(lambda: worker.trouble() is None and worker.lag() == 0)


def test_a_worker_whose_partitions_were_taken_and_never_given_back_is_seen(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until, done: Any, expel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assigned = FaustWorker._assigned

    async def once(worker: FaustWorker, *arguments: Any, **more: Any) -> None:
        if not worker._rebalances:
            await assigned(worker, *arguments, **more)

    monkeypatch.setattr(FaustWorker, "_assigned", once)
    feed(log, 1)
    worker = work(tmp_path, stuck_after=4.0).worker
    until(lambda: done() == KEYS and metric("lag_records") == 0, deadline=30)
    assert worker.trouble() is None
    expel()
    assert "has not moved" in until(worker.trouble, deadline=40)


def test_a_partition_whose_state_never_comes_is_seen(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, take_over = threading.Event(), FaustWorker._take_over

    def hanging(worker: FaustWorker, number: int) -> Any:
        if number == 2:
            go.wait(60)
        return take_over(worker, number)

    monkeypatch.setattr(FaustWorker, "_take_over", hanging)
    worker = work(tmp_path, stuck_after=4.0).worker
    try:
        until(lambda: len(worker.handlers()) == 3, deadline=30)
        assert "has not moved" in until(worker.trouble, deadline=20)
    finally:
        go.set()
    until(lambda: worker.trouble() is None)


def test_a_handler_needs_a_changelog_with_a_place_for_each_partition(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until
) -> None:
    from kafka.admin import NewPartitions

    assert check_changelog(log, "counting", "events") == 4
    name = log.clients.address.qualified("events")
    log.cluster.ask("adding", lambda admin: admin.create_partitions({name: NewPartitions(6)}))

    def known() -> int:
        log.cluster._known.clear()
        return log.partitions("events")

    until(lambda: known() == 6)
    with pytest.raises(LogError, match="has 6 partitions, and 'everloop-state-counting' 4"):
        work(tmp_path)


def event(episode: str, name: str, payload: Any, seq: int | None = None) -> Event:
    return Event(
        id=f"{episode}-{name}", tenant="acme", policy="desk", episode=episode, time=1000.0, seq=seq, payload=payload
    )


def words(episode: str) -> list[Event]:
    """A call, its end, a thumb that is revised, and a correction."""
    call = Call(
        id="c1",
        messages=(Message(role="user", content="where is my card?"),),
        output=Message(role="assistant", content="in the post"),
    )

    def said(name: str, time: float, **what: Any) -> Event:
        return event(episode, name, FeedbackGiven(feedback=Feedback(id=name, time=time, call="c1", rater="r", **what)))

    return [
        event(episode, "call", call, 0),
        event(episode, "end", Ended(events=1)),
        said("up", 1001.0, kind="thumb", value=1),
        said("down", 1002.0, kind="thumb", value=-1),
    ]


def test_feedback_in_every_order_early_late_and_twice_makes_the_same_episode(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until
) -> None:
    orders = list(itertools.permutations(range(4)))
    batches = [[words(f"ep_{number}")[i] for i in order] for number, order in enumerate(orders)]
    config = Config(home=tmp_path)
    worker = work(tmp_path, lambda: Assembler(config, Home(tmp_path)), linger=0.0, max_records=3)
    for turn in range(5):  # the last time round each says something again
        again = [batch[turn % 4] for batch in batches]
        log.append([NewRecord(EVENTS.name, e.key, wire.encode(e), {}, e.time) for e in again])
    until(lambda: worker.worker.handled == 5 * len(orders), deadline=40)
    newest: dict[str, Episode] = {}
    for partition in range(log.partitions(EPISODES.name)):
        for record in log.read(EPISODES.name, partition, max_records=10_000):
            episode = wire.decode(Episode, record.value or b"")
            assert partition == partition_of("acme/desk", log.partitions(EPISODES.name)), "by its policy"
            newest[episode.id] = max(newest.get(episode.id, episode), episode, key=lambda one: one.version)
    assert len(newest) == len(orders)
    said = {wire.encode(one.model_copy(update={"id": "ep"})) for one in newest.values()}
    assert len(said) == 1


def test_clocks_an_hour_off_order_nothing(log: KafkaLog, tmp_path: Path, work: Any, until: Until) -> None:
    """Producers' and the worker's: order comes from numbers where there are any, else from offsets."""
    now, hour, config = time.time(), 3600.0, Config(home=tmp_path)
    off = (hour, -hour, 0.0, 3 * 86_400.0, -2 * hour)

    def call(episode: str, number: int, seq: int | None) -> Event:
        said = Message(role="assistant", content=str(number))
        made = Call(id=f"c{number}", messages=(Message(role="user", content="?"),), output=said)
        return event(episode, f"call{number}", made, seq).model_copy(update={"time": now + off[number]})

    unnumbered = [call("ep_log", number, None) for number in range(5)]
    numbered = [call("ep_seq", number, number) for number in (3, 0, 4, 2, 1)]
    log.append([NewRecord(EVENTS.name, e.key, wire.encode(e), {}, e.time) for e in (*unnumbered, *numbered)])
    worker = work(tmp_path / "work", lambda: Assembler(config, Home(tmp_path)), clock=lambda: time.time() - hour)
    until(lambda: worker.worker.handled == 10, deadline=30)

    def whole() -> list[Episode]:
        read = [record for p in range(4) for record in log.read(EPISODES.name, p)]
        return [one for one in (wire.decode(Episode, record.value or b"") for record in read) if one.version == 5]

    found = until(lambda: len(whole()) == 2 and whole(), deadline=30)
    assert [[turn.call.id for turn in one.turns] for one in found] == [[f"c{n}" for n in range(5)]] * 2
    assert {(one.started, one.updated) for one in found} == {(now - 2 * hour, now + 3 * 86_400.0)}, "as they were said"
    print("acknowledged 10, in episodes 10")


@pytest.mark.processes
def test_one_more_worker_is_started_by_a_command(url: str, log: KafkaLog, tmp_path: Path, until: Until) -> None:
    event = words("ep_1")[0]
    log.append([NewRecord(EVENTS.name, event.key, wire.encode(event), {}, event.time)])
    command = [sys.executable, "-m", "everloop.cli.main", "worker", "assemble", "--home", str(tmp_path), "--log", url]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "is nobody's home yet" in refused.stderr
    Home(tmp_path).secret()
    check_worker(command, tmp_path, "assemble", lambda: until(lambda: sum(log.end_offsets(EPISODES.name)), deadline=60))


@pytest.mark.processes
@pytest.mark.models
def test_one_more_scorer_is_started_by_a_command(url: str, log: KafkaLog, tmp_path: Path, until: Until) -> None:
    payload = words("ep_1")[0].payload
    assert isinstance(payload, Call)
    episode = Episode(
        tenant="acme", policy="desk", id="ep_1", version=1, started=1.0, updated=1.0, turns=(Turn(call=payload),)
    )
    log.append([NewRecord(EPISODES.name, episode.key, wire.encode(episode), {}, 1.0, episode.route)])
    Home(tmp_path).secret()
    command = [sys.executable, "-m", "everloop.cli.main", "worker", "score", "--home", str(tmp_path), "--log", url]
    check_worker(command, tmp_path, "score", lambda: until(lambda: sum(log.end_offsets(SCORES.name)), deadline=90))


def check_worker(command: list[str], home: Path, handler: str, does_its_work: Callable[[], object]) -> None:
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        does_its_work()
        (announced,) = (home / "run").glob(f"{HANDLERS[handler]}-*.json")
        address = json.loads(announced.read_text())["url"]
        with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
            assert f'everloop_handler_rebalances_total{{handler="{handler}"}} 1.0' in answer.read().decode()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
