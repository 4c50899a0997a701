"""Over-optimisation: the reward model is pleased more and more, and people are not. Windows in, a verdict out; pure.

A window is one training run whose candidate was examined: what the run gained by the reward model's word (the proxy),
and what its candidate gained over the incumbent on gold. A measure that is optimised stops to be a good one (Goodhart;
Gao et al. 2023, arXiv:2210.10760, for reward models): where the proxy rose and gold did not, for WINDOWS windows one
after the other, training stops until a person has looked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

WINDOWS = 2
RISE = 0.01
"""Of the mean reward (-1 to 1): below it, the proxy did not rise."""


class Window(NamedTuple):
    """``proxy``: gain of the mean reward, -2 to 2. ``gold``: gain of the share of right answers, -1 to 1, over
    ``items`` gold items. ``time``: of the gold, seconds since 1970.
    """

    run: str
    proxy: float
    gold: float
    items: int
    time: float


def parted(window: Window) -> bool:
    """Whether the proxy rose and gold did not. What is not a finite number tells nothing."""
    return math.isfinite(window.proxy) and math.isfinite(window.gold) and window.proxy > RISE and window.gold <= 0


def verdict(windows: Sequence[Window], since: float = 0.0) -> str | None:
    """Why training must stop, in one sentence; None: it need not. What is not after ``since`` was looked at already."""
    newest = [window for window in windows if window.time > since][-WINDOWS:]
    if len(newest) < WINDOWS or not all(parted(window) for window in newest):
        return None
    told = " and ".join(f"{w.proxy:+.2f} reward, {100 * w.gold:+.1f} gold points over {w.items} items" for w in newest)
    return f"over-optimisation: in {WINDOWS} runs on end the reward model was pleased and gold was not ({told})"
