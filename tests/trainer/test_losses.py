"""Each loss against a small example worked by hand, and its gradient against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer import losses
from trainer.losses import PolicyTerms


def double(values: list[list[float]] | list[float], grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def terms(new: Tensor, **changes: Tensor) -> PolicyTerms:
    fields = {
        "proximal": double([[-1.0, -2.0], [-0.5, -0.7]]),
        "behaviour": double([[-1.0, -3.0], [-0.5, -0.6]]),
        "advantage": double([[1.0, 1.0], [-2.0, -2.0]]),
        "weight": double([[0.25, 0.25], [0.5, 0.0]]),
    }
    return PolicyTerms(new=new, **{**fields, **changes})


def test_ppo_clips_against_the_proximal_policy_and_truncates_against_the_behaviour_policy():
    # Token by token: ratio, then clipped at 1.2; correction exp(0)=1, exp(1) truncated to 2.
    new = double([[math.log(1.1) - 1.0, math.log(1.5) - 2.0], [math.log(0.9) - 0.5, 0.0]])
    loss = losses.ppo(terms(new), clip_low=0.2, clip_high=0.2, truncate=2.0)
    by_hand = 0.25 * 1.0 * 1.1 + 0.25 * 2.0 * 1.2 + 0.5 * 1.0 * (0.9 * -2.0)
    assert loss.value.item() == pytest.approx(-by_hand)
    assert loss.metrics["clipped"].item() == pytest.approx(0.25)
    assert loss.metrics["truncated"].item() == pytest.approx(0.25)
    assert loss.metrics["ratio"].item() == pytest.approx(0.25 * 1.1 + 0.25 * 1.5 + 0.5 * 0.9)


def test_ppo_at_the_start_of_a_round_is_the_corrected_policy_gradient():
    new = double([[-1.0, -2.0], [-0.5, -0.7]], grad=True)
    losses.ppo(terms(new), clip_low=0.2, clip_high=0.2, truncate=2.0).value.backward()
    expected = double([[-0.25 * 1.0, -0.25 * 2.0], [-0.5 * -2.0, 0.0]])
    assert torch.allclose(new.grad, expected)


def test_a_clipped_token_gives_no_gradient_but_a_step_back_does():
    advantage = double([[1.0, -1.0], [1.0, -1.0]])
    new = double([[-1.0 + 0.5, -2.0 + 0.5], [-0.5 - 0.5, -0.7 - 0.5]], grad=True)
    given = terms(new, advantage=advantage, weight=torch.ones(2, 2, dtype=torch.float64))
    losses.ppo(given, clip_low=0.2, clip_high=0.2, truncate=2.0).value.backward()
    assert new.grad[0, 0] == 0
    assert new.grad[1, 1] == 0
    assert new.grad[0, 1] > 0
    assert new.grad[1, 0] < 0


def test_ppo_gradient_agrees_with_finite_differences():
    new = double([[-0.95, -1.7], [-0.42, -0.7]], grad=True)
    assert torch.autograd.gradcheck(
        lambda x: losses.ppo(terms(x), clip_low=0.2, clip_high=0.3, truncate=2.0).value, (new,)
    )


def test_a_token_that_became_impossible_gives_a_finite_loss():
    new = double([[-1e4, 0.0], [-0.5, -0.7]], grad=True)
    loss = losses.ppo(terms(new), clip_low=0.2, clip_high=0.2, truncate=2.0)
    loss.value.backward()
    assert torch.isfinite(loss.value)
    assert torch.isfinite(new.grad).all()


def test_kl_to_base_by_hand():
    new, base = double([[-1.0, -2.0]], grad=True), double([[-1.5, -2.0]])
    loss = losses.kl_to_base(new, base, double([[0.5, 0.5]]))
    assert loss.value.item() == pytest.approx(0.5 * (math.exp(-0.5) - 1 + 0.5))
    assert torch.autograd.gradcheck(lambda x: losses.kl_to_base(x, base, double([[0.5, 0.5]])).value, (new,))


def test_kl_estimate_is_the_kl_on_average():
    torch.manual_seed(0)
    new, base = torch.randn(5, dtype=torch.float64).log_softmax(0), torch.randn(5, dtype=torch.float64).log_softmax(0)
    exact = (new.exp() * (new - base)).sum()
    loss = losses.kl_to_base(new[None], base[None], new.exp()[None])
    assert loss.value.item() == pytest.approx(exact.item())


def test_value_and_replay_by_hand():
    predicted = double([0.5, 1.0], grad=True)
    weight = double([0.5, 0.5])
    assert losses.value(predicted, double([1.0, 1.0]), weight).value.item() == pytest.approx(0.5 * 0.5 * 0.25)
    assert torch.autograd.gradcheck(lambda x: losses.value(x, double([1.0, 0.0]), weight).value, (predicted,))
    new = double([[-0.1, -0.3]], grad=True)
    assert losses.replay(new, double([[1.0, 0.5]])).value.item() == pytest.approx(0.25)
    assert torch.autograd.gradcheck(lambda x: losses.replay(x, double([[1.0, 0.5]])).value, (new,))


def test_total_adds_by_coefficient_and_keeps_all_metrics():
    new = double([[-0.1]], grad=True)
    one = losses.replay(new, double([[1.0]]))
    two = losses.kl_to_base(new, double([[-0.1]]), double([[1.0]]))
    summed = losses.total((2.0, one), (0.5, two))
    assert summed.value.item() == pytest.approx(0.2)
    assert {"replay_nll", "kl_base", "loss"} <= summed.metrics.keys()


def test_a_minibatch_in_two_parts_gives_the_same_gradient():
    new = double([[-0.95, -1.7], [-0.42, -0.7]], grad=True)
    whole = terms(new)
    losses.ppo(whole, clip_low=0.2, clip_high=0.2, truncate=2.0).value.backward()
    together, new.grad = new.grad.clone(), None
    for row in (slice(0, 1), slice(1, 2)):
        fields = {name: getattr(whole, name)[row] for name in PolicyTerms.__dataclass_fields__}
        losses.ppo(PolicyTerms(**fields), clip_low=0.2, clip_high=0.2, truncate=2.0).value.backward()
    assert torch.equal(new.grad, together)
