"""The engine of one machine: torch and PEFT, in this process.

Rows are token trees (:mod:`trainer.packing`), so a prompt goes through the model once for all answers to it, and the
output layer sees only the tokens that predict an answer. Rollouts come from the merged weights: the very numbers that
serving would give. The value head is linear in the last hidden state and sends no gradient back into the policy.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from everloop.errors import ConfigError, EverloopError
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer import packing
from trainer.engine import Estimates, Group, Objective, Outputs
from trainer.packing import Packed
from trainer.policy import lora
from trainer.policy.base import Policy
from trainer.sampling import Rollout, Sampling, rollouts

STATE = "engine.pt"
CACHED_TREES = 65_536


class TrainingDiverged(EverloopError):
    """Loss or gradient is not a finite number: the learning rate is too high, or a reward is broken."""


@dataclass(frozen=True)
class EngineSettings:
    """``tokens`` bounds the padded tokens of one forward; ``head_rate`` is the value head's own learning rate."""

    rank: int = 32
    alpha: float = 64
    targets: tuple[str, ...] = ("attention", "dense", "shared", "experts")
    learning_rate: float = 2e-3
    head_rate: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    tokens: int = 8192


class TorchEngine:
    """See :class:`trainer.engine.Engine`.

    Args:
        policy: the base model; its own weights are shared and never changed.
        parent: folder of the adapter that training continues from; None: a new one, drawn from ``seed``.
        value_head: file of the value head that belongs to the parent; None, or gone: a new one.
    """

    def __init__(
        self,
        policy: Policy,
        settings: EngineSettings,
        *,
        parent: Path | None = None,
        value_head: Path | None = None,
        seed: int = 0,
    ) -> None:
        _check_output_layer(policy)
        if parent is not None:
            lora.check(parent, policy)
            lora.check_continues(parent, policy, settings.rank, settings.alpha, settings.targets)
        self._policy = policy
        self._settings = settings
        self._model = lora.attach(policy, settings.rank, settings.alpha, list(settings.targets), parent, seed=seed)
        self._inner = self._model.get_base_model()
        self._head = _new_head(policy, value_head)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": self._parameters, "lr": settings.learning_rate, "full": settings.learning_rate},
                {"params": list(self._head.parameters()), "lr": settings.head_rate, "full": settings.head_rate},
            ],
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self._trees: dict[int, tuple[Group, packing.Tree]] = {}

    def rollouts(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Rollout]]:
        with tempfile.TemporaryDirectory(prefix="everloop-rollout-") as scratch:
            name = self.save_adapter(Path(scratch))
            model: Any = lora.merged(self._policy, Path(scratch) / name)
        return rollouts(model, prompts, sampling, stop_ids=self._policy.stop_ids, seed=seed)

    @torch.no_grad()
    def estimates(self, groups: Sequence[Group]) -> Estimates:
        own: list[NDArray[np.float32]] = []
        base: list[NDArray[np.float32]] = []
        values: list[NDArray[np.float32]] = []
        order = sorted(range(len(groups)), key=lambda i: len(self._tree(groups[i])))
        for part, _ in self._parts([groups[i] for i in order]):
            outputs = self._forward(part)
            own += _unpadded(outputs)
            values.append(outputs.values.numpy())
            base += _unpadded(self._forward(part, base=True))
        back = _back_in_order(groups, order)
        joined = np.concatenate(values) if values else np.zeros(0, np.float32)
        return Estimates([own[i] for i in back], [base[i] for i in back], joined[back])

    def step(self, groups: Sequence[Group], objective: Objective, rate: float) -> dict[str, float]:
        self._optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = defaultdict(float)
        for part, which in self._parts(groups):
            outputs = self._forward(part)
            loss = objective(outputs, which)
            loss.value.backward()  # type: ignore[no-untyped-call]
            for name, metric in loss.metrics.items():
                share = 1.0 if name == "loss" else (which.stop - which.start) / sum(map(len, groups))
                sums[name] += share * float(metric.detach())
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._settings.clip_norm))
        nn.utils.clip_grad_norm_(self._head.parameters(), self._settings.clip_norm)
        if not np.isfinite(norm) or not np.isfinite(sums["loss"]):
            raise TrainingDiverged(
                f"loss {sums['loss']} with gradient norm {norm}: lower the recipe's learning_rate, or look for a "
                "reward that is not finite"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = group["full"] * rate
        self._optimizer.step()
        return {**sums, "grad_norm": norm}

    def save_adapter(self, folder: Path) -> str:
        return lora.save(self._model, folder)

    def save_state(self, folder: Path) -> None:
        state = {
            "parameters": [p.detach() for p in self._parameters],
            "head": self._head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(state, folder / STATE)

    def load_state(self, folder: Path) -> None:
        state = torch.load(folder / STATE, weights_only=True)
        with torch.no_grad():
            for parameter, saved in zip(self._parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self._head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])

    def save_value_head(self, path: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self._head.state_dict().items()}, path)

    def _tree(self, group: Group) -> packing.Tree:
        """The tree of a group, made once: the same groups come back every epoch."""
        held = self._trees.get(id(group))
        if held is None or held[0] is not group:
            if len(self._trees) > CACHED_TREES:
                self._trees.clear()
            held = self._trees[id(group)] = (group, packing.tree(group))
        return held[1]

    def _parts(self, groups: Sequence[Group]) -> Iterator[tuple[Sequence[Group], slice]]:
        """Groups in order, in parts of at most ``tokens`` padded tokens, each with the slice of its samples."""
        start, first, longest = 0, 0, 0
        for i, group in enumerate(groups):
            grown = max(longest, len(self._tree(group)))
            if i > start and grown * (i + 1 - start) > self._settings.tokens:
                count = sum(map(len, groups[start:i]))
                yield groups[start:i], slice(first, first + count)
                start, first, grown = i, first + count, len(self._tree(group))
            longest = grown
        if start < len(groups):
            yield groups[start:], slice(first, first + sum(map(len, groups[start:])))

    def _forward(self, groups: Sequence[Group], *, base: bool = False) -> Outputs:
        packed = packing.pack(groups, [self._tree(group) for group in groups])
        with self._model.disable_adapter() if base else nullcontext():
            hidden = self._inner.model(
                input_ids=packed.ids, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
            ).last_hidden_state
        flat = hidden.reshape(-1, hidden.shape[-1])
        values = self._head(flat[packed.at[:, 0]].detach().float()).squeeze(-1)
        return Outputs(_logprobs(flat, self._inner.get_output_embeddings(), packed), values, packed.present)


def _logprobs(flat: Tensor, output_layer: nn.Module, packed: Packed) -> Tensor:
    """(samples, tokens): siblings are predicted by the same nodes, which the output layer reads once."""
    scales, scale_of = torch.unique(packed.temperatures, return_inverse=True)
    pairs = packed.at * len(scales) + scale_of[:, None]
    nodes, inverse = torch.unique(pairs[packed.present], return_inverse=True)
    logits = output_layer(flat[nodes // len(scales)]).float() / scales[nodes % len(scales), None]
    chosen = torch.log_softmax(logits, dim=-1)[inverse, packed.targets[packed.present]]
    return torch.zeros(packed.at.shape, dtype=chosen.dtype).masked_scatter(packed.present, chosen)


def _unpadded(outputs: Outputs) -> list[NDArray[np.float32]]:
    lengths = outputs.present.sum(1).tolist()
    return [row[:length].numpy() for row, length in zip(outputs.logprobs, lengths, strict=True)]


def _back_in_order(groups: Sequence[Group], order: Sequence[int]) -> NDArray[np.int64]:
    """Where each sample of ``groups`` stands once the groups were put in ``order``."""
    starts = np.cumsum([0, *(len(groups[i]) for i in order)])
    start_of = {i: int(starts[place]) for place, i in enumerate(order)}
    places = [start_of[i] + j for i, group in enumerate(groups) for j in range(len(group))]
    return np.asarray(places, dtype=np.int64)


def _new_head(policy: Policy, saved: Path | None) -> nn.Linear:
    head = nn.Linear(policy.model.config.hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if saved is not None and saved.exists():
        head.load_state_dict(load_file(saved))
    return head


def _check_output_layer(policy: Policy) -> None:
    """The engine applies the output layer itself; a model that does more than that after it cannot be trained here."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(policy.model.config, name, None) not in (None, 1, 1.0):
            raise ConfigError(f"{policy.name} changes its logits by {name}, which this engine does not do: use another")
