"""What 'everloop retrain' says before it orders a run, and what it does not order at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from everloop.cli.main import main
from everloop.config import Config, PolicyConfig
from everloop.home import Home
from everloop.log import open_log
from everloop.run import Command, Run, RunState
from everloop.topics import COMMANDS, RUNS

from services.commands.retrain import Material, _is_of, held_up, prospects
from services.installation import Installation, Running
from services.learner.facts import Facts
from services.learner.runs import Runs
from services.learner.triggers import Due


@pytest.fixture(autouse=True)
def this_one(installation: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERLOOP_CONFIG", str(Home(installation.home).root / "everloop.toml"))


def orders() -> list[Command]:
    with Installation.here() as here:
        return list(here.records(COMMANDS, Command))


def test_a_run_on_five_labels_is_ordered_with_a_warning(
    capture: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    capture(5)
    assert main(["retrain"]) == 1
    told = capsys.readouterr().out
    assert "bank/desk has 5 scored episodes with 5 labels (3 good, 2 bad), and 0 gold items for the gate" in told
    assert "few episodes: by itself a run starts at 20 (train.min_scored)" in told
    assert "few labels: below 30" in told
    assert "few gold items: below 50 (gate.min_gold)" in told
    main(["retrain", "--seed", "7", "--no-publish"])
    assert [order.arguments for order in orders()] == [{}, {"seed": 7, "publish": False}]


def test_where_there_is_enough_nothing_is_said_to_be_little() -> None:
    (told,) = prospects("bank/desk", Material(episodes=400, good=30, bad=5, gold=60), PolicyConfig())
    assert told.startswith("bank/desk has 400 scored episodes with 35 labels")
    lopsided = "\n".join(prospects("bank/desk", Material(episodes=400, good=300, bad=4, gold=60), PolicyConfig()))
    assert "few labels" in lopsided
    assert "few episodes" not in lopsided


def test_a_batch_that_is_not_there_is_refused_at_once_and_nothing_is_ordered(
    installation: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    (Home(installation.home).folder("batches") / "batch_1.parquet").touch()
    for name in ("zzz", "../secret"):
        assert main(["retrain", "--batch", name, "--seed", "7"]) == 2
        told = capsys.readouterr().err
        assert f"there is no batch '{name}'" in told
        assert "the newest are batch_1" in told
    assert orders() == []
    assert main(["retrain", "--batch", "batch_1"]) == 1
    assert orders()[0].arguments == {"batch": "batch_1"}


def test_a_pinned_batch_says_which_run_it_repeats_or_that_it_begins_from_what_is_live(
    installation: Config, capture: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    capture(24)
    (Home(installation.home).folder("batches") / "batch_1.parquet").touch()
    main(["retrain", "--batch", "batch_1"])
    assert "No earlier run of batch batch_1 is known here: this one begins from what is live" in capsys.readouterr().out
    log = open_log(installation)
    runs = Runs(installation, log, None, threads=1)  # type: ignore[arg-type]
    first = runs.begin("bank", "desk", Due("now"), Facts(), 1.0, lambda *_: [])
    log.close()
    main(["retrain", "--batch", first.batch, "--seed", "9"])
    assert f"Repeats run {first.id} (seed 0) from where it began: base." in capsys.readouterr().out


def test_a_refused_run_has_the_seed_that_it_would_have_had(installation: Config) -> None:
    log = open_log(installation)
    runs = Runs(installation, log, None, threads=1)  # type: ignore[arg-type]
    for seed, expected in ((7, 7), (None, 0)):
        order = {"id": f"c{seed}", "batch": "zzz", "seed": seed}
        assert runs.refuse("bank", "desk", Due("ordered", order), Facts(), "there is no batch", 1.0).seed == expected
    log.close()
    with Installation.here() as here:
        kept = list(here.records(RUNS, Run))
    assert [(run.seed, run.state) for run in kept] == [(7, RunState.FAILED), (0, RunState.FAILED)]


@pytest.mark.parametrize(
    ("policies", "words"),
    [
        ({}, "the learner, which does not answer yet"),
        ({"bank/desk": {"running": None, "paused": False}}, ""),
        ({"bank/desk": {"running": None, "paused": True}}, "everloop resume: the policy is paused"),
        (
            {"bank/other": {"running": {"run": "run_1", "since": 0.0}}, "bank/desk": {}},
            "run run_1 of bank/other to end (under way since 1970-01-01",
        ),
    ],
)
def test_an_order_that_has_to_wait_says_for_what(policies: dict[str, object], words: str) -> None:
    said = held_up({"policies": policies}, "bank/desk")
    assert said.startswith(words)
    assert bool(said) == bool(words)


def test_a_run_that_ends_after_an_order_is_not_taken_for_the_orders_own() -> None:
    order = Command(id="cmd_1", kind="retrain", tenant="bank", policy="desk", time=1.0)
    fields = {
        "tenant": "bank",
        "policy": "desk",
        "batch": "b",
        "seed": 0,
        "parent": "base",
        "trigger": "t",
        "time": 2.0,
    }
    triggered = Run(id="run_1", state=RunState.PUBLISHED, step=1, **fields)
    assert not _is_of(triggered, order)
    assert _is_of(Run(id="run_2", state=RunState.RUNNING, step=0, command="cmd_1", **fields), order)


def test_an_order_behind_another_run_says_so_and_reminds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], capture: Callable[[int], None]
) -> None:
    capture(5)
    behind = {"policies": {"bank/desk": {"running": {"run": "run_1", "since": 0.0}}}}
    monkeypatch.setattr(Installation, "running", lambda self: {"learner": Running("learner", 1, "", 0.0)})
    monkeypatch.setattr(Installation, "status", lambda self, name: behind)
    monkeypatch.setattr("services.commands.retrain.REMIND", 0.5)
    assert main(["retrain", "--wait", "--timeout", "2"]) == 1
    told = capsys.readouterr().out
    assert "It waits for run run_1 of bank/desk to end (under way since" in told
    assert "by now)" in told
