"""Adapters resident beside each other: none that is answering is ever dropped, none appears in part."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from everloop.errors import AdapterRefused, UnknownAdapter

from trainer.policy import lora
from trainer.policy.base import Policy
from trainer.rollout.residents import Residents

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def adapters(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("several")
    return [folder / lora.save(lora.attach(policy, 2, 4, ("attention",), seed=seed), folder) for seed in range(4)]


def test_the_one_used_longest_ago_goes(policy: Policy, adapters: list[Path]) -> None:
    residents = Residents([policy], limit=2)
    for folder in adapters[:2]:
        residents.load(folder.name, folder)
    residents.release(residents.lease(adapters[0].name))
    residents.load(adapters[2].name, adapters[2])
    assert list(residents.adapters()) == [adapters[0].name, adapters[2].name]


def test_one_that_is_answering_stays_until_it_is_done(policy: Policy, adapters: list[Path]) -> None:
    residents = Residents([policy], limit=2)
    leases = []
    for folder in adapters[:3]:
        residents.load(folder.name, folder)
        leases.append(residents.lease(folder.name))
    assert len(residents.adapters()) == 3
    residents.release(leases[1])
    assert list(residents.adapters()) == [adapters[0].name, adapters[2].name]


def test_loading_twice_does_nothing_and_unloading_tells(policy: Policy, adapters: list[Path]) -> None:
    residents = Residents([policy], limit=2)
    residents.load(adapters[0].name, adapters[0])
    module = residents.lease(adapters[0].name).module
    residents.load(adapters[0].name, adapters[0])
    assert residents.lease(adapters[0].name).module is module
    assert residents.unload(adapters[0].name)
    assert not residents.unload(adapters[0].name)
    with pytest.raises(UnknownAdapter, match="untrained"):
        residents.lease(adapters[0].name)


def test_what_is_refused_is_not_resident(policy: Policy, adapters: list[Path], tmp_path: Path) -> None:
    residents = Residents([policy], limit=2)
    with pytest.raises(AdapterRefused, match="were changed"):
        residents.load("0" * 32, adapters[0])
    broken = tmp_path / "broken"
    shutil.copytree(adapters[0], broken)
    (broken / lora.WEIGHTS).write_bytes(b"")
    with pytest.raises(AdapterRefused):
        residents.load(adapters[0].name, broken)
    assert residents.adapters() == {}


def test_untouched_weights_are_the_bases_own(policy: Policy, adapters: list[Path]) -> None:
    residents = Residents([policy], limit=2)
    residents.load(adapters[0].name, adapters[0])
    module = residents.lease(adapters[0].name).module
    shared = [n for n, p in module.named_parameters() if p is policy.model.get_parameter(n)]
    assert "lm_head.weight" in shared
    assert len(shared) > 0.5 * len(list(module.parameters()))
    assert isinstance(module, torch.nn.Module)
