"""Many answers to each of many prompts, from one policy: the sampler of training, and of whatever measures a policy.

Serving (:mod:`trainer.rollout`) answers requests as they come; training wants a few answers of a thousand prompts at
once. Each prompt is read once, and samples that agree so far go through the model as one: the work grows with the
*distinct* answers. What a token's log-probability is, both ask the same function. Every sample draws from its own
stream of random numbers, so what it says does not depend on what it is batched with, and it can be repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from everloop import event
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trainer.rollout.sampling import processed

PROMPTS_AT_ONCE = 128


@dataclass(frozen=True)
class Rollout:
    """A distinct answer to one prompt, and how often it was sampled.

    ``logprobs`` (tokens,) are of the distribution that was sampled, in nats. ``finished`` is False where the
    answer was cut at the longest length.
    """

    completion: tuple[int, ...]
    logprobs: NDArray[np.float32]
    count: int
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """``samples`` answers a prompt, of at most ``max_tokens`` tokens; nothing is truncated, so the support is known.

    ``temperature`` 0 is greedy: all samples are the likeliest answer, with its log-probabilities at temperature 1.
    """

    samples: int
    max_tokens: int
    temperature: float = 1.0


@dataclass
class _Branch:
    """Samples of one prompt that have said the same so far. ``members`` index the prompt's random streams."""

    prompt: int
    members: NDArray[np.int64]
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()

    def rollout(self, *, finished: bool) -> Rollout:
        return Rollout(self.tokens, np.asarray(self.logprobs, np.float32), len(self.members), finished)


def rollouts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: frozenset[int],
    seed: int,
) -> list[list[Rollout]]:
    """Distinct answers of each prompt, in the order of ``prompts``, the most frequent first."""
    made: list[list[Rollout]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with torch.inference_mode():
        for start in range(0, len(order), PROMPTS_AT_ONCE):
            part = order[start : start + PROMPTS_AT_ONCE]
            streams = [np.random.default_rng([seed, i]).random((sampling.samples, sampling.max_tokens)) for i in part]
            found = _sample([prompts[i] for i in part], streams, model, sampling, stop_ids)
            for at, rollout in found:
                made[part[at]].append(rollout)
    return [sorted(one, key=lambda r: (-r.count, r.completion)) for one in made]


def _sample(
    prompts: Sequence[Sequence[int]],
    streams: Sequence[NDArray[np.float64]],
    model: PreTrainedModel,
    sampling: Sampling,
    stop_ids: frozenset[int],
) -> Iterator[tuple[int, Rollout]]:
    """(prompt, rollout) pairs of one batch, as they end."""
    ids, mask = _left_padded(prompts)
    cache = DynamicCache(config=model.config)
    branches = [_Branch(i, np.arange(sampling.samples)) for i in range(len(prompts))]
    for step in range(sampling.max_tokens):
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        logprobs = processed(logits, [event.Sampling(temperature=sampling.temperature)] * len(branches), ()).numpy()
        chances = _certain(logprobs) if sampling.temperature == 0 else np.exp(logprobs, dtype=np.float64)
        parents, grown = _grow(branches, logprobs, chances.cumsum(1), streams, step)
        yield from ((b.prompt, b.rollout(finished=True)) for b in grown if b.tokens[-1] in stop_ids)
        kept = [i for i, b in enumerate(grown) if b.tokens[-1] not in stop_ids]
        branches = [grown[i] for i in kept]
        if not branches:
            return
        rows = torch.tensor([parents[i] for i in kept])
        cache.reorder_cache(rows)
        mask = torch.cat([mask[rows], mask.new_ones(len(rows), 1)], dim=1)
        ids = torch.tensor([[b.tokens[-1]] for b in branches])
    yield from ((b.prompt, b.rollout(finished=False)) for b in branches)


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _certain(logprobs: NDArray[np.float32]) -> NDArray[np.float64]:
    """All probability on the likeliest token of each row."""
    chances = np.zeros(logprobs.shape)
    np.put_along_axis(chances, logprobs.argmax(axis=1, keepdims=True), 1.0, axis=1)
    return chances


def _grow(
    branches: Sequence[_Branch],
    logprobs: NDArray[np.float32],
    cumulative: NDArray[np.float64],
    streams: Sequence[NDArray[np.float64]],
    step: int,
) -> tuple[list[int], list[_Branch]]:
    """Draw the next token of every sample; (row that it grew from, branch), one for each distinct token."""
    parents, grown = [], []
    for row, branch in enumerate(branches):
        drawn = streams[branch.prompt][branch.members, step] * cumulative[row, -1]
        tokens = np.searchsorted(cumulative[row], drawn, side="right")
        for token in np.unique(tokens):
            parents.append(row)
            grown.append(
                _Branch(
                    branch.prompt,
                    branch.members[tokens == token],
                    (*branch.tokens, int(token)),
                    (*branch.logprobs, float(logprobs[row, token])),
                )
            )
    return parents, grown
