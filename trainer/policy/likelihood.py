"""How probable given answers are under a policy: what the trainer's and the server's samplers would have said."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.packing import Sample
from trainer.policy.base import Policy
from trainer.rollout.sampling import COLDEST

TOKENS = 4096  # padded, of one forward pass


def _silent(done: int, of: int) -> None:
    """For whoever needs no progress."""


@torch.inference_mode()
def log_likelihoods(
    policy: Policy, model: torch.nn.Module, samples: Sequence[Sample], told: Callable[[int, int], None] = _silent
) -> list[float]:
    """For each sample the log-probability of its whole completion at its temperature, in nats; 0 of an empty one.

    ``model`` is the policy's own, or one with an adapter merged into it. ``told`` is given how many of how many are
    done. Nothing but temperature shapes the distribution: samples of a truncated one have no place here.
    """
    found = [0.0] * len(samples)
    # Rows of like length together, so that little of a batch is padding.
    order = sorted((i for i, one in enumerate(samples) if one.completion), key=lambda i: _length(samples[i]))
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and _length(samples[order[end]]) * (end + 1 - start) <= TOKENS:
            end += 1
        part = order[start:end]
        for index, total in zip(part, _batch(policy, model, [samples[i] for i in part]), strict=True):
            found[index] = total
        start = end
        told(end, len(order))
    return found


def _length(sample: Sample) -> int:
    return len(sample.prompt) + len(sample.completion)


def _batch(policy: Policy, model: torch.nn.Module, rows: Sequence[Sample]) -> list[float]:
    """Padded on the left, so that the answers end together and only their positions reach the output layer."""
    width, longest = max(map(_length, rows)), max(len(row.completion) for row in rows)
    ids = torch.full((len(rows), width), policy.pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - _length(row) :] = torch.tensor([*row.prompt, *row.completion])
        mask[i, width - _length(row) :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits: Tensor = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=longest + 1
    ).logits[:, :-1]
    scales = torch.tensor([max(row.temperature, COLDEST) for row in rows])[:, None, None]
    chosen = torch.log_softmax(logits.float() / scales, dim=-1).gather(2, ids[:, -longest:, None]).squeeze(-1)
    return [float(chosen[i, longest - len(row.completion) :].double().sum()) for i, row in enumerate(rows)]
