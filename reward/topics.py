"""Which topic a prompt is of: the nearest of a few directions that were taken from the stream itself.

A prompt that lies far from every centre becomes one, as long as there is room (leader clustering; Hartigan 1975). A
centre never moves, so a lesson's topic is the same for ever, and only a new centre is ever written to the state.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]
MOST = 16
NEAR = 0.4  # cosine at which a prompt is of a centre's topic


class Topics:
    """Centres: unit vectors (topics, size), in the order in which they were made."""

    def __init__(self, size: int) -> None:
        self.centres = np.zeros((0, size), np.float32)

    def of(self, prompts: Array) -> Any:
        """The topic of each prompt (n, size), from 0 on; 0 where there are none yet."""
        if not len(self.centres):
            return np.zeros(len(prompts), np.int64)
        return (prompts @ self.centres.T).argmax(1)

    def place(self, prompt: Array) -> int:
        """The topic of a prompt (size,) that is learned from; it may found one."""
        near = self.centres @ prompt
        if len(near) == MOST or (near.size and near.max() >= NEAR):
            return int(near.argmax())
        self.centres = np.concatenate([self.centres, prompt[None]])
        return len(self.centres) - 1
