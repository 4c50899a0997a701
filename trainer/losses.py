"""The losses of a training run: pure functions, a dataclass in, a loss and its metrics out.

Decoupled PPO (Hilton et al., "Batch size-invariance for policy optimization", 2021, arXiv:2110.00641) keeps three
policies apart: the *behaviour* policy that sampled the tokens, the *proximal* policy that the step must stay near
(recomputed at the start of a round) and the *new* policy that is trained. The clip acts on new / proximal; the
sampling mismatch is corrected once, by the truncated and detached proximal / behaviour. Clipping against the
behaviour policy and truncating as well would correct twice.

Every loss is a weighted sum, never a mean: ``weight`` carries mask and normalisation, so that a minibatch may be
split over devices in any way and gives the same gradient. Shapes are (samples, tokens) unless said otherwise, log-
probabilities are natural, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 20.0
"""exp() of more than this is infinite for all purposes; a bound keeps one broken token from making NaN."""


class Loss(NamedTuple):
    """``value`` () carries the gradient; ``metrics`` are detached weighted means, for curves."""

    value: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class PolicyTerms:
    """Sampled tokens as PPO sees them, each (samples, tokens). ``weight`` is 0 on padding and on masked tokens.

    Example: one answer of two tokens, both a little likelier than at the start of the round::

        PolicyTerms(new=[[-0.9, -1.9]], proximal=[[-1, -2]], behaviour=[[-1, -2]], advantage=[[1, 1]],
                    weight=[[0.5, 0.5]])
    """

    new: Tensor
    proximal: Tensor
    behaviour: Tensor
    advantage: Tensor
    weight: Tensor


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values.detach() * weight).sum() / weight.sum().clamp_min(1e-12)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def ppo(terms: PolicyTerms, *, clip_low: float, clip_high: float, truncate: float) -> Loss:
    """−Σ weight · min(π_prox/π_behav, truncate) · min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A), r = π_new/π_prox.

    Clip: Schulman et al. 2017, arXiv:1707.06347, with separate bounds (DAPO, arXiv:2503.14476). Truncation:
    Espeholt et al. 2018 (V-trace, arXiv:1802.01561).
    """
    ratio = _exp(terms.new - terms.proximal)
    correction = _exp((terms.proximal - terms.behaviour).detach())
    truncated = correction.clamp_max(truncate)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * terms.advantage, clipped * terms.advantage)
    held = (clipped * terms.advantage < ratio * terms.advantage).to(ratio.dtype)
    log_ratio = (terms.new - terms.proximal).detach()
    return Loss(
        -(terms.weight * truncated * surrogate).sum(),
        {
            "ratio": _mean(ratio, terms.weight),
            "clipped": _mean(held, terms.weight),
            "correction": _mean(truncated, terms.weight),
            "truncated": _mean((correction > truncate).to(ratio.dtype), terms.weight),
            "kl_proximal": _mean(_exp(log_ratio) - 1 - log_ratio, terms.weight),
        },
    )


def kl_to_base(new: Tensor, base: Tensor, weight: Tensor) -> Loss:
    """Σ weight · (exp(d) − 1 − d) with d = log π_base − log π_new: the low-variance estimate of KL(new ‖ base).

    Unbiased where the tokens come from the new policy, never negative (Schulman, "Approximating KL divergence",
    2020, estimator k3).
    """
    difference = (base.detach() - new).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    estimate = difference.exp() - 1 - difference
    return Loss((weight * estimate).sum(), {"kl_base": _mean(estimate, weight)})


def value(predicted: Tensor, returns: Tensor, weight: Tensor) -> Loss:
    """½ Σ weight · (predicted − returns)². Shapes (turns,): one value a turn, before its first token."""
    error = predicted - returns
    return Loss(0.5 * (weight * error.square()).sum(), {"value_error": _mean(error.square(), weight)})


def replay(new: Tensor, weight: Tensor) -> Loss:
    """−Σ weight · log π_new: weighted likelihood of answers that people corrected or rated well."""
    return Loss(-(weight * new).sum(), {"replay_nll": _mean(-new, weight)})


def total(*parts: tuple[float, Loss]) -> Loss:
    """The weighted sum of losses by coefficient; metrics of all of them."""
    metrics: dict[str, Tensor] = {}
    for _, loss in parts:
        metrics.update(loss.metrics)
    summed = torch.stack([coefficient * loss.value for coefficient, loss in parts]).sum()
    return Loss(summed, {**metrics, "loss": summed.detach()})
