"""The reward model on Kafka: each policy in one partition, and what was learned outlives the disk it lay on."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from everloop import wire
from everloop.config import Config
from everloop.episode import Episode, Turn
from everloop.errors import ContractError
from everloop.event import Call, Message
from everloop.feedback import Feedback
from everloop.home import Home
from everloop.log import NewRecord, partition_of
from everloop.log.kafka.log import KafkaLog
from everloop.score import Score

from reward.handler import RewardHandler
from services.dead_letters import REPLAY_OF, dead_letter, replay
from services.scorer.__main__ import AT_ONCE, rewards

pytestmark = pytest.mark.kafka
Until = Callable[..., Any]
POLICIES = ("cards", "loans")
EACH = 60
CONFIG = {"tenants": {"acme": {"policies": {policy: {} for policy in POLICIES}}}}


class Words:
    """An encoder without weights: each text has a direction of its own."""

    name, size, version = "words", 16, "words-1"

    def encode(self, texts: Sequence[str]) -> Any:
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
        rows = np.array([np.random.default_rng(seed).normal(size=16) for seed in seeds], np.float32).reshape(-1, 16)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def episode(policy: str, number: int, more: str = "") -> NewRecord:
    said = Feedback(id=f"f{number}", kind="thumb", value=1 if number % 3 else -1, time=1.0, rater=f"r{number}")
    call = Call(
        id=f"{policy}-{number}",
        messages=(Message(role="user", content=f"question {number % 7}{more}"),),
        output=Message(role="assistant", content=f"answer {number % 3}"),
    )
    one = Episode(
        tenant="acme",
        policy=policy,
        id=f"ep_{policy}_{number}",
        version=2,
        started=1.0,
        updated=1.0 + number,
        turns=(Turn(call=call, feedback=(said,)),),
    )
    return NewRecord("episodes", one.key, wire.encode(one), {}, one.updated, f"acme/{policy}")


@pytest.mark.parametrize("value", ["an episode", "no episode"])
def test_a_dead_letter_that_is_replayed_comes_to_the_partition_of_its_policy(
    log: KafkaLog, tmp_path: Path, value: str
) -> None:
    blobs = Home(tmp_path).blobs
    sent = [episode("cards", number) for number in range(4)]
    if value == "no episode":
        sent = [one._replace(value=b"\x00") for one in sent]
    for position in log.append(sent):
        (record,) = log.read(*position, max_records=1)
        log.append(dead_letter("score", record, ContractError("odd"), 1.0, blobs))
    assert len(replay(log, blobs, 2.0)) == 4
    lie = [(r.partition, REPLAY_OF in r.headers) for p in range(4) for r in log.read("episodes", p)]
    its = partition_of("acme/cards", 4)
    by_key = [partition_of(one.key, 4) for one in sent] if value == "no episode" else [its] * 4
    assert sorted(lie) == sorted([*[(its, False)] * 4, *((number, True) for number in by_key)])


def test_a_worker_that_joins_under_a_backlog_ends_nobody(
    log: KafkaLog, tmp_path: Path, work: Any, until: Until
) -> None:
    """With batches of 500 each would flush for 9 s, and be fenced in the middle of it."""

    class Slow(Words):
        def encode(self, texts: Sequence[str]) -> Any:
            time.sleep(0.018 * len(texts))
            return super().encode(texts)

    policies = {partition_of(f"acme/p{number}", 4): f"p{number}" for number in range(30)}
    assert len(policies) == 4

    def start(name: str) -> Any:
        home = Home(tmp_path / name)
        config = Config.model_validate(
            {"home": home.root, "tenants": {"acme": {"policies": {p: {} for p in policies.values()}}}}
        )
        make = lambda: RewardHandler(config, home, lambda _: Slow())  # noqa: E731
        return work(home.root, make, max_records=AT_ONCE)

    log.append([episode(policy, number, str(number)) for number in range(250) for policy in policies.values()])
    first = start("first")
    until(lambda: len(first.worker.handlers()) == 4, deadline=40)
    time.sleep(2.0)  # it is in the middle of its first batches
    second = start("second")
    until(lambda: second.worker.handled > 0 or first.ended, deadline=60)
    assert first.worker.lag() > 0, "there was a backlog, or this shows nothing"
    until(lambda: first.worker.handled + second.worker.handled >= 1000 or first.ended or second.ended, deadline=60)
    assert first.failure is second.failure is None
    ids = [record.headers["id"] for p in range(4) for record in log.read("scores", p, max_records=10_000)]
    assert len(ids) == len(set(ids))


def test_what_was_learned_outlives_the_disk(log: KafkaLog, tmp_path: Path, work: Any, until: Until) -> None:
    def start(name: str) -> Any:
        home = Home(tmp_path / name)
        config = Config.model_validate({"home": home.root, **CONFIG})
        return work(home.root, lambda: RewardHandler(config, home, lambda _: Words()))

    def done() -> int:
        """Episodes of which everything is committed."""
        return len({record.key for p in range(4) for record in log.read("scores", p, max_records=10_000)})

    def learned(running: Any) -> list[Any]:
        found = rewards(log, running.worker.handlers())
        return [found.get(f"acme/{policy}", {}).get("updates") for policy in POLICIES]

    first = start("first")
    log.append([episode(policy, number) for number in range(EACH // 2) for policy in POLICIES])
    until(lambda: learned(first) == [EACH // 2] * 2 and done() == EACH, deadline=40)
    first.stop()
    shutil.rmtree(tmp_path / "first")
    second = start("second")
    log.append([episode(policy, number) for number in range(EACH // 2, EACH) for policy in POLICIES])
    until(lambda: learned(second) == [EACH] * 2 and done() == 2 * EACH, deadline=40)
    scored = [
        wire.decode(Score, record.value or b"").call
        for partition in range(log.partitions("scores"))
        for record in log.read("scores", partition, max_records=10_000)
    ]
    assert sorted(scored) == sorted(f"{policy}-{number}" for policy in POLICIES for number in range(EACH))
    for number, handler in second.worker.handlers().items():
        busy = {policy for policy, its in handler.status().items() if its["updates"]}
        assert busy == {
            f"acme/{p}" for p in POLICIES if partition_of(f"acme/{p}", log.partitions("episodes")) == number
        }
