"""Rollouts of training: counted, repeatable, true to the distribution, and with the log-probabilities of serving."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from everloop import event

from trainer.policy.base import Policy
from trainer.rollout.running import Answer, Running
from trainer.sampling import Sampling, rollouts

pytestmark = pytest.mark.models
PROMPTS = [(5, 6, 9), (5, 300, 12, 40, 7), (8,)]


def draw(policy: Policy, prompts: list[tuple[int, ...]], sampling: Sampling, seed: int = 1):
    return rollouts(policy.model, prompts, sampling, stop_ids=policy.stop_ids, seed=seed)


def test_samples_are_counted_and_distinct(policy: Policy):
    for found in draw(policy, PROMPTS, Sampling(samples=20, max_tokens=2)):
        assert sum(r.count for r in found) == 20
        assert len({r.completion for r in found}) == len(found)
        assert all(r.finished == (r.completion[-1] in policy.stop_ids) for r in found)
        assert [r.count for r in found] == sorted((r.count for r in found), reverse=True)


def test_the_same_seed_repeats_them_whatever_else_is_in_the_batch(policy: Policy):
    sampling = Sampling(samples=6, max_tokens=3)
    together = draw(policy, PROMPTS, sampling)
    alone = draw(policy, PROMPTS[:1], sampling)
    assert [(r.completion, r.count) for r in together[0]] == [(r.completion, r.count) for r in alone[0]]
    assert draw(policy, PROMPTS, sampling, seed=2)[0] != together[0]


def test_log_probabilities_are_the_models_own(policy: Policy):
    prompt = PROMPTS[1]
    for rollout in draw(policy, [prompt], Sampling(samples=8, max_tokens=3, temperature=0.8))[0]:
        ids = torch.tensor([prompt + rollout.completion])
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.8
        expected = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert rollout.logprobs == pytest.approx(expected.numpy(), abs=1e-5)


def test_tokens_come_as_often_as_their_probability_says(policy: Policy):
    samples = 4000
    found = draw(policy, PROMPTS[:1], Sampling(samples=samples, max_tokens=1, temperature=0.3))[0]
    expected = {r.completion: float(np.exp(r.logprobs[0])) for r in found}
    for rollout in found[:5]:
        share, probability = rollout.count / samples, expected[rollout.completion]
        assert abs(share - probability) < 5 * np.sqrt(probability * (1 - probability) / samples) + 1e-9
    assert sum(expected.values()) > 0.8


def test_greedy_is_the_likeliest_answer_and_what_transformers_generates(policy: Policy):
    for prompt, found in zip(PROMPTS, draw(policy, PROMPTS, Sampling(5, 6, temperature=0.0)), strict=True):
        ids = torch.tensor([prompt])
        expected = policy.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        (answer,) = found
        assert answer.count == 5
        assert list(answer.completion) == expected[0, len(prompt) :].tolist()


def test_training_sees_the_log_probabilities_that_serving_recorded(policy: Policy):
    from trainer.engine_torch import EngineSettings, TorchEngine
    from trainer.packing import Sample

    served = [
        Answer(prompt, event.Sampling(temperature=1.0), 4, policy.stop_ids, random.Random(i))
        for i, prompt in enumerate(PROMPTS)
    ]
    running = Running(policy.model, policy.pad_id)
    running.admit(served)
    while len(running):
        running.step()
    groups = [(Sample(answer.prompt, tuple(answer.ids)),) for answer in served]
    recomputed = TorchEngine(policy, EngineSettings(rank=2)).estimates(groups).logprobs
    for answer, found in zip(served, recomputed, strict=True):
        assert found == pytest.approx(np.asarray(answer.logprobs), abs=1e-4)
