"""A simulated customer of the bank desk: knows the right topic, and sometimes says so.

Gives a thumb to 60% of the answers, 5% of them the wrong way round, and corrects 5% of the wrong answers. What it
says about a message follows from the seed and the message's number alone, whoever asks first.
"""

from __future__ import annotations

import random
from typing import NamedTuple


class Opinion(NamedTuple):
    """``thumb``: True up, False down, None: silent. ``correction``: the right topic, or None."""

    thumb: bool | None
    correction: str | None


class Customer:
    """Shares, all from 0 to 1: of answers that get a thumb, of thumbs flipped, of wrong answers corrected."""

    def __init__(self, seed: int = 0, thumbs: float = 0.6, flipped: float = 0.05, corrected: float = 0.05) -> None:
        self.seed = seed
        self.thumbs = thumbs
        self.flipped = flipped
        self.corrected = corrected

    def judge(self, number: int, right: str, answer: str) -> Opinion:
        """What the customer of message ``number`` says about the answer."""
        dice = random.Random(f"{self.seed}/{number}")
        speaks, slips, corrects = (dice.random() for _ in range(3))
        is_right = answer.strip() == right
        thumb = (is_right != (slips < self.flipped)) if speaks < self.thumbs else None
        return Opinion(thumb, right if not is_right and corrects < self.corrected else None)

    def name(self, number: int) -> str:
        """Who sent message ``number``: each comes from another customer."""
        return f"customer-{self.seed}-{number}"
