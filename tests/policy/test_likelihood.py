"""Log-probabilities of given answers are those that the sampler had when it drew them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.packing import Sample
from trainer.policy import likelihood, lora
from trainer.policy.base import Policy
from trainer.policy.likelihood import log_likelihoods
from trainer.sampling import Sampling, rollouts

pytestmark = pytest.mark.models
ASKED = ["where is my card", "block my card now, I beg you, somebody has it and is in my account", "age"]


def drawn(policy: Policy, model: Any, temperature: float) -> tuple[list[Sample], list[float]]:
    prompts = [policy.encode_chat([{"role": "user", "content": text}]) for text in ASKED]
    found = rollouts(model, prompts, Sampling(4, 12, temperature), stop_ids=policy.stop_ids, seed=3)
    pairs = [(prompt, one) for prompt, its in zip(prompts, found, strict=True) for one in its]
    samples = [Sample(tuple(prompt), one.completion, temperature) for prompt, one in pairs]
    return samples, [float(one.logprobs.sum()) for _, one in pairs]


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_they_are_what_the_sampler_recorded_whatever_shares_the_batch(
    policy: Policy, adapter: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lora.merged(policy, adapter)
    samples, recorded = drawn(policy, model, temperature)
    assert len({len(sample.completion) for sample in samples}) > 1 or len(samples) > 3
    told: list[tuple[int, int]] = []
    together = log_likelihoods(policy, model, samples, lambda done, of: told.append((done, of)))
    np.testing.assert_allclose(together, recorded, atol=2e-3)
    assert told[-1] == (len(samples), len(samples))
    monkeypatch.setattr(likelihood, "TOKENS", 1)
    np.testing.assert_allclose(log_likelihoods(policy, model, samples), together, atol=2e-3)
    assert not np.allclose(log_likelihoods(policy, policy.model, samples), recorded, atol=0.05)


def test_an_answer_of_no_tokens_is_certain(policy: Policy) -> None:
    sample = Sample((5, 6), (7,), 1.0)
    alone, empty = log_likelihoods(policy, policy.model, [sample, Sample((5, 6), ())])
    assert alone < 0
    assert empty == 0.0
