"""How far an adapter has moved its policy from the base: the exact KL divergence at given answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from trainer.policy.base import Policy
from trainer.policy.lora import merged

ROWS = 16  # of one forward pass


@torch.inference_mode()
def kl_to_base(policy: Policy, folder: Path, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """For each (prompt ids, answer ids): KL(adapter || base) in nats a token, over the whole vocabulary, averaged
    over the answer's positions. nan where an answer is empty. Raises AdapterRefused where the files do not fit.
    """
    model = merged(policy, folder)
    distances = [float("nan")] * len(rows)
    # Rows of like length together, so that little of a batch is padding.
    order = sorted((i for i, row in enumerate(rows) if row[1]), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        for index, distance in zip(chosen, _batch(policy, model, [rows[i] for i in chosen]), strict=True):
            distances[index] = distance
    return distances


def _batch(policy: Policy, model: nn.Module, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), policy.end_id)
    mask = torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        mask[i, : len(prompt) + len(answer)] = 1
    own, base = (
        functional.log_softmax(each(input_ids=ids, attention_mask=mask, use_cache=False).logits.float(), dim=-1)
        for each in (model, policy.model)
    )
    kl = (own.exp() * (own - base)).sum(-1)
    # The distribution of a token stands one position before it.
    spans = [(len(prompt) - 1, len(prompt) + len(answer) - 1) for prompt, answer in rows]
    return [float(kl[i, start:end].mean()) for i, (start, end) in enumerate(spans)]
