"""The steps of a run, and a registry that is away in the middle of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.config import Config
from everloop.errors import ConfigError, LogError, NotEnoughData, RegistryError
from everloop.home import Home
from everloop.log import open_log
from everloop.log.base import Log
from everloop.names import Checkpoints
from everloop.registry import Point
from everloop.release import Adapter
from everloop.run import Run, RunState
from everloop.topics import ADAPTERS, CHECKPOINTS, RUNS

from services.learner.facts import Facts
from services.learner.repeats import earlier
from services.learner.runs import Runs
from services.learner.triggers import Due
from trainer.request import VALUE_HEAD, Request, Trained, write_json

ADAPTER = "b" * 32


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

    def register(self, tenant: str, policy: str, *, registry_run: str, content: str, tags: Any) -> str:
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


def serving(installation: Config, *targets: str) -> Config:
    its = installation.serving.model_copy(update={"targets": targets})
    return installation.model_copy(update={"serving": its})


def test_nothing_is_trained_that_the_engine_cannot_serve(installation: Config, capture: Callable[[int], None]):
    capture(24)
    log = open_log(installation)
    on_attention = runs(serving(installation, "attention"), log, Mlflow())
    run = on_attention.begin("bank", "desk", Due("now"), Facts(), 10.0, nobody)
    home = Home(installation.home)
    assert Request.load(home.root / "runs" / run.id).recipe["adapter"]["targets"] == ["attention"]


def test_a_run_does_not_continue_from_what_the_engine_cannot_serve(
    installation: Config, capture: Callable[[int], None]
):
    capture(24)
    log = open_log(installation)
    live = Home(installation.home).folder("adapters", ADAPTER)
    fields = {"r": 4, "target_modules": ["o_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    (live / "adapter_config.json").write_text(json.dumps(fields))
    facts = Facts(live=ADAPTER)
    with pytest.raises(ConfigError, match=r"experts.*everloop release rollback"):
        runs(serving(installation, "attention"), log, Mlflow()).begin("bank", "desk", Due("now"), facts, 10.0, nobody)


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


def test_checkpoints_are_announced_as_they_come_and_once_the_run_is_over(
    installation: Config, capture: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
):
    capture(24)
    log = open_log(installation)
    mine = runs(installation, log, Mlflow())
    run = mine.begin("bank", "desk", Due("now"), Facts(), 10.0, nobody)
    folder = Home(installation.home).root / "runs" / run.id
    assert Request.load(folder).samples == 3
    mine.note_checkpoints(run, 11.0)
    (folder / "adapters").mkdir()
    with monkeypatch.context() as away:
        away.setattr(mine._log, "append", unanswered)
        write_json(folder / "adapters" / "sampled.json", {"kept": [[10, "a" * 32]]})
        mine.note_checkpoints(run, 12.0)
    assert records(log, CHECKPOINTS, Checkpoints) == []
    for now in (13.0, 14.0):
        mine.note_checkpoints(run, now)
    write_json(folder / "adapters" / "sampled.json", {"kept": [[10, "a" * 32], [20, "b" * 32]]})
    mine.note_checkpoints(run, 15.0)
    mine.fail(run, "TrainingDiverged: loss nan", 16.0)
    said = records(log, CHECKPOINTS, Checkpoints)
    assert [([one.step for one in its.kept], its.running, its.time) for its in said] == [
        ([10], True, 13.0),
        ([10, 20], True, 15.0),
        ([10, 20], False, 16.0),
    ]
    assert {(its.run, its.key) for its in said} == {(run.id, f"bank/desk/{run.id}")}


def unanswered(*_: Any) -> None:
    raise LogError("nobody answers")


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


def adapter_went_live(home: Home, reward_path: str) -> Facts:
    """Another adapter, made by another run, and a newer reward model: nothing is as it was."""
    (home.folder("adapters") / ADAPTER).mkdir()
    (home.folder("runs", "run_other") / VALUE_HEAD).touch()
    lives = [ADAPTER, "base"]
    return Facts(live=ADAPTER, lives=lives, runs={ADAPTER: "run_other"}, reward_version="r2", reward_path=reward_path)


def snapshot(home: Home, version: str) -> str:
    path = f"rewards/bank/desk/{version}"
    (home.folder(*path.split("/")) / "model.json").write_text("{}")
    return path


def asked(home: Home, run: Run) -> dict[str, Any]:
    """What the run was asked, without its own name and time."""
    fields = asdict(Request.load(home.root / "runs" / run.id))
    return {name: value for name, value in fields.items() if name not in ("run", "folder", "time")}


def test_a_repeat_begins_from_what_its_run_began_from_whatever_went_live_since(
    installation: Config, capture: Callable[[int], None]
):
    capture(24)
    home, log = Home(installation.home), open_log(installation)
    before = Facts(reward_path=snapshot(home, "r1"))
    first = runs(installation, log, Mlflow()).begin("bank", "desk", Due("now"), before, 10.0, nobody)
    now = adapter_went_live(home, snapshot(home, "r2"))
    recipe = Path(str(installation.policy("bank", "desk").train.recipe))
    recipe.write_text(recipe.read_text().replace("epochs = 6", "epochs = 2"))
    later = Runs(installation, log, Mlflow(), threads=7)  # type: ignore[arg-type]
    on_now = later.begin("bank", "desk", Due("now", {"id": "c0"}), now, 11.0, nobody)
    assert (on_now.parent, asked(home, on_now)["threads"]) == (ADAPTER, 7)
    order = {"id": "c1", "batch": first.batch, "seed": first.seed}
    again = later.begin("bank", "desk", Due("ordered", order), now, 12.0, nobody)
    assert asked(home, again) == asked(home, first)
    assert (again.parent, again.trigger) == ("base", f"ordered, to repeat run {first.id}")


def test_of_two_runs_of_a_batch_the_one_with_the_seed_is_repeated_else_the_newest(
    installation: Config, capture: Callable[[int], None]
):
    capture(24)
    home, log = Home(installation.home), open_log(installation)
    mine = runs(installation, log, Mlflow())
    of_seed_3 = mine.begin("bank", "desk", Due("now", {"id": "c1", "seed": 3}), Facts(), 10.0, nobody)
    now = replace(adapter_went_live(home, snapshot(home, "r2")), reward_version="")
    of_seed_4 = mine.begin("bank", "desk", Due("now", {"id": "c2", "seed": 4}), now, 11.0, nobody)
    batch = of_seed_3.batch
    assert of_seed_4.batch == batch
    for seed, expected in ((3, of_seed_3), (4, of_seed_4), (5, of_seed_4)):
        found = earlier(home, "bank", "desk", batch, seed)
        assert found is not None
        assert found.run.id == expected.id
    assert earlier(home, "bank", "other", batch, 3) is None


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        (f"adapters/{ADAPTER}", "the adapter that it began from"),
        (f"runs/run_other/{VALUE_HEAD}", "the value head that it began from"),
        ("rewards/bank/desk/r2/model.json", "the reward model's snapshot that judged it"),
    ],
)
def test_a_repeat_whose_beginning_is_gone_is_refused(
    installation: Config, capture: Callable[[int], None], gone: str, told: str
):
    capture(24)
    home, log = Home(installation.home), open_log(installation)
    recipe = Path(str(installation.policy("bank", "desk").train.recipe))
    recipe.write_text(recipe.read_text().replace('source = "feedback"', 'source = "model"'))
    now = adapter_went_live(home, snapshot(home, "r2"))
    mine = runs(installation, log, Mlflow())
    first = mine.begin("bank", "desk", Due("now"), replace(now, reward_version=""), 10.0, nobody)
    snapshot(home, "r3")
    path = home.root / gone
    path.rmdir() if path.is_dir() else path.unlink()
    order = {"id": "c1", "batch": first.batch, "seed": first.seed}
    newer = Facts(reward_version="r3", reward_path="rewards/bank/desk/r3")
    with pytest.raises(NotEnoughData, match=f"cannot be repeated: gone are {told}"):
        mine.begin("bank", "desk", Due("ordered", order), newer, 12.0, nobody)
