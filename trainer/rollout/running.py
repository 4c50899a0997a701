"""Answers that one model decodes together: a batch that answers join and leave at every token.

Rows are padded on the left, so that all end at the same column: the newest token of every row is the last one.
``mask`` is False on padding. A prompt is run once, however many answers are sampled from it.

::

    column      0    1    2    3    4          admit: prefill new prompts, pad both to one width, stack
    row 0            a    b    c    d   ──▶    step:  draw a token a row from ``logits``, let finished rows
    row 1       p    q    r    s    t                 leave, run the rest to get the next ``logits``
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from everloop.errors import ConfigError
from everloop.event import Sampling
from torch import nn
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from trainer.rollout import sampling as maths

SLACK = 32  # columns of room that a cache grows by, beyond half of what it holds


@dataclass
class Answer:
    """One answer in the making.

    ``finish`` is None until it is "stop" (an end token or a stop string), "length", or "broken" (the model's output
    is not finite).
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    stop_ids: frozenset[int]
    chance: random.Random
    top: int = 0  # how many alternatives to note for each token
    stopped: Callable[[int], bool] | None = None  # whether this token completes a stop string
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: str | None = None

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer, at most."""
        return len(self.prompt) + self.max_tokens

    def take(self, token: int, logprob: float, raw: float) -> None:
        """Note a sampled token, and whether it was the last."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.raw_logprobs.append(raw)
        ends = token in self.stop_ids
        if not math.isfinite(raw):
            self.finish = "broken"
        elif ends or (self.stopped is not None and self.stopped(token)):
            self.finish = "stop"
        elif len(self.ids) >= self.max_tokens:
            self.finish = "length"


class _Room(DynamicLayer):
    """Keys and values of one layer in a buffer with room to grow, so that a token does not copy all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.room: list[torch.Tensor] = []

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Start over from these, (rows, heads, columns, features) each."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.room = [keys, values]
        self.keys, self.values = keys, values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        if not self.is_initialized:
            self.fill(key_states, value_states)
            return self.keys, self.values
        held = self.keys.shape[-2]
        end = held + key_states.shape[-2]
        if end > self.room[0].shape[-2]:
            more = end - self.room[0].shape[-2] + held // 2 + SLACK
            self.room = [functional.pad(one[..., :held, :], (0, 0, 0, more)) for one in self.room]
        for one, new in zip(self.room, (key_states, value_states), strict=True):
            one[..., held:end, :] = new
        self.keys, self.values = (one[..., :end, :] for one in self.room)
        return self.keys, self.values


class Running:
    """The answers that one module is decoding. Not thread-safe."""

    def __init__(self, module: nn.Module, pad_id: int = 0, prefill_tokens: int = 8192) -> None:
        self.module = module
        self.pad_id = pad_id
        self.prefill_tokens = prefill_tokens
        self.answers: list[Answer] = []
        self._cache: Cache | None = None
        self._mask = torch.zeros(0, 0, dtype=torch.bool)
        self._logits = torch.zeros(0, 0)

    def __len__(self) -> int:
        return len(self.answers)

    @torch.no_grad()
    def admit(self, answers: Sequence[Answer]) -> None:
        """Take in answers with their prompts; equal prompts are run once. Long ones are run a few at a time."""
        by_prompt: dict[tuple[int, ...], list[Answer]] = {}
        for answer in answers:
            by_prompt.setdefault(answer.prompt, []).append(answer)
        prompts = sorted(by_prompt, key=len)
        while prompts:
            count = max(1, self.prefill_tokens // len(prompts[-1]))
            now, prompts = prompts[-count:], prompts[:-count]
            self._prefill(now, [by_prompt[prompt] for prompt in now])

    def _prefill(self, prompts: list[tuple[int, ...]], answers: list[list[Answer]]) -> None:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[self.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = torch.arange(width) >= width - lengths[:, None]
        cache = Cache(layers=[_Room() for _ in range(self.module.config.num_hidden_layers)])
        logits = self._run(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        rows = torch.tensor([i for i, its in enumerate(answers) for _ in its])
        if len(rows) != len(prompts):
            cache, mask, logits = _rows_of(cache, rows), mask[rows], logits[rows]
        self._join(cache, mask, logits)
        self.answers += [answer for its in answers for answer in its]

    def _join(self, cache: Cache, mask: torch.Tensor, logits: torch.Tensor) -> None:
        if self._cache is None:
            self._cache, self._mask, self._logits = cache, mask, logits
            return
        width = max(mask.shape[1], self._mask.shape[1])
        for held, new in zip(self._cache.layers, cache.layers, strict=True):
            both = ((held.keys, new.keys), (held.values, new.values))
            held.fill(*(torch.cat([_widened(one, width) for one in pair]) for pair in both))
        masks = [functional.pad(one, (width - one.shape[1], 0)) for one in (self._mask, mask)]
        self._mask = torch.cat(masks)
        self._logits = torch.cat([self._logits, logits])

    @torch.no_grad()
    def step(self) -> list[Answer]:
        """One more token for every answer; returns the answers that took one (finished ones have left)."""
        took = list(self.answers)
        if not took:
            return took
        tokens = self._sample()
        keep = [i for i, answer in enumerate(took) if answer.finish is None]
        self._keep(keep)
        if keep:
            assert self._cache is not None
            self._mask = functional.pad(self._mask, (0, 1), value=True)
            positions = self._mask.sum(-1, keepdim=True) - 1
            self._logits = self._run(tokens[keep][:, None], self._mask, positions, self._cache)
        return took

    def _sample(self) -> torch.Tensor:
        rows = [answer.sampling for answer in self.answers]
        logprobs = maths.processed(self._logits, rows, [answer.ids for answer in self.answers])
        raw = torch.log_softmax(self._logits.float(), dim=-1)
        tokens = maths.draw(logprobs, rows, [answer.chance.random() for answer in self.answers])
        chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1).tolist()
        own = raw.gather(-1, tokens[:, None]).squeeze(-1).tolist()
        for i, (answer, token) in enumerate(zip(self.answers, tokens.tolist(), strict=True)):
            answer.take(token, chosen[i], own[i])
            if answer.top:
                best = logprobs[i].topk(min(answer.top, logprobs.shape[-1]))
                answer.alternatives.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        return tokens

    def leave(self, gone: Sequence[Answer]) -> None:
        """Let cancelled answers go now."""
        ids = {id(answer) for answer in gone}
        self._keep([i for i, answer in enumerate(self.answers) if id(answer) not in ids])

    def _keep(self, rows: list[int]) -> None:
        if len(rows) == len(self.answers):
            return
        self.answers = [self.answers[i] for i in rows]
        if not rows:
            self._cache = None
            return
        assert self._cache is not None
        chosen = torch.tensor(rows)
        mask = self._mask[chosen]
        start = int(mask.any(dim=0).to(torch.int8).argmax())  # columns that are padding in all rows that stay
        self._cache = _rows_of(self._cache, chosen, start)
        self._mask, self._logits = mask[:, start:], self._logits[chosen]

    def _run(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
        """The logits after the last column, (rows, vocabulary)."""
        out = self.module(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = out.logits[:, -1]
        return logits


def _rows_of(cache: Cache, rows: torch.Tensor, start: int = 0) -> Cache:
    for layer in cache.layers:
        layer.fill(layer.keys[rows, :, start:], layer.values[rows, :, start:])
    return cache


def _widened(states: torch.Tensor, width: int) -> torch.Tensor:
    return functional.pad(states, (0, 0, width - states.shape[-2], 0))


def check_decodable(config: Any) -> None:
    """Raises ConfigError for a model whose layers keep less than all keys: such a batch cannot be re-stacked."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(
            f"{config.model_type}: the embedded engine decodes full attention alone, this model has "
            f"{', '.join(sorted(kinds))}; serve it with vLLM (serving.url)"
        )
