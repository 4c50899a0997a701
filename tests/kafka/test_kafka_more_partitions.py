"""Partitions are added by the written procedure: episodes and models go on where their keys went, in one piece."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from everloop import wire
from everloop.cli.main import main
from everloop.config import Config
from everloop.episode import Episode
from everloop.errors import EverloopError, LogError
from everloop.event import Call, Ended, Event, FeedbackGiven, Message
from everloop.feedback import Feedback
from everloop.home import Home
from everloop.log import NewRecord, connect, partition_of
from everloop.log.kafka.log import KafkaLog
from everloop.topics import CHANGELOG

from pipelines.assemble import Assembler
from reward.handler import RewardHandler
from services import moving
from services.changelog import Changelog
from services.moving import NotMoved, grow
from services.scorer.__main__ import rewards

pytestmark = pytest.mark.kafka
Until = Callable[..., Any]
EPISODES = 12
POLICIES = ("cards", "loans", "fees")
BEFORE, AFTER = 2, 5


@pytest.fixture
def log(url: str) -> Any:
    """The installation as it was, with few partitions."""
    log = connect(url, partitions=BEFORE)
    yield log
    log.close()


class Words:
    """An encoder without weights: each text has a direction of its own."""

    name, size, version = "words", 16, "words-1"

    def encode(self, texts: Sequence[str]) -> Any:
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
        rows = np.array([np.random.default_rng(seed).normal(size=16) for seed in seeds], np.float32).reshape(-1, 16)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def event(number: int, name: str, payload: Any) -> NewRecord:
    policy = POLICIES[number % len(POLICIES)]
    made = Event(
        id=f"{number}-{name}", tenant="acme", policy=policy, episode=f"ep_{number}", time=1000.0, payload=payload
    )
    return NewRecord("events", made.key, wire.encode(made), {"id": made.id}, made.time)


def call(number: int, name: str) -> NewRecord:
    asked = Message(role="user", content=f"question {number}")
    answered = Message(role="assistant", content=f"answer {name}")
    return event(number, name, Call(id=f"{number}-{name}", messages=(asked,), output=answered))


def thumb(number: int, name: str) -> NewRecord:
    said = Feedback(id=f"f-{number}-{name}", kind="thumb", value=1, time=1.0, call=f"{number}-{name}", rater="r")
    return event(number, f"thumb-{name}", FeedbackGiven(feedback=said))


def read(log: KafkaLog, topic: str) -> list[Any]:
    return [record for p in range(log.partitions(topic)) for record in log.read(topic, p, max_records=10_000)]


def newest(log: KafkaLog) -> dict[str, Episode]:
    found: dict[str, Episode] = {}
    for record in read(log, "episodes"):
        episode = wire.decode(Episode, record.value)
        found[episode.id] = max(found.get(episode.id, episode), episode, key=lambda one: one.version)
    return found


def test_what_began_before_and_ends_after_is_one(
    log: KafkaLog, url: str, tmp_path: Path, work: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate({"home": tmp_path, "tenants": {"acme": {"policies": {p: {} for p in POLICIES}}}})
    home = Home(tmp_path)
    makes = (lambda: Assembler(config, home), lambda: RewardHandler(config, home, lambda _: Words()))

    def start(log: KafkaLog) -> list[Any]:
        return [work(tmp_path / "work", make, on=log) for make in makes]

    def settled(log: KafkaLog, workers: list[Any], versions: int, learned: int) -> bool:
        known = rewards(log, workers[1].worker.handlers())
        updates = sum(its["updates"] for its in known.values())
        whole = newest(log)
        return len(whole) == EPISODES and {e.version for e in whole.values()} == {versions} and updates == learned

    log.append([call(n, "first") for n in range(EPISODES)] + [thumb(n, "first") for n in range(EPISODES)])
    workers = start(log)
    until(lambda: settled(log, workers, 2, EPISODES), deadline=40)
    more = connect(url, partitions=AFTER)
    with pytest.raises(EverloopError, match="the group 'assemble' has 1 member"):
        grow(more)
    for each in workers:
        each.stop()
    until(lambda: not log.cluster.members("assemble") and not log.cluster.members("score"), deadline=30)

    monkeypatch.setenv("EVERLOOP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EVERLOOP_LOG__URL", url)
    monkeypatch.setenv("EVERLOOP_LOG__PARTITIONS", str(AFTER))
    assert main(["topics", "apply"]) == 1, "not without being asked"
    assert main(["topics", "apply", "--add-partitions"]) == 0
    assert main(["topics", "check"]) == 0

    log = more
    log.cluster._known.clear()
    assert [log.partitions(topic) for topic in ("events", "episodes", CHANGELOG + "assemble")] == [AFTER] * 3
    moved = [n for n in range(EPISODES) if partition_of(f"acme/ep_{n}", BEFORE) != partition_of(f"acme/ep_{n}", AFTER)]
    assert len(moved) > 3
    log.append([call(n, "second") for n in range(EPISODES)] + [thumb(n, "second") for n in range(EPISODES)])
    log.append([event(n, "end", Ended()) for n in range(EPISODES)])
    workers = start(log)
    until(lambda: settled(log, workers, 5, 2 * EPISODES), deadline=40)
    for number, episode in ((int(e.id.removeprefix("ep_")), e) for e in newest(log).values()):
        assert [turn.call.id for turn in episode.turns] == [f"{number}-first", f"{number}-second"], "in their order"
        assert [len(turn.feedback) for turn in episode.turns] == [1, 1]
        assert episode.complete
    ids = [record.headers["id"] for record in read(log, "events")]
    print(f"acknowledged {5 * EPISODES}, in the log {len(ids)}, unique {len(set(ids))}, in episodes {5 * EPISODES}")
    for each in workers:
        each.stop()
    log.close()


def test_it_is_refused_while_something_waits_or_comes(
    log: KafkaLog, url: str, tmp_path: Path, work: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, home = Config(home=tmp_path), Home(tmp_path)
    more = connect(url, partitions=AFTER)
    log.append([call(n, "first") for n in range(4)])
    for name in ("assemble", "score"):
        log.partitions(CHANGELOG + name)
    log.partitions("episodes")
    with pytest.raises(NotMoved, match="'assemble' has 4 records of 'events' to go"):
        grow(more)
    worker = work(tmp_path / "work", lambda: Assembler(config, home))
    until(lambda: worker.worker.handled == 4 and not worker.worker.lag(), deadline=30)
    worker.stop()
    until(lambda: not log.cluster.members("assemble"), deadline=30)
    with pytest.raises(NotMoved, match=r"'score' has \d records of 'episodes' to go"):
        grow(more)
    assert more.partitions("events") == BEFORE
    monkeypatch.setitem(moving.SHARED, "score", ("runs", "", ""))  # of which nothing waits
    monkeypatch.setattr(moving, "time", SimpleNamespace(sleep=lambda _: log.append([call(9, "first")])))
    with pytest.raises(NotMoved, match="records come to 'events': take the gateways down"):
        grow(more)
    more.close()


def test_what_lies_where_it_does_not_belong_takes_no_other_s_place(log: KafkaLog, url: str) -> None:
    """Such as the model that a policy's episode got in the partition of another."""
    log.partitions("episodes")
    more = connect(url, partitions=AFTER)
    more.partitions(CHANGELOG + "score")
    keys = [f"model/acme/{policy}/weights" for policy in "abcdefgh"]
    was, becomes = ({k: partition_of(RewardHandler.route_of(k) or "", n) for k in keys} for n in (BEFORE, AFTER))
    alone = next(key for key in keys if becomes[key] >= BEFORE)
    with closing(more.fenced("writing")) as writer:
        for number in range(BEFORE):
            its = Changelog(more, "score", ("episodes", number))
            true = {key: b"true" for key in keys if was[key] == number and key != alone}
            odd = {key: b"odd" for key in keys if was[key] != number}
            writer.write([], placed=its.written({**odd, **true}, 0).placed)
    moving.move(more, "score", "episodes", AFTER, RewardHandler)
    for number in range(AFTER):
        found = dict(Changelog(more, "score", ("episodes", number)).changes())
        for key in keys:
            if becomes[key] == number:
                assert found[key] == (b"odd" if key == alone else b"true"), (key, number)
    more.close()


def test_a_transaction_is_bounded_by_entries_and_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "AT_ONCE", 3)
    monkeypatch.setattr(moving, "AT_ONCE_BYTES", 100)
    sizes = {"a": 1, "b": 2, "c": 3, "d": 60, "e": 41, "f": 500, "g": 1}
    pieces = [list(piece) for piece in moving._pieces({key: bytes(size) for key, size in sizes.items()})]
    assert pieces == [["a", "b", "c"], ["d"], ["e"], ["f"], ["g"]]


def test_cut_short_it_lets_no_worker_start_and_goes_on_where_it_stopped(
    log: KafkaLog, url: str, tmp_path: Path, work: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, home = Config(home=tmp_path), Home(tmp_path)
    more = connect(url, partitions=AFTER)
    monkeypatch.delitem(moving.SHARED, "score")
    monkeypatch.setattr(moving, "AT_ONCE", 1)
    log.append([call(n, "first") for n in range(EPISODES)])
    first = work(tmp_path / "work", lambda: Assembler(config, home))
    until(lambda: first.worker.handled == EPISODES and not first.worker.lag(), deadline=30)
    first.stop()
    until(lambda: not log.cluster.members("assemble"), deadline=30)
    pieces = moving._pieces

    def breaking(entries: Any) -> Any:
        for number, piece in enumerate(pieces(entries)):
            if number == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(moving, "_pieces", breaking)
    with pytest.raises(KeyboardInterrupt):
        grow(more)
    monkeypatch.setattr(moving, "_pieces", pieces)
    with pytest.raises(LogError, match="everloop topics apply --add-partitions"):
        work(tmp_path / "work", lambda: Assembler(config, home), on=more)
    log.append([event(0, "end", Ended())])
    (done,) = grow(more)
    assert (done.partitions, done.late) == (AFTER, 1), "no worker can take it before"
    assert grow(more) == [], "there is nothing left to do"
    more.append([call(n, "second") for n in range(EPISODES)])
    second = work(tmp_path / "work", lambda: Assembler(config, home), on=more)
    until(lambda: second.worker.handled == EPISODES + 1, deadline=40)
    until(lambda: all(len(e.turns) == 2 for e in newest(more).values()) and len(newest(more)) == EPISODES)
