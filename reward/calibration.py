"""How good predictions were that were made before their labels were known, and the correction that follows.

Predict-then-learn: the model first says what it expects, then sees the label. AUC and calibration error over the
recent window of such pairs are honest, since no label was learned before it was predicted.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
FEWEST = 20  # pairs below which nothing is said
BINS = 10


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


class Calibration:
    """The last ``window`` (logit, label) pairs, and Platt's line through them: probability = σ(slope·logit + shift).

    The line is pulled towards (1, 0) by a Gaussian prior worth about ``PRIOR`` labels, and refitted by Newton's
    method from where it was after each label (Platt 1999).
    """

    PRIOR = 20.0
    STEPS = 2

    def __init__(self, window: int) -> None:
        self.pairs: deque[tuple[float, float, float]] = deque(maxlen=window)  # logit, predicted, label
        self.slope = 1.0
        self.shift = 0.0

    def add(self, logit: float, predicted: float, label: float) -> None:
        self.pairs.append((logit, predicted, label))
        if len(self.pairs) >= FEWEST:
            self._fit()

    def _fit(self) -> None:
        logits, _, labels = np.array(self.pairs, np.float64).T
        at = np.array([self.slope, self.shift])
        design = np.stack([logits, np.ones_like(logits)])
        for _ in range(self.STEPS):
            expected = 1 / (1 + np.exp(-np.clip(at @ design, -30, 30)))
            gradient = design @ (expected - labels) + self.PRIOR * (at - [1.0, 0.0])
            curvature = (design * (expected * (1 - expected))) @ design.T + self.PRIOR * np.eye(2)
            at = at - np.linalg.solve(curvature, gradient)
        if np.isfinite(at).all():
            self.slope, self.shift = float(np.clip(at[0], 0.1, 10.0)), float(np.clip(at[1], -5.0, 5.0))

    def line(self, logits: Any) -> Any:
        return self.slope * logits + self.shift

    def _columns(self) -> tuple[Array, Array]:
        _, predicted, labels = np.array(self.pairs, np.float64).reshape(-1, 3).T
        return predicted, labels

    @property
    def auc(self) -> float | None:
        """Over the window; None: too few, or labels of one kind alone."""
        return auc(*self._columns()) if len(self.pairs) >= FEWEST else None

    @property
    def error(self) -> float | None:
        """Expected calibration error over the window; None: too few."""
        return calibration_error(*self._columns()) if len(self.pairs) >= FEWEST else None
