"""How a canary's interval went over time: a bounded series of points, for the page of evidence.

Folded from the traffic as it is read, so a restart that reads it again has the same line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

MOST = 160  # points; beyond it every second one goes


@dataclass
class History:
    """``points``: [seconds since 1970, difference, lower bound, upper bound, rated units of both arms]."""

    points: list[list[float]] = field(default_factory=list)
    _every: int = 1
    _skipped: int = 0

    def add(self, time: float, bounds: tuple[float, float, float], units: int) -> None:
        """A look; one that shows no new unit, or comes between points that are kept, leaves no point."""
        if math.isnan(bounds[0]) or (self.points and units <= self.points[-1][4]):
            return
        self._skipped += 1
        if self._skipped < self._every:
            return
        self._skipped = 0
        self.points.append([round(time, 1), *(round(value, 5) for value in bounds), float(units)])
        if len(self.points) > MOST:
            self.points = self.points[::2]
            self._every *= 2
