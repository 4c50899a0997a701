"""The files process: real adapters checked against a real base, and what is refused; how it starts and ends."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from everloop.errors import AdapterRefused, RegistryError
from everloop.event import BASE
from everloop.home import Home

pytestmark = pytest.mark.models
Adapters = Callable[..., list[str]]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def files(world: Callable[..., Any], tiny_base: Path) -> Any:
    from services.releaser.files import AdapterFiles

    return AdapterFiles(world(base=str(tiny_base)).config)


def test_a_good_adapter_passes_and_its_distance_is_measured(files: Any, home: Home, adapters: Adapters) -> None:
    (name,) = adapters(home.folder("adapters"), 1)
    files.bring(name, "models:/default.assistant/1", "default", "assistant")
    rows = [[[5, 6, 7], [8, 9]], [[5], []]]
    near, nothing = files.distances(name, "default", "assistant", rows)
    assert 0 < near < 1
    assert nothing is None


def damage_truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def damage_poison(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    first = next(iter(tensors))
    tensors[first][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


def damage_smuggle(folder: Path) -> None:
    (folder / "run_me.py").write_text("raise SystemExit")


def damage_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


@pytest.mark.parametrize("damage", [damage_truncate, damage_poison, damage_smuggle, damage_config])
def test_a_damaged_adapter_is_refused_and_not_left_lying_about(
    files: Any, home: Home, adapters: Adapters, damage: Callable[[Path], None]
) -> None:
    folder = home.folder("adapters")
    (name,) = adapters(folder, 1)
    damage(folder / name)
    with pytest.raises(AdapterRefused):
        files.bring(name, "models:/default.assistant/1", "default", "assistant")
    assert not (folder / name).exists()


def test_an_adapter_that_another_base_serves_is_refused_and_stays(
    world: Callable[..., Any], home: Home, adapters: Adapters, tmp_path: Path
) -> None:
    from services.releaser.files import AdapterFiles
    from trainer.policy import tiny_k2

    small = tiny_k2.Settings(
        steps=(1, 1), hidden=32, vocabulary=380, dense_width=32, expert_width=16, batch=4, context=64
    )
    tiny_k2.build(tmp_path / "other", [("hello there", "greet"), ("bye now", "leave")] * 4, settings=small)
    folder = home.folder("adapters")
    (name,) = adapters(folder, 1)
    held = sorted((path.name, path.read_bytes()) for path in (folder / name).iterdir())
    with pytest.raises(AdapterRefused, match="belongs to base"):
        AdapterFiles(world(base=str(tmp_path / "other")).config).bring(name, "models:/x/1", "default", "assistant")
    assert sorted((path.name, path.read_bytes()) for path in (folder / name).iterdir()) == held


def test_a_checkpoint_s_files_are_copied_from_its_run_and_stay_when_that_lets_go(
    files: Any, home: Home, adapters: Adapters
) -> None:
    kept = home.folder("runs", "run_1", "adapters")
    (name,) = adapters(kept, 1)
    uri = "everloop://run_1/checkpoints/10"
    damage_poison(kept / name)
    with pytest.raises(AdapterRefused):
        files.bring(name, uri, "default", "assistant")
    assert not (home.root / "adapters" / name).exists()
    shutil.rmtree(kept / name)
    with pytest.raises(AdapterRefused, match=r"files of this checkpoint are gone.*train\.keep_checkpoints"):
        files.bring(name, uri, "default", "assistant")
    adapters(kept, 1)
    files.bring(name, uri, "default", "assistant")
    shutil.rmtree(kept)
    files.bring(name, uri, "default", "assistant")
    assert sorted(os.listdir(home.root / "adapters")) == [name]


def test_files_under_another_hash_are_refused(files: Any, home: Home, adapters: Adapters) -> None:
    folder = home.folder("adapters")
    (name,) = adapters(folder, 1)
    (folder / name).rename(folder / ("0" * 32))
    with pytest.raises(AdapterRefused, match="hash"):
        files.bring("0" * 32, "models:/default.assistant/1", "default", "assistant")


def test_a_registry_that_is_down_is_no_fault_of_the_adapter(files: Any) -> None:
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:9 does not answer"):
        files.bring("1" * 32, "models:/default.assistant/1", "default", "assistant")


def test_adopting_takes_only_adapters(files: Any, tmp_path: Path, adapters: Adapters) -> None:
    with pytest.raises(AdapterRefused, match="there is no adapter folder"):
        files.adopt(str(tmp_path / "none"), "default", "assistant", "", 1.0)
    (name,) = adapters(tmp_path / "mine", 1)
    (tmp_path / "mine" / name / "secret").symlink_to("/etc/passwd")
    with pytest.raises(AdapterRefused, match="has no place in an adapter"):
        files.adopt(str(tmp_path / "mine" / name), "default", "assistant", "", 1.0)


@pytest.mark.processes
@pytest.mark.mlflow
async def test_the_process_adopts_brings_mirrors_and_ends_with_its_input(
    home: Home, tiny_base: Path, tmp_path: Path, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One life of the process over its pipe, with a real MLflow store: from an adapter made elsewhere to an alias."""
    from services.releaser.porter import Porter

    (name,) = adapters(tmp_path / "mine", 1)
    monkeypatch.setenv("EVERLOOP_HOME", str(home.root))
    monkeypatch.setenv("EVERLOOP_TENANTS__DEFAULT__POLICIES__ASSISTANT__BASE", str(tiny_base))
    porter = Porter()
    where = {"tenant": "default", "policy": "assistant"}
    asked = {"source": str(tmp_path / "mine" / name), "reason": "by hand", "now": 1.0, **where}
    adopted = await porter.ask("adopt", **asked)
    assert adopted["hash"] == name
    assert adopted["parent"] == BASE
    shutil.rmtree(home.root / "adapters")
    await porter.ask("bring", adapter=name, uri=adopted["uri"], **where)
    assert sorted(os.listdir(home.root / "adapters" / name)) == ["adapter_config.json", WEIGHTS]
    await porter.ask("mirror", uri=adopted["uri"], **where)
    assert await porter.ask("aliases", policies=[["default", "assistant"]]) == {"default/assistant": {"live": "1"}}
    with pytest.raises(AdapterRefused, match="should hold adapter"):
        await porter.ask("bring", adapter="2" * 32, uri=adopted["uri"], **where)

    process = porter._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()  # as when the releaser is killed
    assert await asyncio.wait_for(process.wait(), 30) == 0


@pytest.mark.processes
async def test_files_that_kill_their_reader_are_refused_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from services.releaser import porter as module

    monkeypatch.setattr(module, "READER", ("-c", "import sys, os; sys.stdin.readline(); os.kill(os.getpid(), 9)"))
    porter = module.Porter()
    for _ in range(module.CRASHES - 1):
        with pytest.raises(RegistryError):
            await porter.ask("bring", adapter="x")
    with pytest.raises(AdapterRefused, match="time and again"):
        await porter.ask("bring", adapter="x")
    await porter.close()
