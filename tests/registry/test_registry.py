"""Runs and adapters in a real MLflow store in a SQLite file; and a server that is not there."""

from __future__ import annotations

import hashlib
import socket
import time
from pathlib import Path

import pytest
from everloop.errors import AdapterRefused, RegistryError
from everloop.registry import Point, Registry, allowed_files

pytestmark = pytest.mark.mlflow


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    root = tmp_path_factory.mktemp("registry")
    return Registry(f"sqlite:///{root / 'mlflow.db'}", root / "mlartifacts")


def adapter(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def content_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def publish(registry: Registry, folder: Path, run: str, policy: str = "desk") -> tuple[str, str]:
    run_id = registry.log_run(
        "bank",
        policy,
        run,
        title=f"{run} of the desk",
        took=(1_000.0, 1_060.0),
        batch="batch_0123456789",
        results={"kl": 0.15, "steps": 2.0},
        params={"rank": 32, "recipe": "ppo"},
        curves=[Point("kl", 1, 0.1), Point("kl", 2, 0.2)],
        tags={"everloop.batch": "b1"},
        files={"adapter": folder},
    )
    uri = registry.register("bank", policy, registry_run=run_id, content=content_hash(folder), tags={})
    return run_id, uri


def test_a_run_is_logged_registered_and_fetched_back(registry: Registry, tmp_path: Path):
    folder = adapter(tmp_path / "made")
    run_id, uri = publish(registry, folder, "run-a")
    assert uri == "models:/bank.desk/1"
    with registry._client() as client:
        logged = client.get_run(run_id)
        assert logged.data.params["rank"] == "32"
        assert [m.value for m in client.get_metric_history(run_id, "kl")] == [0.1, 0.2]
        assert logged.data.tags["everloop.batch"] == "b1"
        assert (logged.info.run_name, logged.info.start_time, logged.info.end_time) == (
            "run-a of the desk",
            1_000_000,
            1_060_000,
        )
        assert [(data.dataset.name, data.dataset.digest) for data in logged.inputs.dataset_inputs] == [
            ("batch_0123456789", "01234567")
        ]
        assert logged.data.metrics == {"kl": 0.2, "result/kl": 0.15, "result/steps": 2.0}
        assert [m.timestamp for m in client.get_metric_history(run_id, "kl")] == [1_000_001, 1_000_002]
    fetched = registry.fetch(uri, content_hash(folder), tmp_path / "adapters", content_hash)
    assert fetched == tmp_path / "adapters" / content_hash(folder)
    assert (fetched / "adapter_model.safetensors").read_bytes() == b"weights"


def test_publishing_again_after_a_kill_changes_nothing(registry: Registry, tmp_path: Path):
    folder = adapter(tmp_path / "made", b"once")
    assert publish(registry, folder, "run-b", "again") == publish(registry, folder, "run-b", "again")


def test_an_alias_is_a_name_for_a_version(registry: Registry, tmp_path: Path):
    folder = adapter(tmp_path / "made", b"aliased")
    _, uri = publish(registry, folder, "run-c", "aliased")
    registry.set_alias(uri, "live")
    assert registry.download("models:/bank.aliased@live", tmp_path / "out").joinpath("adapter_config.json").exists()
    with pytest.raises(RegistryError, match="not the uri of a version"):
        registry.set_alias("bank.aliased", "live")


def test_files_under_a_wrong_hash_are_refused_and_leave_nothing(registry: Registry, tmp_path: Path):
    _, uri = publish(registry, adapter(tmp_path / "made", b"other"), "run-d", "wrong")
    with pytest.raises(AdapterRefused, match="not loaded"):
        registry.fetch(uri, "0" * 64, tmp_path / "adapters", content_hash)
    assert list((tmp_path / "adapters").iterdir()) == []


def test_an_unknown_uri_is_an_error_that_says_so(registry: Registry, tmp_path: Path):
    with pytest.raises(RegistryError, match="does not answer as it should"):
        registry.download("models:/bank.nothing/7", tmp_path / "out")


@pytest.mark.parametrize("extra", ["model.bin", "adapter.pkl", "link.safetensors"])
def test_only_adapter_files_are_taken(tmp_path: Path, extra: str):
    folder = adapter(tmp_path / "made")
    path = folder / extra
    path.symlink_to("/etc/hostname") if extra.startswith("link") else path.write_bytes(b"x")
    with pytest.raises(AdapterRefused, match="no place in an adapter"):
        allowed_files(folder)


def test_a_registry_that_is_down_is_noticed_in_seconds(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    down = Registry(f"http://127.0.0.1:{port}", tmp_path)
    started = time.monotonic()
    with pytest.raises(RegistryError, match="does not answer"):
        down.register("bank", "desk", registry_run="r", content="a", tags={})
    assert time.monotonic() - started < 60


def test_no_experiment_is_listed_that_nobody_uses(registry: Registry, tmp_path: Path):
    publish(registry, adapter(tmp_path / "made", b"of the list"), "run-list")
    assert "bank/desk" in registry.experiments()
    assert "Default" not in registry.experiments()


def test_an_experiment_default_that_somebody_uses_stays(tmp_path: Path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    MlflowClient(tracking_uri=uri).create_run("0")
    for _ in range(2):
        assert Registry(uri, tmp_path).experiments() == {"Default": "0"}
