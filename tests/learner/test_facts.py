"""The learner's facts: a fold that counts each thing once, in whatever pieces and restarts it is read."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.contract import Contract
from everloop.errors import ContractError
from everloop.home import Home
from everloop.log.base import NewRecord, Record
from everloop.log.embedded import EmbeddedLog
from everloop.log.sqlite import retention
from everloop.release import Adapter, Release, ReleaseState, Route
from everloop.run import Command, CommandKind, RewardVersion, Run, RunState
from everloop.score import Score
from everloop.topics import ADAPTERS, COMMANDS, PAUSES, RELEASES, REWARDS, ROUTES, RUNS, SCORES
from everloop.wire import BlobStore

from services.learner.facts import RECENT, Facts, FactsHandler
from services.state import StateStore
from services.stream import run_handler

BY = {"tenant": "bank", "policy": "desk"}


class Fold:
    """A handler and its state, fed one contract after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.offset = 0
        self.open()

    def open(self) -> None:
        self.state = StateStore(self.folder / "learn.db")
        self.handler = FactsHandler(BlobStore(self.folder / "blobs"))

    def reopen(self) -> None:
        self.state.commit({})
        self.state.close()
        self.open()

    def read(self, *said: tuple[Any, Contract]) -> Facts:
        for topic, contract in said:
            record = Record(topic.name, 0, self.offset, contract.key, wire.encode(contract), {}, 0.0)  # type: ignore[attr-defined]
            assert self.handler.handle(self.state, record, 0.0) == []
            self.offset += 1
        self.handler.flush(self.state, 0.0)
        self.state.commit({})
        return self.handler.known("bank/desk")


@pytest.fixture
def fold(tmp_path: Path) -> Fold:
    return Fold(tmp_path)


def score(episode: str, reward: float = 0.5, **changes: Any) -> tuple[Any, Score]:
    fields = {"version": 1, "call": "c", "reward_version": "r", "value": 0.5, "spread": 0.0, "time": 1.0}
    return SCORES, Score(**BY, episode=episode, reward=reward, **{**fields, **changes})


def run(name: str, state: RunState, step: int = 0, **changes: Any) -> tuple[Any, Run]:
    return RUNS, Run(id=name, **BY, state=state, step=step, batch="b", parent="base", time=5.0, **changes)


def test_an_episode_counts_once_and_so_does_a_label(fold: Fold):
    fold.read(score("a"), score("b", -0.5), score("a", 0.9, version=2, label=1.0))
    facts = fold.read(score("a", 0.9, version=3, label=1.0), score("b", 0.1, version=2, label=0.0))
    assert facts.scored == 2
    assert facts.rewards == [0.5, -0.5]
    assert facts.labels == [1.0, 0.0]


def test_a_restart_changes_nothing(fold: Fold):
    fold.read(score("a"))
    fold.reopen()
    assert fold.read(score("a", version=2), score("b")).scored == 2


def test_a_run_that_starts_sets_the_count_back_and_keeps_what_was_before(fold: Fold):
    fold.read(*(score(f"e{i}", 0.4, label=float(i % 2)) for i in range(40)))
    facts = fold.read(run("r1", RunState.RUNNING))
    assert (facts.scored, facts.rewards, facts.reward_before, facts.labels_before) == (0, [], pytest.approx(0.4), 0.5)
    facts = fold.read(score("new"), run("r1", RunState.PUBLISHED, 1))
    assert facts.scored == 1
    assert facts.run is not None
    assert facts.run["state"] == "published"


def test_only_the_newest_calls_are_kept(fold: Fold):
    facts = fold.read(*(score(f"e{i}", i / 1000) for i in range(RECENT + 5)))
    assert len(facts.rewards) == RECENT
    assert facts.rewards[0] == pytest.approx(0.005)


def test_an_order_stands_until_its_run_comes(fold: Fold):
    order = Command(id="cmd1", kind=CommandKind.RETRAIN, **BY, arguments={"seed": 7, "publish": False}, time=2.0)
    assert fold.read((COMMANDS, order)).orders == [{"id": "cmd1", "time": 2.0, "by": "", "seed": 7, "publish": False}]
    assert fold.read(run("r1", RunState.RUNNING, command="cmd1")).orders == []


def test_pause_and_resume(fold: Fold):
    pause, resume = (Command(id=k.value, kind=k, **BY, time=1.0) for k in (CommandKind.PAUSE, CommandKind.RESUME))
    assert fold.read((PAUSES, pause)).paused
    assert not fold.read((PAUSES, resume)).paused


def test_a_pause_outlives_the_log_s_retention_and_the_learner_s_state(home: Home):
    log = EmbeddedLog(home.folder() / "log.db")
    pause, other = (
        Command(id="c", kind=kind, tenant="bank", policy=policy, time=1.0)
        for kind, policy in ((CommandKind.PAUSE, "desk"), (CommandKind.RESUME, "other"))
    )
    log.append([NewRecord(PAUSES.name, one.key, wire.encode(one)) for one in (pause, *[other] * 600)])
    with sqlite3.connect(home.root / "log.db") as connection:
        while retention.clean(connection, time.time() + 60):
            pass
    connection.close()
    assert len(log.read(PAUSES.name, 0, max_records=1000)) < 300
    handler = FactsHandler(home.blobs)
    run_handler(handler, log, home.folder("state"), until_idle=True)
    log.close()
    assert handler.known("bank/desk").paused
    assert not handler.known("bank/other").paused


def test_what_is_live_and_what_was(fold: Fold):
    def route(epoch: int, live: str) -> tuple[Any, Route]:
        return ROUTES, Route(**BY, epoch=epoch, live=live, uris={live: f"models:/bank.desk/{epoch}"}, time=1.0)

    facts = fold.read(route(1, "a1"), route(2, "a2"), route(3, "a1"))
    assert facts.live == "a1"
    assert facts.lives == ["a1", "a2", "base"]
    assert facts.uris == {"a1": "models:/bank.desk/3"}


def test_an_adapter_is_on_trial_until_its_release_ends(fold: Fold):
    adapter = Adapter(
        hash="a1", **BY, base="tiny", run="r1", batch="b", uri="models:/bank.desk/1", rank=2, targets=(), time=3.0
    )
    facts = fold.read((ADAPTERS, adapter))
    assert facts.deciding == {"adapter": "a1", "state": "announced", "time": 3.0}
    assert facts.runs == {"a1": "r1"}
    release = Release(id="rel1", **BY, adapter="a1", uri="u", state=ReleaseState.CANARY, time=4.0)
    facts = fold.read((RELEASES, release))
    assert facts.deciding is not None
    assert facts.deciding["state"] == "canary"
    assert fold.read((RELEASES, release.to(ReleaseState.LIVE, "not inferior", 5.0))).deciding is None


def test_the_newest_reward_version(fold: Fold):
    version = RewardVersion(version="v2", **BY, path="rewards/bank/desk/v2", updates=3, time=1.0)
    assert fold.read((REWARDS, version)).reward_path == "rewards/bank/desk/v2"


def test_policies_do_not_mix(fold: Fold):
    other = Score(tenant="bank", policy="other", **score("a")[1].model_dump(exclude={"tenant", "policy"}))
    fold.read(score("a"), (SCORES, other), score("b"))
    assert fold.handler.known("bank/desk").scored == 2
    assert fold.handler.known("bank/other").scored == 1
    assert fold.handler.known("bank/nobody") == Facts()


def test_bytes_that_are_no_contract_are_refused(fold: Fold):
    with pytest.raises(ContractError):
        fold.handler.handle(fold.state, Record(RUNS.name, 0, 0, "bank/desk", b"junk", {}, 0.0), 0.0)


def examined(name: str, gain: float, time: float) -> tuple[Any, Release]:
    """The release of a run's candidate after the gate."""
    evidence = {
        "run": f"run-{name}",
        "metrics": {"proxy_before": 0.1, "proxy_after": 0.3},
        "gate": {"gold": {"gain": gain, "items": 100}},
    }
    return RELEASES, Release(
        id=name, **BY, adapter=name, uri="u", state=ReleaseState.REJECTED, evidence=evidence, time=time
    )


def test_each_run_s_candidate_is_one_window(fold: Fold):
    facts = fold.read(examined("a", 0.02, 3.0), examined("a", 0.02, 4.0), examined("b", -0.01, 5.0))
    assert facts.windows == [
        ["run-a", pytest.approx(0.2), 0.02, 100, 3.0],
        ["run-b", pytest.approx(0.2), -0.01, 100, 5.0],
    ]
    assert (facts.live, facts.lives) == ("base", ["base"]), "what was refused is nothing that a run begins from"
    without = RELEASES, Release(id="c", **BY, adapter="c", uri="u", evidence={"run": "c"}, time=6.0)
    assert fold.read(without).windows == facts.windows


def test_a_pause_keeps_its_reason_until_somebody_resumes(fold: Fold):
    pause = Command(id="p", kind=CommandKind.PAUSE, **BY, arguments={"reason": "over-optimisation"}, time=6.0)
    facts = fold.read((PAUSES, pause))
    assert (facts.paused_why, facts.resumed) == ("over-optimisation", 0.0)
    facts = fold.read((PAUSES, Command(id="r", kind=CommandKind.RESUME, **BY, time=7.0)))
    assert (facts.paused, facts.paused_why, facts.resumed) == (False, "", 7.0)
