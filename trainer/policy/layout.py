"""An adapter as vLLM reads it: the trainer's files are PEFT's, which keeps one matrix pair for all routed experts.

====================  ===========================================================  ===========================
weight                PEFT                                                         vLLM
====================  ===========================================================  ===========================
attention             ``…q_a_proj.lora_A``, named as a module                      the same
dense, shared MLPs    the same tensors, named as parameters (``targets.py``)       the same, named as modules
routed experts        ``…experts.base_layer`` (gate and up) and ``…experts``       a pair for each expert and
                      (down): A is (E·r, in), B (out, r·E), expert index fastest   each of gate, up, down
====================  ===========================================================  ===========================

Gate and up of an expert share their A, and split B in halves. The deltas are the same to the last bit or two.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.policy.lora import CONFIG, WEIGHTS

A, B = ".lora_A.weight", ".lora_B.weight"
INNER = ".base_layer"  # PEFT nests the wrappers of one module's parameters: gate and up lie within down


def for_vllm(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """An adapter's tensors under vLLM's names."""
    made: dict[str, Tensor] = {}
    for key in sorted(name.removesuffix(A) for name in tensors if name.endswith(A)):
        a, b = tensors[key + A], tensors[key + B]
        routed = key.removesuffix(INNER).endswith(".experts")
        made |= _experts(key, a, b, rank) if routed else {key + A: a, key + B: b}
    return made


def config_for_vllm(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration that belongs to :func:`for_vllm`'s tensors: every target is a module, by its last name."""
    leaves = {name.removesuffix(A).rpartition(".")[2] for name in tensors if name.endswith(A)}
    return {**fields, "target_modules": sorted(leaves), "target_parameters": None}


def converted(adapter: Path, below: Path) -> Path:
    """The folder that vLLM is to load: the adapter's own where both layouts are one, else ``below/<its name>``."""
    fields = json.loads((adapter / CONFIG).read_bytes())
    folder = below / adapter.name
    if not fields.get("target_parameters"):
        return adapter
    if not folder.exists():
        tensors = for_vllm(load_file(adapter / WEIGHTS), fields["r"])
        below.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=below, prefix=".making-"))
        try:
            save_file(tensors, making / WEIGHTS)
            (making / CONFIG).write_text(json.dumps(config_for_vllm(fields, tensors)))
            os.replace(making, folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return folder


def _experts(key: str, a: Tensor, b: Tensor, rank: int) -> dict[str, Tensor]:
    count = len(a) // rank
    own_a = a.reshape(count, rank, -1)
    own_b = b.reshape(len(b), rank, count).permute(2, 0, 1)
    if key.endswith(INNER):
        gate, up = own_b.chunk(2, dim=1)
        parts = {"gate_proj": gate, "up_proj": up}
    else:
        parts = {"down_proj": own_b}
    return {
        f"{key.removesuffix(INNER)}.{expert}.{leaf}{end}": matrix[expert].contiguous().clone()
        for leaf, part in parts.items()
        for expert in range(count)
        for end, matrix in ((A, own_a), (B, part))
    }
