"""How far the engine's log-probabilities are from the trainer's, where both are of the very same weights.

PPO weights each token by the ratio of the two. What is not learning but arithmetic (other kernels, a lower precision,
another template, a wrong adapter) shows in that ratio too, and nowhere else: so it is measured apart, at the start of
a run, on calls that were answered by what the run starts from; and for the rollouts of the run itself, at the start of
a round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from everloop.event import BASE
from numpy.typing import NDArray

from pipelines.batch import Batch, BatchItem
from trainer.engine import Engine
from trainer.gather import says
from trainer.material import Answer
from trainer.packing import Sample
from trainer.policy.base import Policy

Floats = NDArray[np.float32]
MOST_CALLS = 100  # newest ones, of which a run measures: some thousand tokens, and a second or two
MOST_TOKENS = 65_536  # of them together
LARGEST = 20.0  # nats: exp() of more is infinite for all purposes


class Mismatch(NamedTuple):
    """Of sampled tokens: ``mean`` and ``p99`` of the absolute difference in nats, and ``kl``, the k3 estimate of
    KL(engine ‖ trainer) in nats a token (Schulman, "Approximating KL divergence", 2020)."""

    tokens: int
    mean: float
    p99: float
    kl: float

    def named(self, what: str) -> dict[str, float]:
        """As metrics of a run, ``mismatch_<what>_mean`` and so on."""
        return {f"mismatch_{what}_{name}": float(value) for name, value in self._asdict().items()}


def between(engine: Iterable[Floats], trainer: Iterable[Floats]) -> Mismatch | None:
    """Natural log-probabilities of the same tokens, one array (tokens,) an answer; None where there are no tokens."""
    pairs = [(a, b) for a, b in zip(engine, trainer, strict=True) if len(a)]
    if not pairs:
        return None
    said, own = (np.concatenate(column).astype(np.float64) for column in zip(*pairs, strict=True))
    difference = own - said
    size = np.abs(difference)
    bounded = difference.clip(-LARGEST, LARGEST)
    return Mismatch(len(size), size.mean(), np.quantile(size, 0.99), (np.exp(bounded) - 1 - bounded).mean())


def of_calls(batch: Batch, policy: Policy, engine: Engine, version: str) -> Mismatch | None:
    """Of the batch's newest calls that ``version`` answered, whose weights the engine has now: at a run's start the
    parent's, or the base's. None where it answered none from a distribution that is known."""
    items = _measurable(batch, policy, version)
    if not items:
        return None
    samples = [_sample(item) for item in items]
    own = engine.estimates([[sample] for sample in samples]).logprobs
    return between([_said(item) for item in items], own)


def _measurable(batch: Batch, policy: Policy, version: str) -> list[BatchItem]:
    taken: list[BatchItem] = []
    tokens = 0
    for item in reversed(batch.items):
        known = item.policy_version == version and item.trainable and item.temperature > 0
        if not known or item.tokens is None or item.span is None or not says(item, policy):
            continue
        tokens += len(item.tokens)
        if len(taken) == MOST_CALLS or tokens > MOST_TOKENS:
            break
        taken.append(item)
    return taken


def _sample(item: BatchItem) -> Sample:
    assert item.tokens is not None
    assert item.span is not None
    tokens = item.tokens.tolist()
    return Sample(tuple(tokens[: item.span[0]]), tuple(tokens[item.span[0] : item.span[1]]), item.temperature)


def _said(item: BatchItem) -> Floats:
    assert item.span is not None
    return np.asarray(item.logprobs, np.float32)[item.span[0] : item.span[1]]


def of_rollouts(answers: Sequence[Answer]) -> Mismatch | None:
    """Of a round's own rollouts: as they were sampled, and as the policy says at the start of the round."""
    fresh = [a for a in answers if a.source == "fresh" and len(a.behaviour) == len(a.proximal)]
    return between([a.behaviour for a in fresh], [a.proximal for a in fresh])


def parent_of(folder: str | None) -> str:
    """The policy version whose adapter lies in this folder; None: the base."""
    return BASE if folder is None else folder.rstrip("/").rpartition("/")[2]
