"""What an operator and the learner watch beside AUC: the mean reward and the share of thumbs up, and their fall.

Two windows, one after the other: the newest N values against the N before them. A fall is the older mean less the
newer one, so it is positive where things got worse. Each call counts once, when it is first scored or labelled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

FEWEST = 20  # values in each window below which there is no fall


class Falling:
    """The last 2·``window`` values, halved into an older and a newer part of equal size."""

    def __init__(self, window: int, values: Sequence[float] = ()) -> None:
        self.window = window
        self.values: deque[float] = deque(values, maxlen=2 * window)

    def add(self, value: float) -> None:
        self.values.append(value)

    @property
    def recent(self) -> float | None:
        """Mean of the newest ``window`` values; None: there are none."""
        newest = list(self.values)[-self.window :]
        return sum(newest) / len(newest) if newest else None

    @property
    def fall(self) -> float | None:
        """Older mean less newer mean; None: too few values."""
        values = list(self.values)
        half = min(self.window, len(values) // 2)
        if half < FEWEST:
            return None
        return sum(values[-2 * half : -half]) / half - sum(values[-half:]) / half


class Watch:
    """Rewards and labels of one policy, as they came."""

    def __init__(
        self,
        window: int,
        rewards: Sequence[float] = (),
        labels: Sequence[float] = (),
        rarities: Sequence[float] = (),
        **later: object,
    ) -> None:
        """``rarities``: of the newest labels. ``later``: what a later release watches too."""
        self.rewards = Falling(window, rewards)
        self.labels = Falling(window, labels)
        self.rarities: deque[float] = deque(rarities, maxlen=window)

    def label(self, value: float, rarity: float) -> None:
        """The first label of a call, and for how many times the calls it stands (:mod:`reward.propensity`)."""
        self.labels.add(value)
        self.rarities.append(rarity)

    @property
    def success(self) -> float | None:
        """Estimated mean of all calls, those that nobody spoke of too, 0 to 1; None: no labels."""
        newest = list(self.labels.values)[-len(self.rarities) :] if self.rarities else []
        worth = sum(self.rarities)
        return (
            sum(label * rarity for label, rarity in zip(newest, self.rarities, strict=True)) / worth if worth else None
        )

    def dump(self) -> dict[str, list[float]]:
        """What the constructor takes back."""
        return {
            "rewards": list(self.rewards.values),
            "labels": list(self.labels.values),
            "rarities": list(self.rarities),
        }

    def status(self) -> dict[str, Any]:
        return {
            "reward_mean": self.rewards.recent,
            "reward_fall": self.rewards.fall,
            "thumbs_up_share": self.labels.recent,
            "success_estimate": self.success,
            "thumbs_up_fall": self.labels.fall,
        }
