"""What an engine can serve is said before anything is trained, and asked of every adapter before an engine sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from everloop.config import ServingConfig
from everloop.errors import AdapterRefused, ConfigError

from trainer.policy import servable
from trainer.policy.servable import ALL, Build, Servable

CPU, ACCELERATOR = Build("0.27.1", cpu=True), Build("0.27.1", cpu=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "n_routed_experts": 8}))
    return tmp_path


def adapter(folder: Path, **fields: object) -> Path:
    whole = {"r": 8, "target_modules": ["q_b_proj", "o_proj"], "target_parameters": None, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    return folder


@pytest.mark.parametrize(
    ("serving", "build", "groups"),
    [
        ({"url": "embedded"}, CPU, ALL),
        ({"url": "http://other:8000"}, CPU, ALL),
        ({"url": "http://other:8000", "targets": ["attention"]}, CPU, ("attention",)),
        ({"url": "vllm"}, CPU, ("attention",)),
        ({"url": "vllm"}, ACCELERATOR, ALL),
        ({"url": "vllm", "targets": ["attention", "shared"]}, ACCELERATOR, ("attention", "shared")),
    ],
)
def test_the_engine_and_its_build_say_what_can_be_served(
    base: Path, monkeypatch: pytest.MonkeyPatch, serving: dict[str, object], build: Build, groups: tuple[str, ...]
) -> None:
    monkeypatch.setattr(servable, "installed", lambda: build)
    assert servable.of(ServingConfig.model_validate(serving), lambda: base).groups == groups


def test_the_cpu_build_serves_the_dense_layers_of_a_model_without_experts(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servable, "installed", lambda: CPU)
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert servable.of(ServingConfig(url="vllm"), lambda: base).groups == ("attention", "dense")


def test_targets_are_narrowed_before_training_and_never_to_nothing() -> None:
    can = Servable(("attention",), "it is a small engine")
    assert servable.narrowed(ALL, can) == ("attention",)
    with pytest.raises(ConfigError, match="it is a small engine"):
        servable.narrowed(("experts", "shared"), can)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_parameters": ["mlp.experts.down_proj"]}, r"mlp.experts.down_proj \(experts\).*a small engine"),
        ({"target_parameters": ["mlp.shared_experts.up_proj.weight"]}, r"\(shared\)"),
        ({"target_parameters": ["mlp.gate_proj.weight"]}, r"\(dense\)"),
        ({"target_modules": ["kv_b_proj"]}, "LoRA on kv_b_proj, which"),
        ({"target_modules": "all-linear"}, "by name"),
        ({"r": 64}, "max_lora_rank"),
    ],
)
def test_an_adapter_on_other_weights_is_refused_with_the_reason(
    tmp_path: Path, fields: dict[str, object], said: str
) -> None:
    can = Servable(("attention",), "it is a small engine", rank=32)
    servable.check(adapter(tmp_path), can)
    with pytest.raises(AdapterRefused, match=said):
        servable.check(adapter(tmp_path, **fields), can)


def test_without_vllm_the_configuration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise servable.PackageNotFoundError(name)

    monkeypatch.setattr(servable, "version", missing)
    with pytest.raises(ConfigError, match="make"):
        servable.installed()
