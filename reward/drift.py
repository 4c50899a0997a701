"""Whether what comes in, what people say, or what the model's probabilities mean has changed; each by itself.

- **inputs**: four fixed projections of the prompts' vectors: other things are asked
- **labels**: the labels themselves: answers are rated better or worse
- **calibration**: labels less what was foretold, as they are and turned towards the model's side: a label no longer
  means what the model has learned. Labels that fall because answers got worse, as foretold, are no drift of this kind.

Each is watched by ADWIN (Bifet and Gavaldà 2007): the newest values are split wherever their means differ by more
than chance, so nothing is to be chosen but how rare a false alarm shall be. Values are kept as bytes, at most 2·SPAN of
each, and a detector goes on from exactly those after a restart: the same records give the same alarms.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from river._river_rust.drift import AdaptiveWindowing  # river.drift would bring pandas and scikit-learn: seconds

Array = np.ndarray[Any, np.dtype[np.float32]]
PROJECTIONS = 4
STEEP = 1.7  # of the logistic that brings a projection between 0 and 1
WATCHED = {"inputs": PROJECTIONS, "labels": 1, "calibration": 2}  # detectors of each kind
DELTA = 2e-4  # ADWIN's confidence, shared by the detectors of a kind
CHECK, LEAST, FEWEST = 16, 30, 100  # values between looks; in each part of a split; before the first look
SPAN = 512  # newest values that a detector goes on from when it has 2·SPAN


class Detector:
    """One series of numbers from 0 to 1."""

    def __init__(self, delta: float) -> None:
        self.values = bytearray()
        self._delta = delta
        self._begin()

    def _begin(self) -> None:
        self._window = AdaptiveWindowing(
            delta=self._delta, clock=CHECK, max_buckets=5, min_window_length=LEAST, grace_period=FEWEST
        )
        for value in self.values:
            self._window.update(value / 255)

    def resume(self, values: bytes) -> None:
        self.values[:] = values
        self._begin()

    def add(self, value: float) -> bool:
        """Whether it changed; if so, it begins anew. What is not finite is not counted."""
        if not math.isfinite(value):
            return False
        if len(self.values) == 2 * SPAN:
            self.resume(bytes(self.values[-SPAN:]))
        self.values.append(round(255 * min(max(value, 0.0), 1.0)))
        changed = bool(self._window.update(self.values[-1] / 255))
        if changed:
            self.resume(b"")
        return changed


class Drift:
    """The detectors of one model. ``counts``: alarms so far, by kind."""

    def __init__(self, size: int) -> None:
        self.counts = dict.fromkeys(WATCHED, 0)
        self._directions = np.random.default_rng(0).normal(size=(PROJECTIONS, size)).astype(np.float32)
        self._detectors = {kind: [Detector(DELTA / many) for _ in range(many)] for kind, many in WATCHED.items()}

    def asked(self, prompt: Array) -> list[str]:
        """One more prompt's vector (size,); the kinds that changed with it."""
        across = 1 / (1 + np.exp(-STEEP * np.clip(self._directions @ prompt, -9, 9)))
        return self._seen("inputs", across.tolist())

    def told(self, label: float, foretold: float) -> list[str]:
        """One more label, 0 to 1, and what had been expected of it; the kinds that changed with it."""
        off = label - foretold
        towards = off if foretold > 0.5 else -off
        return self._seen("labels", [label]) + self._seen("calibration", [(1 + off) / 2, (1 + towards) / 2])

    def _seen(self, kind: str, values: list[float]) -> list[str]:
        changed = [detector.add(value) for detector, value in zip(self._detectors[kind], values, strict=True)]
        if not any(changed):
            return []
        self.counts[kind] += 1
        for detector in self._detectors[kind]:
            detector.resume(b"")
        return [kind]

    def pack(self) -> bytes:
        """Every detector's values, each after its length as two bytes."""
        held = [bytes(detector.values) for kind in WATCHED for detector in self._detectors[kind]]
        return b"".join(len(values).to_bytes(2, "little") + values for values in held)

    def unpack(self, packed: bytes) -> None:
        """Take back what :meth:`pack` gave. Raises ValueError where it is cut short."""
        at = 0
        for detector in (detector for kind in WATCHED for detector in self._detectors[kind]):
            length = int.from_bytes(packed[at : at + 2], "little")
            values, at = packed[at + 2 : at + 2 + length], at + 2 + length
            if len(values) != length or length > 2 * SPAN:
                raise ValueError(f"{len(packed)} bytes of drift end too soon")
            detector.resume(values)
        if at != len(packed):
            raise ValueError(f"{len(packed)} bytes of drift where {at} belong")
