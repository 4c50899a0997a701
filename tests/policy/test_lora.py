"""Adapters: merged is PEFT's own forward, names are hashes of content, what is not whole is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from everloop.errors import AdapterRefused, ConfigError
from peft import PeftModel
from safetensors.torch import load_file, save_file

from trainer.policy import base, lora, targets
from trainer.policy.base import Policy

pytestmark = pytest.mark.models
IDS = torch.arange(5, 65).reshape(3, 20)


def with_noise(policy: Policy, groups: tuple[str, ...]) -> PeftModel:
    model = lora.attach(policy, 4, 8, groups, seed=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("groups", [*((group,) for group in targets.GROUPS), targets.GROUPS])
def test_merged_is_what_peft_computes(policy: Policy, tmp_path: Path, groups: tuple[str, ...]) -> None:
    model = with_noise(policy, groups)
    folder = tmp_path / lora.save(model, tmp_path)
    lora.check(folder, policy)
    merged = logits(lora.merged(policy, folder))
    assert (merged - logits(model)).abs().max() < 1e-5
    assert (merged - logits(policy.model)).abs().max() > 1e-3


def test_every_weight_that_should_is_changed_by_an_adapter_and_no_other(policy: Policy, adapter: Path) -> None:
    merged = dict(lora.merged(policy, adapter).named_parameters())
    changed = {name for name, weight in policy.model.named_parameters() if merged[name] is not weight}
    parts = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    experts = ("shared_experts", "experts.gate_up_proj", "experts.down_proj")
    expected = {n for n, _ in policy.model.named_parameters() if any(part in n for part in (*parts, *experts))}
    assert changed == expected
    assert all(not torch.equal(merged[n], policy.model.get_parameter(n)) for n in changed)


def test_attaching_and_merging_leave_the_base_alone(policy: Policy, adapter: Path) -> None:
    before = logits(policy.model)
    model = lora.attach(policy, 4, 8)
    lora.merged(policy, adapter)
    assert torch.equal(logits(policy.model), before)
    assert torch.equal(logits(model.eval()), before)  # B starts at zero
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_an_adapter_goes_on_from_its_parent_exactly(policy: Policy, adapter: Path, tmp_path: Path) -> None:
    child = lora.attach(policy, 99, 99, parent=adapter)
    assert torch.equal(logits(child.eval()), logits(lora.attach(policy, 1, 1, parent=adapter).eval()))
    assert lora.save(child, tmp_path) == adapter.name


def test_the_same_seed_attaches_the_same_adapter(policy: Policy, tmp_path: Path) -> None:
    names = [lora.save(lora.attach(policy, 4, 8, seed=seed), tmp_path) for seed in (5, 5, 6)]
    assert names[0] == names[1] != names[2]


def test_peft_itself_reads_what_is_saved(policy: Policy, adapter: Path, untrained: Path) -> None:
    again = PeftModel.from_pretrained(base.load(str(untrained), untrained.parent).model, adapter)
    assert (logits(again.eval()) - logits(lora.merged(policy, adapter))).abs().max() < 1e-5


def test_a_target_that_is_not_known_is_refused(policy: Policy) -> None:
    with pytest.raises(ConfigError, match="attention, dense, shared, experts"):
        lora.attach(policy, 4, 8, ("router",))


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / lora.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / lora.WEIGHTS)
        change(tensors, next(name for name in sorted(tensors) if "experts.lora_B" in name))
        save_file(tensors, folder / lora.WEIGHTS)

    return edit


def poisoned(value: float) -> Callable[[dict[str, torch.Tensor], str], None]:
    def poison(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name][0, 0] = value

    return poison


def truncate(folder: Path) -> None:
    path = folder / lora.WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def link(folder: Path) -> None:
    moved = folder.parent / "elsewhere.safetensors"
    (folder / lora.WEIGHTS).rename(moved)
    (folder / lora.WEIGHTS).symlink_to(moved)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a third file": (lambda f: (f / "adapter_model.bin").write_bytes(b"\x80"), "alone"),
    "no weights": (lambda f: (f / lora.WEIGHTS).unlink(), "alone"),
    "a link": (link, "not a plain file"),
    "cut short": (truncate, "not a whole safetensors"),
    "not safetensors": (lambda f: (f / lora.WEIGHTS).write_bytes(b"PK\x03\x04" * 99), "not a whole safetensors"),
    "not JSON": (lambda f: (f / lora.CONFIG).write_text("{"), "not a LoRA configuration"),
    "no rank": (edit_config(r=0), "rank"),
    "another rank": (edit_config(r=8), "shape"),
    "an option that is not served": (edit_config(use_dora=True), "use_dora"),
    "a rank for some": (edit_config(rank_pattern={"o_proj": 2}), "rank_pattern"),
    "an expression": (edit_config(target_modules=".*(a+)+$"), "not a list"),
    "another target": (edit_config(target_modules=["o_proj"]), "not expected"),
    "of another base": (edit_config(base_model_name_or_path="other@0123"), "belongs to base"),
    "not a number": (edit_tensors(poisoned(float("nan"))), "finite"),
    "infinite": (edit_tensors(poisoned(float("inf"))), "finite"),
    "another shape": (edit_tensors(lambda t, n: t.update({n: t[n][:, :-1].contiguous()})), "shape"),
    "one missing": (edit_tensors(lambda t, n: t.pop(n)), "missing"),
    "one too many": (edit_tensors(lambda t, n: t.update(extra=t[n].clone())), "not expected"),
    "other values": (edit_tensors(poisoned(0.5)), "were changed"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_a_whole_adapter_is_refused(policy: Policy, adapter: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    lora.check(folder, policy, adapter.name)
    breaking, words = BROKEN[what]
    breaking(folder)
    with pytest.raises(AdapterRefused, match=words):
        lora.check(folder, policy, adapter.name)


def test_the_hash_is_of_content_not_of_spelling(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    config = json.loads((tmp_path / "a" / lora.CONFIG).read_text())
    (tmp_path / "a" / lora.CONFIG).write_text(json.dumps(dict(reversed(config.items()))))
    assert lora.content_hash(tmp_path / "a") == adapter.name
