"""From logits to one token a row: penalties, temperature, min-p, top-k, top-p, and a draw. Pure functions.

Two log-probabilities are kept for each token, in nats: *raw* is the model's own, *processed* is that of the
distribution that was sampled. They differ where anything but temperature 1 shaped the draw. A greedy row
(temperature 0) has no distribution; its processed log-probability is that at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from everloop.event import Sampling

NEVER = float("-inf")
COLDEST = 1e-5  # a temperature below it is taken as it, or logits would overflow


def processed(logits: torch.Tensor, rows: Sequence[Sampling], outputs: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probabilities (rows, vocabulary) of what is sampled from, in the order in which vLLM applies things.

    ``logits`` has shape (rows, vocabulary); ``outputs`` are the ids that each row has sampled so far.
    """
    shaped = _penalised(logits.float(), rows, outputs)
    temperatures = [max(row.temperature, COLDEST) if row.temperature else 1.0 for row in rows]
    if any(t != 1.0 for t in temperatures):
        shaped = shaped / torch.tensor(temperatures)[:, None]
    shaped = _min_p(shaped, rows)
    shaped = _top_k(shaped, rows)
    shaped = _top_p(shaped, rows)
    return torch.log_softmax(shaped, dim=-1)


def draw(logprobs: torch.Tensor, rows: Sequence[Sampling], uniforms: Sequence[float]) -> torch.Tensor:
    """One id a row, shape (rows,): the likeliest where greedy, else where ``uniforms`` in [0, 1) fall on the sums.

    A row's draw depends on its own number alone, so that a seeded request gives the same whoever shares the batch.
    """
    likeliest = logprobs.argmax(dim=-1)
    if all(row.temperature == 0 for row in rows):
        return likeliest
    sums = logprobs.double().exp().cumsum(dim=-1)
    at = torch.tensor(uniforms, dtype=torch.float64)[:, None] * sums[:, -1:]
    drawn = torch.searchsorted(sums, at, right=True).squeeze(-1).clamp(max=logprobs.shape[-1] - 1)
    greedy = torch.tensor([row.temperature == 0 for row in rows])
    return torch.where(greedy, likeliest, drawn)


def _penalised(logits: torch.Tensor, rows: Sequence[Sampling], outputs: Sequence[Sequence[int]]) -> torch.Tensor:
    """OpenAI's penalties: frequency times the count of a token in the answer so far, plus presence."""
    chosen = [i for i, row in enumerate(rows) if row.frequency_penalty or row.presence_penalty]
    if not chosen:
        return logits
    logits = logits.clone()
    for i in chosen:
        if not outputs[i]:
            continue
        ids, counts = torch.tensor(outputs[i]).unique(return_counts=True)
        logits[i, ids] -= rows[i].frequency_penalty * counts + rows[i].presence_penalty
    return logits


def _min_p(logits: torch.Tensor, rows: Sequence[Sampling]) -> torch.Tensor:
    """Only tokens with at least ``min_p`` times the likeliest one's probability (arXiv 2407.01082)."""
    if not any(row.min_p for row in rows):
        return logits
    floor = torch.tensor([row.min_p for row in rows]).log()[:, None]
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + floor, NEVER)


def _top_k(logits: torch.Tensor, rows: Sequence[Sampling]) -> torch.Tensor:
    vocabulary = logits.shape[-1]
    kept = [min(row.top_k, vocabulary) if row.top_k > 0 else vocabulary for row in rows]
    if all(k == vocabulary for k in kept):
        return logits
    ordered = logits.sort(dim=-1, descending=True).values
    least = ordered.gather(-1, torch.tensor(kept)[:, None] - 1)
    return logits.masked_fill(logits < least, NEVER)


def _top_p(logits: torch.Tensor, rows: Sequence[Sampling]) -> torch.Tensor:
    """The fewest likeliest tokens whose probabilities sum to ``top_p`` or more (nucleus, arXiv 1904.09751)."""
    if all(row.top_p >= 1 for row in rows):
        return logits
    ordered, ids = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
    top_p = torch.tensor([row.top_p if row.top_p < 1 else 2.0 for row in rows])[:, None]
    outside = before >= top_p
    outside[:, 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, ids, outside), NEVER)
