"""The port between algorithm and engine: what a training run asks of whatever holds the model.

The algorithm owns batch, losses, advantages and schedule. An engine owns the model's forward and backward, the
optimizer, adapter files and the parallel layout. :mod:`trainer.engine_torch` is one machine with torch and PEFT; an
engine for a model that fills a cluster answers the same seven calls. Losses are weighted sums, so an engine may cut
a minibatch into any parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trainer.losses import Loss
from trainer.packing import Sample
from trainer.sampling import Rollout, Sampling

Group = Sequence[Sample]
"""Samples that share a prompt. An engine may read the prompt once for all of them."""


class Outputs(NamedTuple):
    """What the model said about the samples of a part of a minibatch, with gradient.

    ``logprobs`` (samples, tokens): natural log-probability of each completion token at the sample's temperature, 0 on
    padding. ``values`` (samples,): the value head before the first completion token. ``present`` (samples, tokens).
    """

    logprobs: Tensor
    values: Tensor
    present: Tensor


class Estimates(NamedTuple):
    """What the model says now, without gradient: one array (tokens,) a sample, and ``values`` (samples,)."""

    logprobs: list[NDArray[np.float32]]
    base: list[NDArray[np.float32]]
    values: NDArray[np.float32]


Objective = Callable[[Outputs, slice], Loss]
"""The loss of a part of a minibatch; the slice says which of its samples the outputs are about."""


class Engine(Protocol):
    """One policy under training. Every call is deterministic: same weights, same arguments, same numbers."""

    def rollouts(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Rollout]]:
        """Answers of the policy as it is now, distinct ones with their counts."""

    def estimates(self, groups: Sequence[Group]) -> Estimates:
        """Log-probabilities under the policy as it is now and under its base, samples in order of the groups."""

    def step(self, groups: Sequence[Group], objective: Objective, rate: float) -> dict[str, float]:
        """One optimizer step at a share ``rate`` of the learning rate; returns the objective's metrics.

        Raises:
            TrainingDiverged: loss or gradient is not finite; the weights are as they were before the step.
        """

    def save_adapter(self, folder: Path) -> str:
        """Write the adapter as ``folder/<content hash>`` and return the hash."""

    def save_state(self, folder: Path) -> None:
        """Write everything that the next step depends on: weights, value head, optimizer."""

    def load_state(self, folder: Path) -> None:
        """Continue from ``save_state``: the next step gives the same bits as if nothing had happened."""

    def save_value_head(self, path: Path) -> None:
        """Write the value head, for the run that continues from this one's adapter."""
