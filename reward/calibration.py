"""How good predictions were that were made before their labels were known, and the correction that follows.

Predict-then-learn: the model first says what it expects, then sees the label. AUC and calibration error over the
recent window of such pairs are honest, since no label was learned before it was predicted.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
FEWEST = 20  # pairs below which nothing is said
BINS = 10
REFIT = 8  # steps after which a curve that begins anew has settled


def auc(predicted: Array, labels: Array) -> float | None:
    """Area under the ROC curve: how often a good one (label above 0.5) is placed above a bad one; ties count half.

    None where there are not both. Example: ``auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75``
    """
    good = labels > 0.5
    positives, negatives = int(good.sum()), int((~good).sum())
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((ranks[inverse][good].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def calibration_error(predicted: Array, labels: Array, bins: int = BINS) -> float:
    """Expected calibration error: mean distance of probability and frequency, over bins of equal counts, 0 to 1.

    Equal counts (rather than equal widths) keep the estimate steady where predictions crowd (Nixon et al. 2019,
    arXiv:1904.01685).
    """
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, len(order))) if part.size]
    return float(sum(abs(predicted[part].mean() - labels[part].mean()) * part.size for part in parts) / len(order))


class Shares:
    """How far the line of each topic lies from the line of all, where its own labels say so.

    Each is a Gaussian around no difference, with PRIOR as its precision (a label brings up to 0.25 of that), moved by
    one Newton step a label. What was learned fades by FADE a label, so that a topic's line follows the newest.
    ``means`` (topics, 2): added to slope and shift. ``known`` (topics, 2, 2): precisions beyond the prior's.
    """

    PRIOR = np.diag([100.0, 100.0])
    FADE = 0.999
    MOST = 1.5  # of a difference either way

    def __init__(self, topics: int) -> None:
        self.means = np.zeros((topics, 2))
        self.known = np.zeros((topics, 2, 2))

    def add(self, topic: int, logit: float, label: float, curve: Array) -> None:
        (slope, shift), slips = (curve[:2] + self.means[topic]).tolist(), float(curve[2])
        good = 1 / (1 + math.exp(-min(max(slope * logit + shift, -30.0), 30.0)))
        said = slips + (1 - 2 * slips) * good
        steep = (1 - 2 * slips) * good * (1 - good) / (said * (1 - said) + 1e-6)
        worth = steep**2 * said * (1 - said)
        self.means[topic] *= self.FADE
        self.known[topic] *= self.FADE
        self.known[topic] += [[worth * logit * logit, worth * logit], [worth * logit, worth]]
        (first, both), (_, second) = (self.PRIOR + self.known[topic]).tolist()
        pull = steep * (label - said) / (first * second - both * both)
        self.means[topic] += [pull * (second * logit - both), pull * (first - both * logit)]
        np.clip(self.means[topic], -self.MOST, self.MOST, out=self.means[topic])


class Calibration:
    """The last ``window`` pairs, and the curve through them from a logit to a probability.

    An answer is good with P = σ(slope·logit + shift), Platt's line (1999); a label says "good" with
    slips + (1 - 2·slips)·P, since people slip now and then, so that no label is ever sure (the lapse rate of a
    psychometric function; Wichmann and Hill 2001). After each label all three move by Fisher scoring towards the
    likeliest, held by a Gaussian prior around START.
    """

    START = np.array([1.0, 0.0, 0.05])
    PRIOR = np.array([20.0, 20.0, 1000.0])  # precisions: the first two are worth about twenty labels
    LEAST, MOST = np.array([0.1, -5.0, 0.0]), np.array([10.0, 5.0, 0.2])

    def __init__(self, window: int, topics: int = 1) -> None:
        self.window = window
        self._kept = np.zeros((3, 2 * window))  # logit, predicted, label: in order, from _first to _end
        self._first = self._end = 0
        self.curve = self.START.copy()
        self.shares = Shares(topics)

    def add(self, logit: float, predicted: float, label: float, topic: int = 0) -> None:
        self._append(logit, predicted, label)
        if len(self.pairs) >= FEWEST:
            self._fit()
        self.shares.add(topic, logit, label, self.curve)

    @property
    def pairs(self) -> Array:
        """(n, 3): logit, predicted, label of each, oldest first; a view."""
        return self._kept[:, self._first : self._end].T

    def _append(self, logit: float, predicted: float, label: float) -> None:
        if self._end == self._kept.shape[1]:
            self.remember(self.pairs)
        self._kept[:, self._end] = logit, predicted, label
        self._end += 1
        self._first = max(self._first, self._end - self.window)

    def remember(self, pairs: Any) -> None:
        """Have these pairs (n, 3), and no others, in the window; the newest of them if it is narrower."""
        newest = np.array(pairs, np.float64).reshape(-1, 3)[-self.window :]
        self._first, self._end = 0, len(newest)
        self._kept[:, : self._end] = newest.T

    def forget(self, kept: int) -> None:
        """Begin anew from the newest ``kept`` pairs: what came before them no longer holds."""
        self.remember(self.pairs[-kept:])
        self.curve = self.START.copy()
        self.shares = Shares(len(self.shares.means))
        if len(self.pairs) >= FEWEST:
            for _ in range(REFIT):
                self._fit()

    def _fit(self) -> None:
        logits, _, labels = self.pairs.T
        slope, shift, slips = self.curve
        good = 1 / (1 + np.exp(-(slope * logits + shift).clip(-30, 30)))
        said = (slips + (1 - 2 * slips) * good).clip(1e-6, 1 - 1e-6)
        steep = (1 - 2 * slips) * good * (1 - good)
        slopes = np.stack([steep * logits, steep, 1 - 2 * good])  # of what is said, by each parameter
        worth = slopes / (said * (1 - said))
        gradient = worth @ (labels - said) - self.PRIOR * (self.curve - self.START)
        moved = self.curve + np.linalg.solve(worth @ slopes.T + np.diag(self.PRIOR), gradient)
        if np.isfinite(moved).all():
            self.curve = np.clip(moved, self.LEAST, self.MOST)

    def line(self, logits: Any, topics: Any = None) -> Any:
        """Calibrated logits of being good, of answers to prompts of these topics (n,); None: by the line of all."""
        slope, shift = self.curve[:2] if topics is None else (self.curve[:2] + self.shares.means[topics]).T
        return np.maximum(slope, self.LEAST[0]) * logits + shift

    def heard(self, good: float) -> float:
        """The probability that a label says "good" of an answer that is good with this probability."""
        return float(self.curve[2] + (1 - 2 * self.curve[2]) * good)

    def _columns(self) -> tuple[Array, Array]:
        _, predicted, labels = self.pairs.T
        return predicted, labels

    @property
    def auc(self) -> float | None:
        """Over the window; None: too few, or labels of one kind alone."""
        return auc(*self._columns()) if len(self.pairs) >= FEWEST else None

    @property
    def error(self) -> float | None:
        """Expected calibration error over the window; None: too few."""
        return calibration_error(*self._columns()) if len(self.pairs) >= FEWEST else None
