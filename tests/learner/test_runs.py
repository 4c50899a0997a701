"""The steps of a run, and a registry that is away in the middle of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.config import Config
from everloop.errors import NotEnoughData, RegistryError
from everloop.home import Home
from everloop.log import open_log
from everloop.log.base import Log
from everloop.registry import Point
from everloop.release import Adapter
from everloop.run import Run, RunState
from everloop.topics import ADAPTERS, RUNS

from services.learner.facts import Facts
from services.learner.runs import Runs
from services.learner.triggers import Due
from trainer.request import Request, Trained


class Mlflow:
    """Remembers what it was told; down for the first ``refusals`` calls."""

    def __init__(self, refusals: int = 0) -> None:
        self.refusals = refusals
        self.runs: dict[str, dict[str, Any]] = {}

    def log_run(self, tenant: str, policy: str, run: str, **said: Any) -> str:
        if self.refusals:
            self.refusals -= 1
            raise RegistryError("the registry does not answer")
        self.runs[run] = said
        return f"mlflow-{run}"

    def register(self, tenant: str, policy: str, *, registry_run: str, adapter: str, tags: Any) -> str:
        return f"models:/{tenant}.{policy}/1"


def runs(config: Config, log: Log, registry: Any) -> Runs:
    return Runs(config, log, registry, threads=1)


def records(log: Log, topic: Any, contract: Any) -> list[Any]:
    return [wire.decode(contract, record.value) for record in log.read(topic.name, 0)]


def nobody(*_: Any) -> list[Any]:
    raise AssertionError("people said all there is: no model is asked")


def trained(folder: Path) -> None:
    Trained("a" * 32, {"steps": 3.0, "kl_base": 0.25}, [Point("loss", 1, 0.5)]).save(folder)


def test_a_run_is_pinned_before_it_is_announced(installation: Config, capture: Callable[[int], None]):
    capture(24)
    log = open_log(installation)
    run = runs(installation, log, Mlflow()).begin("bank", "desk", Due("24 new scored episodes"), Facts(), 10.0, nobody)
    home = Home(installation.home)
    request = Request.load(home.root / "runs" / run.id)
    assert request.recipe["name"] == "quick"
    assert Path(request.batch).stem == run.batch
    assert request.parent is None
    assert request.recent == ("base",)
    assert records(log, RUNS, Run) == [run]
    assert runs(installation, log, Mlflow()).under_way() == [run]


def test_the_same_order_read_twice_is_the_same_run(installation: Config, capture: Callable[[int], None]):
    capture(24)
    log = open_log(installation)
    first = runs(installation, log, Mlflow()).begin("bank", "desk", Due("now", {"id": "c1"}), Facts(), 10.0, nobody)
    again = runs(installation, log, Mlflow()).begin("bank", "desk", Due("now", {"id": "c1"}), Facts(), 11.0, nobody)
    assert again.id == first.id
    order = {"id": "c2", "batch": first.batch, "seed": 9, "publish": False}
    repeated = runs(installation, log, Mlflow()).begin("bank", "desk", Due("now", order), Facts(), 12.0, nobody)
    assert (repeated.batch, repeated.seed, repeated.publish) == (first.batch, 9, False)
    assert repeated.id != first.id


def test_too_little_to_train_on_is_said_with_how_much_is_missing(installation: Config, capture: Callable[[int], None]):
    capture(5)
    with pytest.raises(NotEnoughData, match="15 fewer than the 20"):
        runs(installation, open_log(installation), Mlflow()).begin("bank", "desk", Due("now"), Facts(), 10.0, nobody)
    due = Due("now", {"id": "c", "batch": "../keys"})
    with pytest.raises(NotEnoughData, match="there is no batch"):
        runs(installation, open_log(installation), Mlflow()).begin("bank", "desk", due, Facts(), 10.0, nobody)


def test_a_registry_that_is_down_delays_the_announcement_alone(installation: Config, capture: Callable[[int], None]):
    capture(24)
    log, registry = open_log(installation), Mlflow(refusals=1)
    mine = runs(installation, log, registry)
    run = mine.begin("bank", "desk", Due("now"), Facts(), 10.0, nobody)
    trained(Home(installation.home).root / "runs" / run.id)
    with pytest.raises(RegistryError):
        mine.finish(run, 11.0)
    assert records(log, ADAPTERS, Adapter) == []
    assert mine.under_way() == [run]
    ended = mine.finish(run, 12.0)
    assert (ended.state, ended.adapter, ended.metrics["kl"]) == (RunState.PUBLISHED, "a" * 32, 0.25)
    (adapter,) = records(log, ADAPTERS, Adapter)
    assert (adapter.uri, adapter.run, adapter.batch) == ("models:/bank.desk/1", run.id, run.batch)
    assert registry.runs[run.id]["params"]["optimizer.epochs"] == "6"
    assert registry.runs[run.id]["tags"]["everloop.batch"] == run.batch
    assert mine.under_way() == []


def test_announcing_again_after_a_kill_writes_the_same(installation: Config, capture: Callable[[int], None]):
    capture(24)
    log = open_log(installation)
    mine = runs(installation, log, Mlflow())
    run = mine.begin("bank", "desk", Due("now"), Facts(), 10.0, nobody)
    trained(Home(installation.home).root / "runs" / run.id)
    mine.finish(run, 12.0)
    mine.finish(run, 12.0)
    first, second = records(log, ADAPTERS, Adapter)
    assert first == second
    assert [r.headers["id"] for r in log.read(ADAPTERS.name, 0)] == [first.hash] * 2


def test_a_failed_run_announces_nothing(installation: Config, capture: Callable[[int], None]):
    capture(24)
    log = open_log(installation)
    mine = runs(installation, log, Mlflow())
    run = mine.begin("bank", "desk", Due("now"), Facts(), 10.0, nobody)
    ended = mine.fail(run, "TrainingDiverged: loss nan", 11.0)
    assert ended.state is RunState.FAILED
    assert records(log, ADAPTERS, Adapter) == []
    kept = json.loads((Home(installation.home).root / "runs" / run.id / "run.json").read_text())
    assert kept["reason"] == "TrainingDiverged: loss nan"
