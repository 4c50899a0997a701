"""Which weights of an architecture carry LoRA, by group: attention, dense and shared MLPs, routed experts.

``kv_b_proj`` is never a target: vLLM's latent attention ignores an adapter on it silently. In a mixture of experts
the MLPs are named as parameters, not as modules: PEFT takes any module called ``gate_proj`` of such an architecture
for an expert of its older layout, doubles the rank of the fused experts, and drops the dense and shared MLPs. The
tensors of an adapter are the same either way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from everloop.errors import ConfigError
from torch import nn

from trainer.policy.servable import ALL, ATTENTION, MLP

GROUPS = ALL
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def of(model: nn.Module, groups: Sequence[str] = GROUPS) -> dict[str, Any]:
    """``target_modules`` and ``target_parameters`` for PEFT; groups that this architecture lacks are left out.

    Raises ConfigError for a group that is not known, or where nothing is left to train.
    """
    unknown = sorted(set(groups) - set(GROUPS))
    if unknown:
        raise ConfigError(f"LoRA target {unknown[0]!r} is not known; known: {', '.join(GROUPS)}")
    names = [name for name, _ in model.named_parameters()]
    routed = any(name.endswith(_EXPERTS) for name in names)
    modules = list(ATTENTION) if "attention" in groups else []
    modules += list(MLP) if "dense" in groups and not routed else []
    parameters = [f"mlp.{leaf}.weight" for leaf in MLP if "dense" in groups and routed]
    parameters += [f"mlp.shared_experts.{leaf}.weight" for leaf in MLP if "shared" in groups]
    parameters += [leaf for leaf in _EXPERTS if "experts" in groups]
    modules = [one for one in modules if any(re.search(rf"\.{one}\.weight$", name) for name in names)]
    parameters = [one for one in parameters if any(name.endswith(f".{one}") for name in names)]
    if not modules and not parameters:
        raise ConfigError(f"{type(model).__name__} has no weights in the LoRA targets {', '.join(groups)}")
    return {"target_modules": sorted(modules), "target_parameters": sorted(parameters) or None}
