"""Adapters in vLLM's layout: expert by expert, the update is the one that PEFT's layout says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.policy import layout, lora, targets
from trainer.policy.base import Policy

pytestmark = pytest.mark.models


@pytest.mark.parametrize("groups", [*((group,) for group in targets.GROUPS), targets.GROUPS])
def test_the_updates_are_the_same_in_both_layouts(policy: Policy, tmp_path: Path, groups: tuple[str, ...]) -> None:
    from tests.conftest import random_adapter

    folder = random_adapter(policy, tmp_path, groups, seed=3)
    fields = json.loads((folder / lora.CONFIG).read_text())
    written = layout.converted(folder, tmp_path / "converted")
    assert (written == folder) == (groups == ("attention",))
    assert layout.converted(folder, tmp_path / "converted") == written
    made = load_file(written / lora.WEIGHTS)
    merged = dict(lora.merged(policy, folder).named_parameters())
    for name, weight in policy.model.named_parameters():
        expected = (merged[name] - weight).detach()
        found = delta(made, name, expected)
        if found is not None:
            assert (fields["lora_alpha"] / fields["r"] * found - expected).abs().max() < 1e-6
        else:
            assert not expected.any(), name
    config = json.loads((written / lora.CONFIG).read_text())
    assert not config["target_parameters"]
    assert all(any(f".{one}.lora_A" in name for name in made) for one in config["target_modules"])


def delta(made: dict[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor | None:
    """The update of one parameter, in the shape of the parameter, as vLLM's names say it; None: they say nothing."""
    module = lora.PREFIX + name.removesuffix(".weight")
    if like.dim() == 2:
        return made[module + layout.B] @ made[module + layout.A] if module + layout.A in made else None
    owner, _, leaf = module.rpartition(".")
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
    if f"{owner}.0.{parts[0]}{layout.A}" not in made:
        return None
    own = [[made[f"{owner}.{e}.{p}{layout.B}"] @ made[f"{owner}.{e}.{p}{layout.A}"] for p in parts] for e in range(8)]
    return torch.stack([torch.cat(its) for its in own])
