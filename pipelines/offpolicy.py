"""The value of a policy that answered nobody, from answers that others gave and their logged probabilities. Pure.

Each logged answer counts by how much likelier the candidate is to give it: w = p(answer | candidate) / p(answer | who
gave it), the product over the answer's own tokens and no others. Three estimates of the mean reward of the candidate's
answers to the same prompts:

=============  ==========================================================================================
importance     mean of w r: unbiased and wild (Horvitz and Thompson 1952); shown beside the others
snips          sum of w r / sum of w: self-normalised, from 0 to 1 as rewards are (Swaminathan and Joachims 2015)
doubly robust  mean of q(candidate's own answers) + sum of w (r - q(logged answer)) / sum of w, with a model q of the
               reward: right in the limit if either the probabilities or q are (Dudik, Langford and Li 2011)
=============  ==========================================================================================

The last two use min(w, sqrt(n)) (Ionides 2008): the bias that this costs vanishes with n, and is at most the mass that
is cut off. Intervals are those of the linearised ratio, a *cluster* (a person, else an episode) as one observation
(Liang and Zeger 1986). Where too little of what the candidate would say was ever said, there is no number: see
:class:`Overlap`. Sources and reasons: docs/offpolicy.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

MIN_ESS = 50.0  # rated clusters' worth of weight, as many as a canary needs rated units in each arm
MIN_MASS = 0.9  # of the candidate's probability, that must lie where answers were logged
MAX_MASS = 1.1  # above it the probabilities are not those of one and the same thing
HIGHEST_LOG = 1e-3  # a logarithm of a probability, with room for rounding
LARGEST_LOG_WEIGHT = 50.0  # exp() of more is infinite for all purposes; one such answer must not make NaN
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Logged:
    """Logged answers whose sampling distribution is known. All arrays have shape (calls,).

    ``reward``: 0 to 1, nan: nobody said anything. ``behaviour``, ``candidate``: log-probability of the whole answer in
    nats under who gave it and under the candidate; -inf of the candidate: it never gives it. ``cluster``: whose it is.
    ``predicted``: a reward model's value of the logged answer, ``expected``: of the candidate's own answers to the same
    prompt; nan: not known. The model must not have learned from these very rewards.

    Example: one answer that was a thumb up, twice as likely under the candidate::

        Logged.of(reward=[1.0], behaviour=[-1.2], candidate=[-0.51], cluster=["rita"], predicted=[0.7], expected=[0.8])
    """

    reward: Floats
    behaviour: Floats
    candidate: Floats
    cluster: NDArray[Any]
    predicted: Floats
    expected: Floats

    @classmethod
    def of(
        cls,
        reward: Sequence[float] | Floats,
        behaviour: Sequence[float] | Floats,
        candidate: Sequence[float] | Floats,
        cluster: Sequence[Any] | NDArray[Any],
        predicted: Sequence[float] | Floats | None = None,
        expected: Sequence[float] | Floats | None = None,
    ) -> Logged:
        """From anything array-like; without a model of the reward nothing is known of it. Raises ValueError."""
        given = [np.asarray(values, np.float64) for values in (reward, behaviour, candidate)]
        models = [
            np.full(given[0].shape, np.nan) if one is None else np.asarray(one, np.float64)
            for one in (predicted, expected)
        ]
        made = cls(*given, np.asarray(cluster), *models)
        shapes = {field.name: getattr(made, field.name).shape for field in fields(made)}
        if len(set(shapes.values())) > 1 or made.reward.ndim != 1:
            raise ValueError(f"one number a call is needed in each array, not {shapes}")
        return made

    def taken(self, keep: NDArray[np.bool_]) -> Logged:
        """Those calls alone."""
        return replace(self, **{field.name: getattr(self, field.name)[keep] for field in fields(self)})


class Estimate(NamedTuple):
    """A mean reward, and the bounds that hold it with the confidence that was asked for."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Overlap:
    """How much of what the candidate would say is in the log.

    ``mass``: mean weight over all calls, 1 in expectation where everything that the candidate says was possible;
    ``mass_high`` its upper bound. ``ess``: Kish's effective number of rated clusters. ``largest``: the greatest share
    of all weight that one cluster holds. ``cut``: share of the weight above the limit. ``lacks``: why there is no
    number; None: there is one.
    """

    calls: int
    rated: int
    clusters: int
    mass: float
    mass_high: float
    ess: float
    largest: float
    cut: float
    lacks: str | None


@dataclass(frozen=True)
class Evaluation:
    """``logged``: mean reward of the answers as they were given. The three others are None without overlap, and
    ``doubly_robust`` without a model of the reward. ``left_out``: calls that no estimate can use, by reason.
    """

    overlap: Overlap
    logged: Estimate | None
    importance: Estimate | None
    snips: Estimate | None
    doubly_robust: Estimate | None
    left_out: dict[str, int]

    @property
    def best(self) -> Estimate | None:
        """Doubly robust where a model of the reward is there, else self-normalised; None: not enough overlap."""
        return self.doubly_robust or self.snips


def evaluate(given: Logged, confidence: float = 0.95) -> Evaluation:
    """All estimates at once; two-sided intervals of this confidence."""
    sound, left_out = _sound(given)
    rated = ~np.isnan(sound.reward)
    logged = _logged(sound.taken(rated), confidence)
    weights, raw = _weights(sound)
    overlap = _overlap(sound, weights, raw, confidence)
    if overlap.lacks is not None:
        return Evaluation(overlap, logged, None, None, None, left_out)
    # What the candidate certainly says outside of the log may be all wrong or all right.
    unseen = max(0.0, 1.0 - overlap.mass_high)
    common = _Common(sound, rated, weights, overlap.ess, confidence, unseen)
    return Evaluation(
        overlap=overlap,
        logged=logged,
        importance=_importance(common, raw),
        snips=common.ratio(np.zeros(len(weights)), np.zeros(len(weights))),
        doubly_robust=_doubly_robust(common),
        left_out=left_out,
    )


def _sound(given: Logged) -> tuple[Logged, dict[str, int]]:
    """What can be used, and how many calls cannot, by reason (the first that fits)."""
    reasons = {
        "the log-probability of who answered is not a finite number below 0": ~(
            np.isfinite(given.behaviour) & (given.behaviour <= HIGHEST_LOG)
        ),
        "the candidate's log-probability is not a number below 0": ~(given.candidate <= HIGHEST_LOG),
        "the reward is not from 0 to 1": ~(np.isnan(given.reward) | ((given.reward >= 0) & (given.reward <= 1))),
    }
    keep = np.ones(given.reward.shape, bool)
    counts = {}
    for reason, bad in reasons.items():
        counts[reason] = int((bad & keep).sum())
        keep &= ~bad
    return given.taken(keep), {reason: count for reason, count in counts.items() if count}


def _weights(sound: Logged) -> tuple[Floats, Floats]:
    """(cut at sqrt(n), as they are), both (calls,)."""
    raw = np.exp(np.minimum(sound.candidate - sound.behaviour, LARGEST_LOG_WEIGHT))
    return np.minimum(raw, math.sqrt(max(raw.size, 1))), raw


def _sums(cluster: NDArray[Any], values: Floats) -> Floats:
    """Sum of the values of each cluster, (clusters,)."""
    names, which = np.unique(cluster, return_inverse=True)
    return np.bincount(which.reshape(-1), values, minlength=len(names))


def _spread(sums: Floats) -> float:
    """Variance of a total of independent cluster sums with mean 0; infinite for a single one."""
    return float((sums**2).sum() * len(sums) / (len(sums) - 1)) if len(sums) > 1 else math.inf


def _t(confidence: float, degrees: float) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, max(degrees, 1.0)))


def _within(value: float, half: float) -> Estimate:
    return Estimate(min(max(value, 0.0), 1.0), max(value - half, 0.0), min(value + half, 1.0))


def _logged(rated: Logged, confidence: float) -> Estimate | None:
    if not rated.reward.size:
        return None
    mean = float(rated.reward.mean())
    sums = _sums(rated.cluster, (rated.reward - mean) / rated.reward.size)
    half = _t(confidence, len(sums) - 1) * math.sqrt(_spread(sums) + 2 / len(sums) ** 2)
    return _within(mean, half)


def _overlap(sound: Logged, weights: Floats, raw: Floats, confidence: float) -> Overlap:
    calls, rated = len(weights), ~np.isnan(sound.reward)
    held = _sums(sound.cluster[rated], weights[rated])
    total = float(held.sum())
    mass, error = 0.0, math.inf
    if calls:
        mass = float(weights.mean())
        sums = _sums(sound.cluster, (weights - mass) / calls)
        error = _t(confidence, len(sums) - 1) * math.sqrt(_spread(sums))
    made = Overlap(
        calls=calls,
        rated=int(rated.sum()),
        clusters=len(held),
        mass=mass,
        mass_high=min(mass + error, math.sqrt(calls)),  # no weight is above it
        ess=total**2 / float((held**2).sum()) if total > 0 else 0.0,
        largest=float(held.max()) / total if total > 0 else 0.0,
        cut=1 - float(weights.sum()) / float(raw.sum()) if raw.sum() > 0 else 0.0,
        lacks=None,
    )
    return replace(made, lacks=_lacks(made, mass - error))


def _lacks(found: Overlap, mass_low: float) -> str | None:
    if not found.calls:
        return "there is no logged answer whose sampling distribution is known"
    if not found.rated:
        return f"nobody rated any of the {found.calls} answers"
    if mass_low > MAX_MASS:
        return (
            f"the weights' mean is {found.mass:.2f} where 1 is expected: the logged probabilities and the candidate's "
            "are not of the same thing"
        )
    if found.mass_high < MIN_MASS:
        return (
            f"about {found.mass:.0%} of what the candidate would say (at most {found.mass_high:.0%}) is among what was "
            f"said; {MIN_MASS:.0%} are needed"
        )
    if found.ess < MIN_ESS:
        return (
            f"the {found.rated} rated answers of {found.clusters} people or episodes are worth {found.ess:.0f} of the "
            f"candidate's own; {MIN_ESS:.0f} are needed"
        )
    return None


@dataclass(frozen=True)
class _Common:
    """What the estimates share."""

    sound: Logged
    rated: NDArray[np.bool_]
    weights: Floats
    ess: float
    confidence: float
    unseen: float

    def ratio(self, predicted: Floats, expected: Floats) -> Estimate:
        """mean of expected + sum of w (r - predicted) / sum of w, with its interval.

        A residual of 1 and one of -1 are added to the variance: a few equal thumbs are no certainty.
        """
        rated, weights, n = self.rated, self.weights, len(self.weights)
        share = np.where(rated, weights, 0.0) / weights[rated].sum()
        residual = np.where(rated, self.sound.reward, 0.0) - predicted
        direct, correction = float(expected.mean()), float((share * residual).sum())
        influence = (expected - direct) / n + share * (residual - correction)
        variance = _spread(_sums(self.sound.cluster, influence)) + 2 / self.ess**2
        half = _t(self.confidence, self.ess - 1) * math.sqrt(variance)
        value, low, high = _within(direct + correction, half)
        return Estimate(value, low * (1 - self.unseen), high + (1 - high) * self.unseen)


def _importance(common: _Common, raw: Floats) -> Estimate:
    """Not cut and not normalised: it may well lie above 1."""
    rated = common.rated
    weighted = raw[rated] * common.sound.reward[rated]
    mean = float(weighted.mean())
    sums = _sums(common.sound.cluster[rated], (weighted - mean) / len(weighted))
    half = _t(common.confidence, len(sums) - 1) * math.sqrt(_spread(sums))
    return Estimate(mean, mean - half, mean + half)


def _doubly_robust(common: _Common) -> Estimate | None:
    """Where the model has no opinion of a prompt, a constant stands for both of its: that is unbiased as well."""
    sound = common.sound
    known = np.isfinite(sound.predicted) & np.isfinite(sound.expected)
    if not known.any():
        return None
    usual = float(sound.predicted[known].mean())
    return common.ratio(np.where(known, sound.predicted, usual), np.where(known, sound.expected, usual))
