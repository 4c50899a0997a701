"""The runner's loop: what one run raises ends that run, and no other."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from everloop.config import Config
from everloop.errors import LogError
from everloop.home import Home
from everloop.run import Run, RunState

from services.learner.board import Board
from services.learner.mismatches import Mismatches
from services.learner.runner import Runner
from trainer.request import Request


class Kept:
    """Two interrupted runs; remembers which failed, and why."""

    def __init__(self, home: Home, log_works: bool = True) -> None:
        self.failed: list[tuple[str, str]] = []
        self.log_works = log_works
        self.runs = [_run(name) for name in ("first", "second")]
        for run in self.runs:
            folder = str(home.folder("runs", run.id))
            Request(run.id, folder, adapters="", base="", cache="", batch="", recipe={}, seed=0).save()

    def under_way(self) -> list[Run]:
        return self.runs

    def fail(self, run: Run, why: str, now: float) -> Run:
        if not self.log_works:
            raise LogError("the disk is full")
        self.failed.append((run.id, why))
        return run.model_copy(update={"state": RunState.FAILED, "reason": why})


class Broken:
    """A learner whose runs raise what a researcher's own file may raise. The service is stopped after the second."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop, self.trained = stop, 0

    def start(self) -> None: ...

    def close(self) -> None: ...

    def warm(self, *_: Any) -> int:
        return 0

    def train(self, request: Request, stop: threading.Event, meanwhile: Any) -> None:
        self.trained += 1
        if self.trained == 2:
            self.stop.set()
        raise NameError("name 'advantges' is not defined")


def _run(name: str) -> Run:
    return Run(
        id=name, tenant="t", policy="p", state=RunState.RUNNING, batch="b", seed=0, parent="base", trigger="t", time=0.0
    )


def runner(home: Home, kept: Any) -> Runner:
    stop = threading.Event()
    noted = SimpleNamespace(known=lambda key: SimpleNamespace(run={"id": kept.failed[-1][0], "step": 9}))
    registry = SimpleNamespace(open=lambda: None)
    config = Config(home=home.root)
    return Runner(
        config, noted, kept, registry, Broken(stop), Board(home, Mismatches(lambda *_: 1.0)), stop, lag=lambda: 0
    )  # type: ignore[arg-type]


def test_a_run_whose_own_code_is_broken_fails_with_its_reason_and_the_next_goes_on(home: Home):
    kept = Kept(home)
    runner(home, kept).run()
    why = "NameError: name 'advantges' is not defined"
    assert kept.failed == [("first", why), ("second", why)]


def test_a_failing_log_still_ends_the_process(home: Home):
    with pytest.raises(LogError, match="the disk is full"):
        runner(home, Kept(home, log_works=False)).run()
