"""The engine of one machine: parts of a minibatch add up, a step learns, a restored state gives the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from everloop.errors import AdapterRefused, ConfigError

from trainer import losses
from trainer.engine import Outputs
from trainer.engine_torch import EngineSettings, TorchEngine, TrainingDiverged
from trainer.losses import Loss
from trainer.packing import Sample
from trainer.policy import lora
from trainer.policy.base import Policy

pytestmark = pytest.mark.models
GROUPS = [
    (Sample((5, 6, 9), (70, 2)), Sample((5, 6, 9), (71, 2))),
    (Sample((8, 30, 31, 32, 9), (72, 73, 2)),),
    (Sample((8,), (70, 2)),),
]
SMALL = EngineSettings(rank=2, alpha=4, learning_rate=1e-2)


def likelihood(outputs: Outputs, part: slice) -> Loss:
    return losses.total(
        (1.0, losses.replay(outputs.logprobs, outputs.present.float() / 8)),
        (1.0, losses.value(outputs.values, torch.ones_like(outputs.values), torch.full_like(outputs.values, 0.25))),
    )


def weights(engine: TorchEngine) -> list[torch.Tensor]:
    return [p.detach().clone() for p in engine._parameters]


def test_a_step_makes_the_answers_likelier_and_the_values_better(policy: Policy):
    engine = TorchEngine(policy, SMALL)
    before = engine.estimates(GROUPS)
    for _ in range(5):
        metrics = engine.step(GROUPS, likelihood, 1.0)
    after = engine.estimates(GROUPS)
    assert sum(map(np.sum, after.logprobs)) > sum(map(np.sum, before.logprobs))
    assert np.abs(1 - after.values).mean() < np.abs(1 - before.values).mean()
    assert metrics["grad_norm"] > 0
    assert all(np.array_equal(a, b) for a, b in zip(after.base, before.base, strict=True))


def test_estimates_keep_the_order_of_the_groups(policy: Policy):
    engine = TorchEngine(policy, SMALL, seed=1)
    alone = [engine.estimates([group]).logprobs for group in GROUPS]
    together = engine.estimates(GROUPS).logprobs
    for found, expected in zip(together, [row for rows in alone for row in rows], strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_minibatch_in_parts_gives_the_same_step(policy: Policy):
    whole = TorchEngine(policy, SMALL, seed=1)
    parts = TorchEngine(policy, EngineSettings(rank=2, alpha=4, learning_rate=1e-2, tokens=6), seed=1)
    one, other = whole.step(GROUPS, likelihood, 1.0), parts.step(GROUPS, likelihood, 1.0)
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_the_value_head_sends_no_gradient_into_the_policy(policy: Policy):
    engine = TorchEngine(policy, SMALL)

    def values_alone(outputs: Outputs, part: slice) -> Loss:
        return losses.total(
            (1.0, losses.value(outputs.values, torch.ones_like(outputs.values), outputs.values * 0 + 1))
        )

    before = weights(engine)
    for _ in range(2):
        engine.step(GROUPS, values_alone, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))
    assert engine.estimates(GROUPS).values.any()


def test_a_restored_state_goes_on_with_the_same_bits(policy: Policy, tmp_path: Path):
    engine = TorchEngine(policy, SMALL, seed=1)
    engine.step(GROUPS, likelihood, 1.0)
    engine.save_state(tmp_path)
    engine.step(GROUPS, likelihood, 0.5)
    other = TorchEngine(policy, SMALL, seed=99)
    other.load_state(tmp_path)
    other.step(GROUPS, likelihood, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(weights(engine), weights(other), strict=True))
    assert engine.save_adapter(tmp_path / "a") == other.save_adapter(tmp_path / "b")


def test_training_goes_on_from_the_parent_and_its_value_head(policy: Policy, tmp_path: Path):
    first = TorchEngine(policy, SMALL)
    first.step(GROUPS, likelihood, 1.0)
    parent = tmp_path / first.save_adapter(tmp_path)
    first.save_value_head(tmp_path / "head.safetensors")
    second = TorchEngine(policy, SMALL, parent=parent, value_head=tmp_path / "head.safetensors")
    one, other = first.estimates(GROUPS), second.estimates(GROUPS)
    assert all(np.array_equal(a, b) for a, b in zip(one.logprobs, other.logprobs, strict=True))
    assert np.array_equal(one.values, other.values)
    with pytest.raises(AdapterRefused):
        TorchEngine(policy, SMALL, parent=tmp_path / "gone")


@pytest.mark.parametrize(
    ("changes", "word"), [({"rank": 3}, "r is 4"), ({"alpha": 9}, "lora_alpha"), ({"targets": ("dense",)}, "target")]
)
def test_a_recipe_that_differs_from_its_parents_adapter_is_refused(
    policy: Policy, adapter: Path, changes: dict[str, Any], word: str
):
    like = replace(SMALL, rank=4, alpha=8)
    TorchEngine(policy, like, parent=adapter)
    with pytest.raises(AdapterRefused, match=word):
        TorchEngine(policy, replace(like, **changes), parent=adapter)


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_weights(policy: Policy):
    engine = TorchEngine(policy, SMALL)
    before = weights(engine)

    def broken(outputs: Outputs, part: slice) -> Loss:
        return losses.total((float("nan"), losses.replay(outputs.logprobs, outputs.present.float())))

    with pytest.raises(TrainingDiverged, match="learning_rate"):
        engine.step(GROUPS, broken, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))


def test_rollouts_come_from_the_adapter_as_serving_would_merge_it(policy: Policy, adapter: Path):
    from trainer.sampling import Sampling, rollouts

    engine = TorchEngine(policy, replace(SMALL, rank=4, alpha=8), parent=adapter)
    sampling = Sampling(samples=4, max_tokens=3)
    found = engine.rollouts([(5, 6, 9)], sampling, seed=3)
    merged = lora.merged(policy, adapter)
    expected = rollouts(merged, [(5, 6, 9)], sampling, stop_ids=policy.stop_ids, seed=3)
    assert [(r.completion, r.count) for r in found[0]] == [(r.completion, r.count) for r in expected[0]]


def test_a_model_that_changes_its_logits_is_refused(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(policy.model.config, "final_logit_softcapping", 30.0, raising=False)
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        TorchEngine(policy, SMALL)
