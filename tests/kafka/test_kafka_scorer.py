"""The reward model on Kafka: each policy in one partition, what was learned outlives the disk it lay on, and a
person's order through the log is obeyed."""

from __future__ import annotations

import argparse
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
from everloop.run import RewardVersion
from everloop.score import Score

from reward.handler import RewardHandler
from services.commands import reward_orders
from services.dead_letters import REPLAY_OF, dead_letter, replay
from services.installation import Installation
from services.rewards import versions
from services.scorer.__main__ import AT_ONCE, answers, rewards
from services.scorer.ordered import Ordered

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


def obeyed(here: Installation, running: Any, until: Until, verb: str, **more: str) -> RewardVersion:
    """Give an order by its command; the version that was announced by it once it is obeyed and answered."""
    said = argparse.Namespace(verb=verb, reason="it likes lists", no_wait=True, **more)
    assert reward_orders.run(said, here, "acme", "cards") == 0
    order = reward_orders.orders_of(here, "acme", "cards")[-1].id
    assert until(lambda: answers(running.worker.handlers().values()).get(order), deadline=40)["done"]

    def announced() -> RewardVersion | None:
        known = versions(here, "acme", "cards")
        return next((one for one in known if one.evidence.get("order") == order and one.state == "released"), None)

    found: RewardVersion = until(announced, deadline=40)
    return found


def test_what_was_learned_outlives_the_disk_and_an_order_is_obeyed(
    log: KafkaLog, url: str, tmp_path: Path, work: Any, until: Until
) -> None:
    def config(name: str) -> Config:
        return Config.model_validate({"home": tmp_path / name, "log": {"url": url}, **CONFIG})

    def start(name: str) -> Any:
        home = Home(tmp_path / name)
        ordered = Ordered(log, home.blobs)
        return work(home.root, lambda: RewardHandler(config(name), home, lambda _: Words(), ordered))

    def done() -> int:
        """Episodes of which everything is committed."""
        return len({record.key for p in range(4) for record in log.read("scores", p, max_records=10_000)})

    def scores() -> list[Score]:
        records = (record for p in range(4) for record in log.read("scores", p, max_records=10_000))
        return [wire.decode(Score, record.value or b"") for record in records]

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
    assert sorted(one.call for one in scores()) == sorted(
        f"{policy}-{number}" for policy in POLICIES for number in range(EACH)
    )
    for number, handler in second.worker.handlers().items():
        busy = {policy for policy, its in handler.status().items() if its["updates"]}
        assert busy == {
            f"acme/{p}" for p in POLICIES if partition_of(f"acme/{p}", log.partitions("episodes")) == number
        }

    def status() -> Any:
        return rewards(log, second.worker.handlers())

    before = status()["acme/cards"]["version"]
    with Installation(config("second")) as here:
        kept = {folder.name for folder in (tmp_path / "second/rewards/acme/cards").iterdir()}
        other = next(one.version for one in versions(here, "acme", "cards") if one.version in kept - {before})
        assert obeyed(here, second, until, "promote", version=other).version == other
        assert status()["acme/cards"]["version"] == other
        back = obeyed(here, second, until, "rollback", to=before)
    assert (back.version, status()["acme/cards"]["version"]) == (before, before)
    assert "it likes lists" in back.reason
    assert status()["acme/cards"]["pinned"].endswith("it likes lists")
    assert status()["acme/loans"]["pinned"] is None, "the orders are one policy's"
    log.append([episode("cards", EACH)])
    until(lambda: done() == 2 * EACH + 1, deadline=40)
    (last,) = (one for one in scores() if one.call == f"cards-{EACH}")
    assert last.reward_version == before
