"""LoRA adapters on a policy: attach for training, save under a content hash, check what others wrote, merge to serve.

An adapter is a folder of two files, ``adapter_config.json`` and ``adapter_model.safetensors``, in PEFT's own layout.
Its name everywhere is the hash of their content. For routed experts PEFT keeps one matrix pair for all E experts:
A has shape (E·r, in), B (out, r·E) with the expert index fastest, so that expert e's update is
``B.reshape(out, r, E)[:, :, e] @ A.reshape(E, r, in)[e]``, times alpha/r.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from everloop.errors import AdapterRefused
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.policy import targets
from trainer.policy.base import Policy

if TYPE_CHECKING:  # PEFT takes seconds to import, and an engine that only serves never needs it
    from peft import PeftModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 65_536
FIELDS = ("r", "lora_alpha", "target_modules", "target_parameters", "base_model_name_or_path")
"""What an adapter's configuration says; every other of PEFT's options is off, and refused where it is on."""
HARMLESS = frozenset(
    {
        "inference_mode",
        "init_lora_weights",
        "lora_dropout",
        "peft_version",
        "megatron_core",
        "revision",
        "qalora_group_size",  # PEFT writes it whether use_qalora is on or off; that one is looked at
    }
)
"""Options that change nothing about the weights as they are served."""


@dataclass(frozen=True)
class Slot:
    """One weight that carries LoRA. ``experts`` is 0 for a linear module; ``key`` is its tensors' common name."""

    parameter: str
    key: str
    experts: int
    out_features: int
    in_features: int

    def shapes(self, rank: int) -> dict[str, tuple[int, int]]:
        """Names and shapes of the pair of tensors."""
        copies = max(1, self.experts)
        return {
            f"{self.key}.lora_A.weight": (copies * rank, self.in_features),
            f"{self.key}.lora_B.weight": (self.out_features, rank * copies),
        }

    def delta(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The update of the weight before scaling: (out, in), or (experts, out, in)."""
        if not self.experts:
            return b @ a
        per_expert = a.reshape(self.experts, -1, self.in_features)
        return b.reshape(self.out_features, -1, self.experts).permute(2, 0, 1) @ per_expert


def attach(
    policy: Policy,
    rank: int,
    alpha: float,
    groups: Sequence[str] = targets.GROUPS,
    parent: Path | None = None,
    *,
    seed: int = 0,
) -> PeftModel:
    """A trainable copy of the policy's model: base weights shared and frozen, LoRA weights its own.

    ``parent`` is the folder of an adapter to continue from: its rank, alpha and targets then hold instead of the
    arguments. Raises AdapterRefused where the parent does not fit the policy.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    if parent is not None:
        check(parent, policy)
        fields = _read_config(parent)
    else:
        fields = {"r": rank, "lora_alpha": alpha, **policy.lora_targets(groups)}
    config = LoraConfig(
        r=fields["r"],
        lora_alpha=fields["lora_alpha"],
        target_modules=fields["target_modules"],
        target_parameters=fields["target_parameters"],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(_sharing(policy.model), config)
    model.peft_config["default"].base_model_name_or_path = policy.identity  # PEFT put the folder there
    if parent is not None:
        set_peft_model_state_dict(model, load_file(parent / WEIGHTS))
    return model


def check_continues(parent: Path, policy: Policy, rank: int, alpha: float, groups: Sequence[str]) -> None:
    """Raise AdapterRefused unless an adapter has this rank, alpha and targets: training goes on in its matrices."""
    fields = _read_config(parent)
    asked = {"r": rank, "lora_alpha": alpha, **policy.lora_targets(groups)}
    for name, wanted in asked.items():
        if (fields[name] or []) != (wanted or []):
            raise AdapterRefused(
                f"the recipe's adapter differs from its parent {parent.name}: {name} is {fields[name]!r} there, and "
                f"{wanted!r} is asked for. Give the recipe the parent's, or roll back to the base and begin anew"
            )


def save(model: PeftModel, folder: Path) -> str:
    """Write the adapter as ``folder/<its content hash>`` and return the hash; whole or not at all."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    fields = {name: getattr(config, name) for name in FIELDS}
    for name in ("target_modules", "target_parameters"):
        fields[name] = sorted(fields[name]) if isinstance(fields[name], set | list) else fields[name]
    tensors = {
        k: v.detach().cpu().contiguous().clone()
        for k, v in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    making = Path(tempfile.mkdtemp(dir=folder, prefix=".making-"))
    try:
        whole = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True, **fields}
        (making / CONFIG).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
        save_file(dict(sorted(tensors.items())), making / WEIGHTS)
        _sync(making)
        name = content_hash(making)
        if not (folder / name).exists():
            making.chmod(0o755)
            os.replace(making, folder / name)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return name


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def content_hash(folder: Path) -> str:
    """32 hex digits of SHA-256 over the configuration (as canonical JSON) and the bytes of the weights."""
    config = json.loads((folder / CONFIG).read_bytes())
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    with (folder / WEIGHTS).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def check(folder: Path, policy: Policy, expected_hash: str | None = None) -> None:
    """Raise AdapterRefused unless the folder is a whole, finite adapter of exactly this policy's base.

    ``expected_hash``: the content hash that the adapter is known by.
    """
    check_files(folder)
    fields = _read_config(folder)
    if fields["base_model_name_or_path"] != policy.identity:
        raise AdapterRefused(
            f"the adapter in {folder} belongs to base {fields['base_model_name_or_path']!r}, not to "
            f"{policy.identity!r}: where it was trained on these very weights, say so in its {CONFIG}, as "
            "base_model_name_or_path"
        )
    expected: dict[str, tuple[int, int]] = {}
    for slot in slots(policy.model, fields):
        expected |= slot.shapes(fields["r"])
    _check_tensors(folder / WEIGHTS, expected)
    if expected_hash is not None and (found := content_hash(folder)) != expected_hash:
        raise AdapterRefused(f"the adapter in {folder} has hash {found}, not {expected_hash}: its files were changed")


def base_of(folder: Path) -> str:
    """The identity of the base that an adapter says it belongs to. Raises AdapterRefused."""
    check_files(folder)
    return str(_read_config(folder)["base_model_name_or_path"])


def merged(policy: Policy, folder: Path) -> nn.Module:
    """The policy's model with an adapter's updates added to its weights; everything else is shared with the base."""
    fields = _read_config(folder)
    tensors = load_file(folder / WEIGHTS)
    model = _sharing(policy.model)
    scaling = fields["lora_alpha"] / fields["r"]
    for slot in slots(policy.model, fields):
        a, b = (tensors[name].float() for name in slot.shapes(fields["r"]))
        weight = model.get_parameter(slot.parameter)
        owner, _, name = slot.parameter.rpartition(".")
        updated = (weight.float() + scaling * slot.delta(a, b)).to(weight.dtype)
        setattr(model.get_submodule(owner), name, nn.Parameter(updated, requires_grad=False))
    return model


def slots(model: nn.Module, fields: dict[str, Any]) -> list[Slot]:
    """The weights that a configuration targets, as PEFT matches them. Raises AdapterRefused where it has none."""
    modules, parameters = fields["target_modules"], fields["target_parameters"]
    found = []
    for name, weight in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and isinstance(model.get_submodule(module), nn.Linear):
            if _ends(module, modules) or _ends(name, parameters):
                found.append(Slot(name, PREFIX + module, 0, *weight.shape))
        elif weight.dim() == 3 and _ends(name, parameters):
            found.append(Slot(name, PREFIX + _wrapper(module, leaf, parameters), *weight.shape))
    if not found:
        raise AdapterRefused("the adapter targets no weights of this base model")
    return found


def _ends(name: str, wanted: Sequence[str]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def _wrapper(module: str, leaf: str, parameters: Sequence[str]) -> str:
    """PEFT nests the wrappers of one module's parameters: the first one lies innermost, as ``base_layer``."""
    both = all(_ends(f"{module}.{one}", parameters) for one in ("gate_up_proj", "down_proj"))
    return f"{module}.base_layer" if both and leaf == "gate_up_proj" else module


def _sharing(model: nn.Module) -> Any:
    """A copy of the modules that holds the very same parameters and buffers."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo)


def check_files(folder: Path) -> None:
    """Raise AdapterRefused unless the folder has the two plain files of an adapter, and nothing else."""
    if not folder.is_dir():
        raise AdapterRefused(f"there is no adapter folder {folder}")
    names = sorted(path.name for path in folder.iterdir())
    if names != [CONFIG, WEIGHTS]:
        raise AdapterRefused(
            f"{folder} holds {', '.join(names) or 'nothing'}; an adapter is {CONFIG} and {WEIGHTS} alone"
        )
    for name in names:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise AdapterRefused(f"{path} is not a plain file")
    if (folder / CONFIG).stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterRefused(f"{folder / CONFIG} is larger than {MAX_CONFIG_BYTES} bytes")


def _read_config(folder: Path) -> dict[str, Any]:
    """The five fields that matter. Raises AdapterRefused for a broken file, or an option that serving does not do."""
    try:
        whole = json.loads((folder / CONFIG).read_bytes())
        fields = {name: whole[name] for name in FIELDS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterRefused(f"{folder / CONFIG} is not a LoRA configuration: {error!r}") from None
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    for name, value in whole.items():
        if name in FIELDS or not value or name in HARMLESS:
            continue
        if plain.get(name) != value:
            raise AdapterRefused(f"{folder / CONFIG}: option {name}={value!r} is not served; train without it")
    _check_values(folder, fields)
    return fields


def _check_values(folder: Path, fields: dict[str, Any]) -> None:
    rank, alpha, modules, parameters = (fields[name] for name in FIELDS[:4])
    if type(rank) is not int or not 1 <= rank <= 1024:
        raise AdapterRefused(f"{folder / CONFIG}: rank {rank!r} is not a whole number from 1 to 1024")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e6:
        raise AdapterRefused(f"{folder / CONFIG}: lora_alpha {alpha!r} is not a positive number")
    fields["target_modules"] = modules if modules is not None else []
    fields["target_parameters"] = parameters or []
    for name in ("target_modules", "target_parameters"):
        value = fields[name]
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise AdapterRefused(f"{folder / CONFIG}: {name} is {value!r}, not a list of names")


def _check_tensors(path: Path, expected: dict[str, tuple[int, int]]) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                odd = sorted(names ^ set(expected))[0]
                raise AdapterRefused(f"{path}: tensor {odd} is {'not expected' if odd in names else 'missing'}")
            for name, shape in expected.items():
                tensor = file.get_tensor(name)
                if tuple(tensor.shape) != shape:
                    raise AdapterRefused(f"{path}: {name} has shape {tuple(tensor.shape)}, not {shape}")
                if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                    raise AdapterRefused(f"{path}: {name} holds values that are not finite numbers")
    except (SafetensorError, OSError) as error:
        raise AdapterRefused(f"{path} is not a whole safetensors file: {error}") from None
