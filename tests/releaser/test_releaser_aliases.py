"""Aliases in a real MLflow store, moved by a plain client: a request to examine, never a way past the gates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from everloop.config import Config
from everloop.errors import AdapterRefused, EverloopError, RegistryError
from everloop.home import Home
from everloop.registry import REFUSED_TAG
from everloop.release import Release, ReleaseState

from services.releaser.aliases import Aliases
from services.releaser.state import PolicyState

pytestmark = [pytest.mark.mlflow, pytest.mark.models]
MODEL = "default.assistant"
WHERE = {"tenant": "default", "policy": "assistant"}
Adapters = Callable[..., list[str]]


def opened(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the policy's model in it, for tests to copy: MLflow takes seconds to make one."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    opened(f"sqlite:///{path}").create_registered_model(MODEL)
    return path


@pytest.fixture
def store(home: Home, empty_store: Path) -> str:
    return f"sqlite:///{shutil.copyfile(empty_store, home.folder() / 'mlflow.db')}"


@pytest.fixture
def client(store: str) -> Any:
    return opened(store)


@pytest.fixture
def files(world: Callable[..., Any], tiny_base: Path, store: str) -> Any:
    from services.releaser.files import AdapterFiles

    fields = {**world(base=str(tiny_base)).fields, "mlflow": {"uri": store}}
    return AdapterFiles(Config.model_validate(fields))


def made_by_hand(client: Any, home: Home, folder: Path, alias: str | None = None) -> str:
    """As a researcher registers an adapter: a run, its files, a version, an alias."""
    known = client.get_experiment_by_name("mine")
    where = (home.root / "mlartifacts").as_uri()
    experiment = known.experiment_id if known else client.create_experiment("mine", artifact_location=where)
    run = client.create_run(experiment).info.run_id
    client.log_artifacts(run, str(folder), "adapter")
    version = client.create_model_version(MODEL, source=f"runs:/{run}/adapter", run_id=run).version
    if alias:
        client.set_registered_model_alias(MODEL, alias, version)
    return str(version)


def plain_peft(tiny_base: Path, folder: Path) -> Path:
    """What PEFT itself writes, model card and all."""
    from trainer.policy import base, lora

    lora.attach(base.load(str(tiny_base), folder), 2, 4.0, seed=3).save_pretrained(folder / "peft")
    return folder / "peft"


def test_a_version_that_a_plain_client_made_is_taken_as_it_is(
    files: Any, home: Home, client: Any, store: str, tiny_base: Path, tmp_path: Path
) -> None:
    folder = plain_peft(tiny_base, tmp_path)
    assert (folder / "README.md").exists()
    version = made_by_hand(client, home, folder, "candidate")
    assert files.aliases([("default", "assistant"), ("default", "other")]) == {
        "default/assistant": {"candidate": version},
        "default/other": {},
    }
    adopted = files.adopt_version(version=version, now=1.0, **WHERE)
    assert (adopted["uri"], adopted["rank"]) == (f"models:/{MODEL}/{version}", 2)
    assert client.get_model_version(MODEL, version).tags["everloop.adapter"] == adopted["hash"]
    assert files.adopt_version(version=version, now=2.0, **WHERE)["hash"] == adopted["hash"]
    files.bring(adopted["hash"], adopted["uri"], **WHERE)
    assert sorted(path.name for path in (home.root / "adapters" / adopted["hash"]).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def damage_pickle(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")


def damage_folder(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "adapter_model.safetensors").write_bytes(b"")


def damage_other_base(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/home/me/model"}))


def damage_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[" * 100)


def damage_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "other.safetensors")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (damage_pickle, "adapter_model.bin has no place"),
        (damage_folder, "more has no place"),
        (damage_other_base, "belongs to base '/home/me/model'.*say so in its adapter_config.json"),
        (damage_config, "is not a LoRA configuration"),
        (damage_weights, "an adapter is adapter_config.json and adapter_model.safetensors alone"),
    ],
)
def test_other_files_are_refused_once_and_for_all(
    files: Any, home: Home, client: Any, adapters: Adapters, tmp_path: Path, damage: Any, why: str
) -> None:
    (name,) = adapters(tmp_path / "mine", 1)
    damage(tmp_path / "mine" / name)
    version = made_by_hand(client, home, tmp_path / "mine" / name)
    with pytest.raises(AdapterRefused, match=why):
        files.adopt_version(version=version, now=1.0, **WHERE)
    assert client.get_model_version(MODEL, version).tags[REFUSED_TAG]
    shutil.rmtree(home.root / "mlartifacts")  # it is not looked at again
    with pytest.raises(AdapterRefused, match=why):
        files.adopt_version(version=version, now=1.0, **WHERE)
    assert list(home.folder("adapters").iterdir()) == []


class Desk:
    """The releaser's part in it: asks the files at once, in this thread, and counts what it asked."""

    def __init__(self, files: Any) -> None:
        self.files = files
        self.asked: list[str] = []
        self.away: EverloopError | None = None

    def registry(self, do: str, **asked: Any) -> Any:
        from concurrent.futures import Future

        self.asked.append(do)
        future: Future[Any] = Future()
        try:
            if self.away is not None:
                raise self.away
            future.set_result(getattr(self.files, do)(**asked))
        except EverloopError as error:
            future.set_exception(error)
        return future


class Followed:
    """Aliases of a store, looked at once a second of a clock that a test turns."""

    def __init__(self, files: Any, store: str) -> None:
        self.desk = Desk(files)
        self.announced: list[Any] = []
        self.state = PolicyState("default", "assistant")
        config = Config.model_validate({"home": files._config.home, "mlflow": {"uri": store, "poll": 1}})
        self.aliases = Aliases(config, self.desk, self.announced.append, 0.0)  # type: ignore[arg-type]
        self.now = 0.0

    def go_on(self, seconds: int = 8) -> list[str]:
        for _ in range(seconds * 4):
            self.now += 0.25
            self.aliases.look({"default/assistant": self.state}, self.now)
        return list(self.aliases.said("default/assistant"))

    def becomes(self, adapter: Any, state: ReleaseState) -> None:
        its = {"adapter": adapter["hash"], "uri": adapter["uri"], "state": state, "reason": "So.", "time": 1.0}
        self.state.take(Release(id=f"rel-{adapter['hash'][:4]}", tenant="default", policy="assistant", step=1, **its))


@pytest.fixture
def followed(files: Any, store: str, client: Any) -> Followed:
    return Followed(files, store)


def test_candidate_asks_for_a_version_once(
    followed: Followed, home: Home, client: Any, adapters: Adapters, tmp_path: Path
) -> None:
    good, bad = adapters(tmp_path / "mine", 2)
    (tmp_path / "mine" / bad / "adapter_model.bin").write_bytes(b"")
    assert followed.go_on() == []
    version = made_by_hand(client, home, tmp_path / "mine" / good, "candidate")
    (said,) = followed.go_on()
    assert "is a candidate now" in said
    assert [(one.hash, one.uri) for one in followed.announced] == [(good, f"models:/{MODEL}/{version}")]
    followed.becomes(followed.announced[0].model_dump(), ReleaseState.REJECTED)
    client.set_registered_model_alias(MODEL, "candidate", version)
    made_by_hand(client, home, tmp_path / "mine" / bad, "candidate")
    (said,) = followed.go_on()
    assert "version 2 is refused: adapter_model.bin has no place" in said
    client.set_registered_model_alias(MODEL, "candidate", version)
    followed.go_on()
    assert len(followed.announced) == 1
    made_by_hand(client, home, tmp_path / "mine" / good, "candidate")  # the same files under another number
    (said,) = followed.go_on()
    assert "version 3 is release rel-" in said
    assert "already, rejected: So." in said
    assert len(followed.announced) == 1
    assert followed.desk.asked.count("adopt_version") == 3
    looks = followed.desk.asked.count("aliases")
    followed.go_on(60)
    assert followed.desk.asked.count("aliases") == looks, "a file that did not change is not opened"


def test_live_follows_the_releases_whoever_moves_it(
    followed: Followed, files: Any, home: Home, client: Any, adapters: Adapters, tmp_path: Path
) -> None:
    names = adapters(tmp_path / "mine", 2)
    versions = [made_by_hand(client, home, tmp_path / "mine" / name) for name in names]
    first, second = (files.adopt_version(version=version, now=1.0, **WHERE) for version in versions)

    def live() -> str | None:
        found = client.get_registered_model(MODEL).aliases.get("live")
        return None if found is None else str(found)

    client.set_registered_model_alias(MODEL, "live", versions[1])
    (said,) = followed.go_on()
    assert "alias live was moved to version 2 by hand, and is removed again: the base model is live" in said
    assert live() is None
    followed.becomes(first, ReleaseState.LIVE)
    followed.go_on()
    assert live() == versions[0]
    client.set_registered_model_alias(MODEL, "live", versions[1])
    (said,) = followed.go_on()
    assert "put back to version 1. It follows the releases: promote with 'everloop release promote'" in said
    assert live() == versions[0]
    client.delete_registered_model_alias(MODEL, "live")
    (said,) = followed.go_on()
    assert "alias live was removed by hand, and is put back to version 1" in said
    assert live() == versions[0]
    assert followed.announced == []
    followed.state.releases.clear()
    followed.becomes(second, ReleaseState.LIVE)  # a promotion is no hand
    assert followed.go_on() == [said]
    assert live() == versions[1]


def test_a_registry_that_is_away_is_asked_seldom_and_again(
    followed: Followed, home: Home, client: Any, adapters: Adapters, tmp_path: Path
) -> None:
    (name,) = adapters(tmp_path / "mine", 1)
    made_by_hand(client, home, tmp_path / "mine" / name, "candidate")
    followed.desk.away = RegistryError("nobody answers")
    (said,) = followed.go_on(300)
    assert said == "aliases are not looked at: nobody answers"
    assert 4 < followed.desk.asked.count("aliases") < 12
    followed.desk.away = None
    (said,) = followed.go_on(70)
    assert "is a candidate now" in said
