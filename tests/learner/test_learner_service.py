"""The learner's process on Ray and MLflow: killed in the middle of a run, resumed, published, repeated, stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.config import Config
from everloop.home import Home
from everloop.log import open_log
from everloop.log.base import NewRecord
from everloop.names import Checkpoints
from everloop.registry import Registry
from everloop.release import Adapter
from everloop.run import Command, CommandKind, Run, RunState
from everloop.topics import ADAPTERS, CHECKPOINTS, COMMANDS, RUNS

pytestmark = [pytest.mark.processes, pytest.mark.ray, pytest.mark.mlflow, pytest.mark.models]


class Service:
    """The learner of an installation, started and ended at will."""

    def __init__(self, config: Config) -> None:
        self.config, self.home = config, Home(config.home)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        variables = {"EVERLOOP_CONFIG": str(self.home.root / "everloop.toml"), "OMP_NUM_THREADS": "1"}
        with (self.home.root / "learner.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.learner"], env={**os.environ, **variables}, stdout=log, stderr=log
            )

    def end(self, how: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(30)

    def status(self) -> dict[str, Any]:
        try:
            url = json.loads((self.home.root / "run" / "learner.json").read_text())["url"]
            with urllib.request.urlopen(f"{url}/status", timeout=5) as answer:
                return dict(json.load(answer))
        except OSError:
            return {}

    def policy(self) -> dict[str, Any]:
        return dict(self.status().get("policies", {}).get("bank/desk", {}))

    def records(self, topic: Any, contract: Any) -> list[Any]:
        log = open_log(self.config)
        try:
            return [wire.decode(contract, record.value) for record in log.read(topic.name, 0)]
        finally:
            log.close()

    def ended(self, run: str) -> Run | None:
        its = [one for one in self.records(RUNS, Run) if one.id == run and one.state is not RunState.RUNNING]
        return its[-1] if its else None


@pytest.fixture
def service(installation: Config) -> Iterator[Service]:
    made = Service(installation)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def in_the_middle(runs: Path) -> str | None:
    """The run that has taken some steps and is not done."""
    for checkpoint in runs.glob("*/checkpoints/0*"):
        run = checkpoint.parent.parent
        if int(checkpoint.name) >= 2 and not (run / "result.json").exists():
            return run.name
    return None


def test_a_run_survives_the_kill_of_its_service_and_can_be_repeated(
    service: Service, capture: Callable[[int], None], until: Callable[..., Any]
):
    capture(40)
    service.start()
    run = until(lambda: in_the_middle(service.home.root / "runs"), deadline=120)
    service.end(signal.SIGKILL)
    assert service.records(ADAPTERS, Adapter) == []
    service.start()
    published = until(lambda: service.ended(run), deadline=120)
    assert published.state is RunState.PUBLISHED, published.reason
    assert published.trigger == "40 new scored episodes (min_scored 20)"
    (adapter,) = service.records(ADAPTERS, Adapter)
    assert (adapter.hash, adapter.run, adapter.parent) == (published.adapter, run, "base")
    assert sorted(path.name for path in (service.home.root / "adapters").iterdir()) == [adapter.hash]
    kept = service.records(CHECKPOINTS, Checkpoints)
    assert {(one.run, one.running) for one in kept[:-1]} == {(run, True)}
    assert (kept[-1].run, kept[-1].running, len(kept[-1].kept)) == (run, False, 3)
    assert kept[-1].kept[-1].adapter == adapter.hash
    until(lambda: "verdict on adapter" in service.policy().get("waits_for", ""), deadline=20)
    assert service.policy()["last_run"]["metrics"]["steps"] == published.metrics["steps"]

    repeat = Command(
        id="cmd_repeat",
        kind=CommandKind.RETRAIN,
        tenant="bank",
        policy="desk",
        arguments={"batch": published.batch, "seed": published.seed, "publish": False},
        time=published.time,
    )
    log = open_log(service.config)
    log.append([NewRecord(COMMANDS.name, repeat.key, wire.encode(repeat), {"schema": "Command", "id": repeat.id})])
    log.close()
    answer = until(lambda: service.status().get("commands", {}).get("cmd_repeat"), deadline=120)
    assert answer["done"], answer
    repeated = service.ended(answer["run"])
    assert repeated is not None
    assert (repeated.state, repeated.adapter) == (RunState.FINISHED, adapter.hash)
    assert len(service.records(ADAPTERS, Adapter)) == 1
    assert service.end(signal.SIGTERM) == 0

    root = service.home.root
    registry = Registry(f"sqlite:///{root / 'mlflow.db'}", root / "mlartifacts")
    from trainer.policy.lora import content_hash

    assert registry.fetch(adapter.uri, adapter.hash, root / "fetched", content_hash).is_dir()
