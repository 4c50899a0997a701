"""Rollouts in bulk: many prompts, one module, answers with the log-probabilities of what was sampled."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from everloop.errors import ServingError
from everloop.event import Sampling
from torch import nn

from trainer.policy.base import Policy
from trainer.rollout.running import Answer, Running, check_decodable


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    ``ids`` includes the end token where it was sampled (``finish_reason`` "stop"; else "length"). ``logprobs`` are
    of the distribution that was sampled, ``raw_logprobs`` the model's own, in nats, both as long as ``ids``.
    """

    ids: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]
    finish_reason: str


class Engine:
    """Samples from one policy's base or any module of its shape. Not thread-safe.

    ``threads`` of torch, in this whole process; 0 leaves them as they are. ``batch`` rows are decoded together.
    """

    def __init__(self, policy: Policy, threads: int = 0, *, batch: int = 128) -> None:
        if threads:
            torch.set_num_threads(threads)
        check_decodable(policy.model.config)
        self.policy = policy
        self.batch = batch

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        module: nn.Module | None = None,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[Completion]:
        """One completion a prompt, in order; ``module`` is the policy's base where None.

        The same prompt several times gives several samples and is run once. Completion i is a function of its
        prompt, the module, the settings, ``seed`` and i. Raises ServingError 400 where a prompt fills the context.
        """
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, seed=seed)
        answers = [self._answer(i, prompt, sampling) for i, prompt in enumerate(prompts)]
        waiting = sorted(answers, key=lambda answer: (len(answer.prompt), answer.prompt))
        running = Running(module or self.policy.model, self.policy.pad_id)
        while waiting or len(running):
            free = self.batch - len(running)
            if waiting and free >= min(self.batch // 2, len(waiting)):
                running.admit(waiting[:free])
                del waiting[:free]
            running.step()
        return [Completion(a.ids, a.logprobs, a.raw_logprobs, a.finish or "length") for a in answers]

    def _answer(self, index: int, prompt: Sequence[int], sampling: Sampling) -> Answer:
        room = self.policy.context - len(prompt)
        if not prompt or room < 1:
            raise ServingError(
                f"prompt {index} has {len(prompt)} tokens; it must have 1 to {self.policy.context - 1}",
                status=400,
                code="context_length_exceeded",
            )
        chance = random.Random(f"{sampling.seed}/{index}")
        most = min(sampling.max_tokens or room, room)
        return Answer(tuple(prompt), sampling, most, self.policy.stop_ids, chance)
