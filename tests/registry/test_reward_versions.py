"""Released reward versions in a real MLflow store: once each, with evidence; and again after it was away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from everloop import wire
from everloop.config import Config
from everloop.errors import RegistryError
from everloop.home import Home
from everloop.log import Log, NewRecord, open_log
from everloop.registry import Registry
from everloop.run import RewardVersion

from services.learner.reward_versions import RewardVersions

pytestmark = pytest.mark.mlflow


@pytest.fixture
def log(home: Home) -> Iterator[Log]:
    opened = open_log(Config(home=home.root))
    yield opened
    opened.close()


@pytest.fixture
def announce(log: Log) -> Callable[..., None]:
    def append(version: str, state: str = "released", **fields: object) -> None:
        about = {"tenant": "bank", "policy": "desk", "path": f"rewards/bank/desk/{version}", "updates": 50, "time": 9.0}
        made = RewardVersion.model_validate({"version": version, "state": state, **about, **fields})
        log.append([NewRecord("reward-versions", made.key, wire.encode(made), {"schema": "RewardVersion"}, made.time)])

    return append


def test_what_was_released_is_there_once_with_its_evidence_and_live_follows(
    home: Home, log: Log, announce: Callable[..., None], tmp_path: Path
) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "mlartifacts")
    announce("a" * 16, reason="it is the first")
    announce("b" * 16, state="refused", reason="worse")
    announce("c" * 16, auc=0.9, evidence={"auc_lower": -0.004}, reason="takes over")
    versions = RewardVersions(log, home.blobs, registry, threading.Event())
    versions.look()
    assert registry.aliases("bank", "desk.reward") == {"live": "2"}
    newest = registry.version("bank", "desk.reward", "2")
    assert (newest.tags["everloop.reward"], newest.tags["everloop.reason"]) == ("c" * 16, "takes over")
    with registry._client() as client:
        logged = client.get_run(newest.run)
        assert logged.data.metrics["result/auc_lower"] == -0.004
        assert [one.path for one in client.list_artifacts(newest.run, "evidence")] == ["evidence/version.json"]
    announce("a" * 16, evidence={"order": "cmd_1", "by": "ada"}, reason="rolled back to by ada: it likes lists")
    RewardVersions(log, home.blobs, registry, threading.Event()).look()  # after a restart, from the beginning
    assert registry.aliases("bank", "desk.reward") == {"live": "1"}
    assert registry.version("bank", "desk.reward", "1").tags["everloop.reason"].endswith("it likes lists")
    assert set(registry.tagged("bank", "desk.reward", "everloop.reward")) == {"a" * 16, "c" * 16}


def test_while_the_registry_is_away_nothing_is_lost(
    home: Home, log: Log, announce: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "mlartifacts")
    announce("a" * 16)
    versions = RewardVersions(log, home.blobs, registry, threading.Event())

    def away(*_: object) -> object:
        raise RegistryError("nobody answers")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(registry, "tagged", away)
        with pytest.raises(RegistryError):
            versions.look()
    announce("b" * 16)
    versions.look()
    assert registry.aliases("bank", "desk.reward") == {"live": "2"}
