"""Engine against trainer: the built-in engine and the trainer agree, and a planted shift is seen as what it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from everloop.config import ServingConfig

from pipelines.batch import Batch, BatchItem
from trainer import mismatch
from trainer.engine_torch import EngineSettings, TorchEngine
from trainer.material import Answer
from trainer.packing import Sample
from trainer.policy import lora
from trainer.policy.base import Policy
from trainer.rollout.embedded import EmbeddedServing

pytestmark = pytest.mark.models
MESSAGES = [[{"role": "user", "content": f"where is thing number {number}"}] for number in range(12)]


def item(messages: list[dict[str, Any]], answer: dict[str, Any], version: str, temperature: float) -> BatchItem:
    choice = answer["choices"][0]
    prompt, sampled = answer["prompt_token_ids"], choice["token_ids"]
    said = [one["logprob"] for one in choice["logprobs"]["content"]]
    return BatchItem(
        episode=f"e{messages[0]['content']}",
        version=1,
        call=f"c{messages[0]['content']}",
        subject=None,
        prompt_messages=messages,
        answer=choice["message"]["content"],
        correction=None,
        reward=0.0,
        mask=True,
        source="model",
        label=None,
        tokens=np.asarray([*prompt, *sampled], np.int32),
        logprobs=np.asarray([0.0] * len(prompt) + said, np.float32),
        span=(len(prompt), len(prompt) + len(sampled)),
        policy_version=version,
        temperature=temperature,
        trainable=True,
        turn=0,
        turns=1,
    )


@pytest.fixture
async def answered(policy: Policy, adapter: Path) -> Batch:
    """What the built-in engine answered, as the base and as an adapter, at two temperatures."""
    serving = EmbeddedServing([policy], ServingConfig(threads=1))
    await serving.load(adapter.name, adapter)
    items = []
    for number, messages in enumerate(MESSAGES):
        temperature = (1.0, 0.7)[number % 2]
        wanted = {"messages": messages, "max_tokens": 8, "temperature": temperature, "seed": number}
        for model, version in ((policy.name, "base"), (adapter.name, adapter.name)):
            body = {**wanted, "model": model, "return_token_ids": True, "logprobs": True, "top_logprobs": 0}
            items.append(item(messages, await serving.complete("chat/completions", body), version, temperature))
    await serving.close()
    return Batch("t", "p", "", items)


@pytest.fixture
def continued(policy: Policy, adapter: Path) -> TorchEngine:
    """The trainer at the start of a run that goes on from the adapter."""
    return TorchEngine(policy, EngineSettings(rank=4, alpha=8), parent=adapter)


async def test_the_built_in_engine_and_the_trainer_agree(
    answered: Batch, policy: Policy, adapter: Path, continued: TorchEngine
) -> None:
    lora.check(adapter, policy)
    for engine, version in ((continued, adapter.name), (TorchEngine(policy, EngineSettings(rank=2)), "base")):
        found = mismatch.of_calls(answered, policy, engine, version)
        assert found is not None
        assert found.tokens > 12
        assert found.mean < 1e-5
        assert found.p99 < 1e-4
        assert found.kl < 1e-6
    wrong = mismatch.of_calls(answered, policy, continued, "base")
    assert wrong is not None
    assert wrong.mean > 1e-3, "another version's weights"
    assert mismatch.of_calls(answered, policy, continued, "another") is None


async def test_a_planted_shift_is_seen(answered: Batch, policy: Policy, adapter: Path, continued: TorchEngine) -> None:
    shifted = replace(answered, items=[replace(i, logprobs=i.logprobs - 0.1) for i in answered.items])
    found = mismatch.of_calls(shifted, policy, continued, adapter.name)
    assert found is not None
    assert (found.mean, found.p99) == (pytest.approx(0.1, abs=1e-4), pytest.approx(0.1, abs=1e-4))
    assert found.kl == pytest.approx(np.exp(0.1) - 1.1, abs=1e-4)
    assert found.named("calls")["mismatch_calls_mean"] == found.mean
    unknown = replace(answered, items=[replace(i, trainable=False) for i in answered.items])
    assert mismatch.of_calls(unknown, policy, continued, adapter.name) is None, "not the distribution that was sampled"


def test_rollouts_are_held_against_the_start_of_their_round() -> None:
    said, own = np.asarray([-1.0, -2.0], np.float32), np.asarray([-1.5, -2.0], np.float32)
    fresh = Answer(Sample((1,), (2, 3)), "fresh", "e", weight=1.0, behaviour=said, proximal=own)
    unjudged = replace(fresh, weight=0.0, proximal=np.zeros(0, np.float32))
    logged = replace(fresh, source="logged")
    found = mismatch.of_rollouts([fresh, unjudged, logged])
    assert found is not None
    assert (found.tokens, found.mean) == (2, 0.25)
    assert mismatch.of_rollouts([logged]) is None
    assert mismatch.parent_of(None) == "base"
    assert mismatch.parent_of("/home/adapters/abc") == "abc"
