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


def sigmoid(logit: float) -> float:
    """The logistic function, without overflow."""
    return 1 / (1 + math.exp(-min(max(logit, -30.0), 30.0)))


def solved(rows: list[list[float]]) -> tuple[float, float, float]:
    """The x of A·x = b for three rows of a symmetric A, each followed by its b: by Cramer's rule, in a tenth of the
    time that numpy takes for so few."""
    (a, b, c, x), (_, d, e, y), (_, _, f, z) = rows
    df, bf, bd = d * f - e * e, c * e - b * f, b * e - c * d  # the adjugate's rows, which is symmetric too
    af, ae, ad = a * f - c * c, b * c - a * e, a * d - b * b
    whole = a * df + b * bf + c * bd
    return (
        (df * x + bf * y + bd * z) / whole,
        (bf * x + af * y + ae * z) / whole,
        (bd * x + ae * y + ad * z) / whole,
    )


class Shares:
    """How far the line of each topic lies from the line of all, where its own labels say so.

    Each is a Gaussian around no difference, with PRIOR as its precision (a label brings up to 0.25 of that), moved by
    one Newton step a label. What was learned fades by FADE a label, so that a topic's line follows the newest.
    ``means`` (topics, 2): added to slope and shift. ``known`` (topics, 2, 2): precisions beyond the prior's.
    """

    PRIOR = 100.0
    FADE = 0.999
    MOST = 1.5  # of a difference either way

    def __init__(self, topics: int) -> None:
        self.means = np.zeros((topics, 2))
        self.known = np.zeros((topics, 2, 2))

    def add(self, topic: int, logit: float, label: float, curve: Array) -> None:
        means, ((first, both), (_, second)) = self.means[topic].tolist(), self.known[topic].tolist()
        slope, shift, slips = curve.tolist()
        slope, shift = slope + means[0], shift + means[1]
        good = sigmoid(slope * logit + shift)
        said = slips + (1 - 2 * slips) * good
        steep = (1 - 2 * slips) * good * (1 - good) / (said * (1 - said) + 1e-6)
        worth = steep**2 * said * (1 - said)
        first = self.FADE * first + worth * logit * logit
        both = self.FADE * both + worth * logit
        second = self.FADE * second + worth
        self.known[topic] = (first, both), (both, second)
        first, second = first + self.PRIOR, second + self.PRIOR
        pull = steep * (label - said) / (first * second - both * both)
        steps = pull * (second * logit - both), pull * (first - both * logit)
        self.means[topic] = [
            min(max(self.FADE * before + step, -self.MOST), self.MOST)
            for before, step in zip(means, steps, strict=True)
        ]


class Calibration:
    """The last ``window`` pairs, and the curve through them from a logit to a probability.

    An answer is good with P = σ(slope·logit + shift), Platt's line (1999); a label says "good" with
    slips + (1 - 2·slips)·P, since people slip now and then, so that no label is ever sure (the lapse rate of a
    psychometric function; Wichmann and Hill 2001). After each label all three move by Fisher scoring towards the
    likeliest, held by a Gaussian prior around START.
    """

    START = 1.0, 0.0, 0.05
    PRIOR = 20.0, 20.0, 1000.0  # precisions: the first two are worth about twenty labels
    LEAST, MOST = (0.1, -5.0, 0.0), (10.0, 5.0, 0.2)

    def __init__(self, window: int, topics: int = 1) -> None:
        self.window = window
        self._kept = np.zeros((3, 2 * window))  # logit, predicted, label: in order, from _first to _end
        self._first = self._end = 0
        self.curve = np.array(self.START)
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
        self.curve = np.array(self.START)
        self.shares = Shares(len(self.shares.means))
        if len(self.pairs) >= FEWEST:
            for _ in range(REFIT):
                self._fit()

    def _fit(self) -> None:
        logits, _, labels = self._kept[:, self._first : self._end]
        slope, shift, slips = curve = self.curve.tolist()
        sure = np.tanh(slope / 2 * logits + shift / 2)  # -1: bad, 1: good; P(good) is half of it and a half
        heard = (1 - 2 * slips) * sure
        slopes = np.empty((4, len(sure)))  # of P(a label says good), by each parameter; last, how far it was off
        np.multiply(0.25 - 0.5 * slips, 1 - sure * sure, out=slopes[1])
        np.multiply(slopes[1], logits, out=slopes[0])
        np.negative(sure, out=slopes[2])
        np.subtract(labels - 0.5, 0.5 * heard, out=slopes[3])
        known = (slopes[:3] / (0.25 + 1e-6 - 0.25 * heard * heard) @ slopes.T).tolist()
        for i, row in enumerate(known):
            row[i] += self.PRIOR[i]
            row[3] -= self.PRIOR[i] * (curve[i] - self.START[i])
        moved = [before + step for before, step in zip(curve, solved(known), strict=True)]
        if all(map(math.isfinite, moved)):
            bounds = zip(moved, self.LEAST, self.MOST, strict=True)
            self.curve = np.array([min(max(one, least), most) for one, least, most in bounds])

    def line(self, logits: Any, topics: Any = None) -> Any:
        """Calibrated logits of being good, of answers to prompts of these topics (n,); None: by the line of all."""
        slope, shift = self.curve[:2] if topics is None else (self.curve[:2] + self.shares.means[topics]).T
        return np.maximum(slope, self.LEAST[0]) * logits + shift

    def good(self, logits: list[float], topic: int) -> float:
        """P(the answer is good), mean of the members' logits: what ``line`` says, for one answer, without arrays."""
        (slope, shift, _), (more, further) = self.curve.tolist(), self.shares.means[topic].tolist()
        slope = max(slope + more, self.LEAST[0])
        return sum(sigmoid(slope * logit + (shift + further)) for logit in logits) / len(logits)

    def heard(self, good: float) -> float:
        """The probability that a label says "good" of an answer that is good with this probability."""
        slips = float(self.curve[2])
        return slips + (1 - 2 * slips) * good

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
