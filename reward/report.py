"""How good a reward model is, slice by slice, from what it foretold before it learned what people then said.

Pure: rows in, numbers out. A row is one call with its newest opinion, and with its first label where it has one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward.calibration import BINS, FEWEST, auc, calibration_error
from reward.features import style_vector
from reward.release import correlation

Array = np.ndarray[Any, np.dtype[np.float64]]
ROLLING = 100  # labels of each point of AUC over time


@dataclass(frozen=True)
class Row:
    """One scored call, its texts as the reward model sees them. ``label`` and ``predicted``: of its first label,
    predicted before that was learned.

    ``reward_version`` scored when the label came, or else last; ``time`` in seconds since 1970; ``newest``: what its
    newest label says. ``ends_well_before`` and ``ends_well_after``: as its score has them. ``ended``: what its episode
    of ``turns`` turns came to.
    """

    episode: str
    call: str
    turn: int
    answer: str
    adapter: str
    reward_version: str
    mask: bool
    time: float
    label: float | None = None
    predicted: float | None = None
    prompt: str = ""
    newest: float | None = None
    turns: int = 1
    ends_well_before: float | None = None
    ends_well_after: float | None = None
    ended: float | None = None


STAGES = {"a quarter of its turns": 0.25, "half of them": 0.5, "three quarters": 0.75, "all of them": 1.0}


def courses(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By how far an episode of several turns was: how many whose end is known, and AUC of what was foretold of it.

    AUC is None where there are too few to say. Nothing where no end was foretold.
    """
    known: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row.turns > 1 and row.ended is not None and row.ends_well_after is not None:
            known.setdefault(row.episode, {}).setdefault(row.turn, row)
    firsts = [its[0] for its in known.values() if 0 in its]
    found = {"before the first answer": [(row.ends_well_before, row.ended) for row in firsts]}
    for name, share in STAGES.items():
        there = [its.get(max(1, math.ceil(share * next(iter(its.values())).turns)) - 1) for its in known.values()]
        found[name] = [(row.ends_well_after, row.ended) for row in there if row is not None]
    return {name: {"episodes": len(pairs), "auc": _auc(pairs)} for name, pairs in found.items() if pairs}


def _auc(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    if len(pairs) < FEWEST:
        return None
    said, was = np.array(pairs, np.float64).T
    return auc(said, was)


def numbers(rows: Sequence[Row]) -> dict[str, Any]:
    """Of some calls; None: too few labels to say.

    ``coverage``: share with an opinion. ``drift``: by how much labels came to exceed what was foretold, newer half
    less older half. ``length_correlation``: of what was foretold with the logarithm of the answer's length.
    """
    rated = sorted((row for row in rows if row.label is not None and row.predicted is not None), key=lambda r: r.time)
    predicted = np.array([row.predicted for row in rated], np.float64)
    labels = np.array([row.label for row in rated], np.float64)
    enough = len(rated) >= FEWEST
    half = len(rated) // 2
    apart = labels - predicted
    lengths = np.array([style_vector(row.answer)[0] for row in rated], np.float64)
    return {
        "calls": len(rows),
        "labels": len(rated),
        "good": float(labels.mean()) if rated else None,
        "auc": auc(predicted, labels) if enough else None,
        "calibration_error": calibration_error(predicted, labels) if enough else None,
        "coverage": sum(row.mask for row in rows) / len(rows) if rows else None,
        "drift": float(apart[half:].mean() - apart[:half].mean()) if len(rated) >= 2 * FEWEST else None,
        "length_correlation": correlation(predicted, lengths) if enough else None,
    }


def diagram(rows: Sequence[Row]) -> list[tuple[float, float, int]]:
    """Mean foretold, share of good labels and labels, over bins of equal counts: a calibrated model's are equal."""
    rated = [(row.predicted, row.label) for row in rows if row.label is not None and row.predicted is not None]
    pairs = np.array(sorted(rated), np.float64).reshape(-1, 2)
    parts = [part for part in np.array_split(pairs, min(BINS, max(len(pairs), 1))) if len(part)]
    return [(float(part[:, 0].mean()), float(part[:, 1].mean()), len(part)) for part in parts]


def over_time(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(time, AUC of the newest ROLLING labels), a point for every tenth of them."""
    rated = sorted((row for row in rows if row.label is not None and row.predicted is not None), key=lambda r: r.time)
    points = []
    for end in range(min(ROLLING, len(rated)), len(rated) + 1, ROLLING // 10):
        part = rated[max(0, end - ROLLING) : end]
        if len(part) >= FEWEST:
            columns = np.array([(row.predicted, row.label) for row in part], np.float64).T
            value = auc(*columns)
            if value is not None:
                points.append((part[-1].time, value))
    return points


def drawn(rows: Sequence[Row], title: str, path: Any) -> None:
    """A reliability diagram and AUC over time, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = diagram(rows)
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    left.plot([one[0] for one in bins], [one[1] for one in bins], marker="o")
    left.set(
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        xlabel="foretold",
        ylabel="said to be good",
        title=f"{title}: reliability",
    )
    points = over_time(rows)
    seconds = [at - points[0][0] for at, _ in points]
    unit, size = ("hours", 3600.0) if seconds and seconds[-1] > 7200 else ("minutes", 60.0)
    right.plot([second / size for second in seconds], [value for _, value in points], marker=".")
    right.axhline(0.5, color="0.7", linewidth=1)
    right.set(xlabel=unit, ylabel=f"AUC of the newest {ROLLING} labels", ylim=(0.3, 1.02), title="predict-then-learn")
    figure.savefig(path, format="png", dpi=120)
