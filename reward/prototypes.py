"""What is remembered of answers that come again: which prompts each was right for, and which not.

An agent that picks among recurring answers (a topic, a tool, a stock reply) is judged far sooner by comparing a
prompt with the centroid of those for which the answer was rated well (a prototype; Snell et al. 2017,
arXiv:1703.05175) than by any trained weight. An answer's own vector stands in for a few well-rated prompts, so an
answer that was never rated is judged by how near it lies to the prompt.

Every member of the ensemble keeps its own centroids, over its own bootstrap share of the labels, and trusts an
answer's own vector for a different number of prompts; where they disagree, too little was seen. All sums: the
state is the same in every order of the labels, up to rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]
OWN_WEIGHT = (1.0, 4.0)  # well-rated prompts that the answer's own vector stands for: least and most trusting member
SHARPNESS = 20.0  # of the choice among answers: logits per unit of cosine
SUPPORTED = 0.3  # scale of the feature "support"
BAD_PRIOR = 3.0  # badly rated prompts after which their centroid has half its weight
NAMES = ("rival", "similarity", "badly_rated", "rate", "support", "chosen")
FEATURES = len(NAMES)


def key_of(answer: str) -> bytes:
    """Answers are the same where their words are, whatever the white space around them."""
    return hashlib.blake2b(" ".join(answer.split()).encode("utf-8", "replace"), digest_size=16).digest()


def _together(fit: Array) -> Array:
    """The logarithm of the sum of exponentials over the answers: (answers, heads, n) to (heads, n).

    Vectors are of length 1, so a fit is SHARPNESS at most, and no exponential too large.
    """
    found: Array = np.log(np.add.reduce(np.exp(fit)))
    return found


class Prototypes:
    """Centroids of at most ``capacity`` answers, for ``heads`` members, over vectors of ``size`` dimensions.

    Beyond the capacity the answer with the fewest labels makes room, that of the lowest row among equals.
    """

    def __init__(self, heads: int, size: int, capacity: int = 512) -> None:
        self.heads, self.size, self.capacity = heads, size, capacity
        self.rows: dict[bytes, int] = {}
        self.keys: list[bytes] = []  # of each row
        self.own = np.zeros((0, size), np.float32)
        self._sums = np.zeros((0, 2, heads, size), np.float32)  # of the vectors of prompts, rated good and bad
        self.counts = np.zeros((2, heads, 0), np.float32)  # weights of good and bad labels
        self._trust = np.geomspace(*OWN_WEIGHT, heads).astype(np.float32)[:, None]
        self.totals = np.zeros((2,), np.float32)  # of good and bad labels over all answers
        self._centres = np.zeros((0, heads, size), np.float32)  # rows together, so that one product compares all
        self._faults = np.zeros((0, heads, size), np.float32)

    @property
    def good(self) -> Array:
        """Sums of the vectors of the prompts that each answer was good for, (heads, rows, size): a view."""
        return self._sums[:, 0].transpose(1, 0, 2)

    @property
    def bad(self) -> Array:
        """The same of those that it was bad for."""
        return self._sums[:, 1].transpose(1, 0, 2)

    def _room(self, width: int) -> None:
        """Grow the arrays to ``width`` rows."""
        more = width - self.own.shape[0]
        pad = ((0, more), (0, 0), (0, 0))
        self.own = np.pad(self.own, pad[:2])
        self._sums = np.pad(self._sums, (*pad, (0, 0)))
        self._centres, self._faults = np.pad(self._centres, pad), np.pad(self._faults, pad)
        self.counts = np.pad(self.counts, ((0, 0), (0, 0), (0, more)))

    def _row(self, key: bytes, own: Array) -> int:
        """The row of an answer, made or taken from the least labelled other one if it is new."""
        if key in self.rows:
            return self.rows[key]
        row = len(self.rows)
        if row == self.capacity:
            row = int(self.counts.sum((0, 1)).argmin())
            del self.rows[self.keys[row]]
        self._place(row, key, own, 0, 0, 0)
        return row

    def put(self, row: int, key: bytes, own: Array, good: Array, bad: Array, counts: Array) -> None:
        """Set one row: the answer's own vector (size,), sums (heads, size), weights (2, heads). No row is left out."""
        self._place(row, key, own, good, bad, counts)
        self._refresh(row)

    def _place(self, row: int, key: bytes, own: Array, good: Any, bad: Any, counts: Any) -> None:
        if row >= self.own.shape[0]:
            self._room(min(max(16, 2 * row), self.capacity))
        if row == len(self.keys):
            self.keys.append(key)
        self.rows[key], self.keys[row] = row, key
        self.own[row], self._sums[row, 0], self._sums[row, 1] = own, good, bad
        self.counts[:, :, row] = counts

    def _refresh(self, row: int) -> None:
        good, bad = both = self._sums[row].copy()
        good += self._trust * self.own[row]
        length = np.maximum(np.sqrt(np.vecdot(both, both)), 1e-12)[:, :, None]
        heard = self.counts[1, :, row, None]
        np.divide(good, length[0], out=self._centres[row])
        np.multiply(bad, heard / (heard + BAD_PRIOR) / length[1], out=self._faults[row])

    def add(self, answer: bytes, own: Array, prompt: Array, members: Array, good: float, bad: float) -> int:
        """Learn that ``prompt`` was judged good and bad with these weights for an answer (its key and own vector).

        ``members`` (heads,) is 1 for the members that see this label, 0 for the others. Returns the changed row.
        """
        row = self._row(answer, own)
        both = np.array([[good], [bad]], np.float32)
        weights = both * members
        self._sums[row] += weights[:, :, None] * prompt
        self.counts[:, :, row] += weights
        self.totals += both[:, 0]
        self._refresh(row)
        return row

    def remove(self, answer: bytes, own: Array, prompt: Array, members: Array, good: float, bad: float) -> int | None:
        """Take back what :meth:`add` did with these values; None where the answer made room since, and it with it."""
        row = self.rows.get(answer)
        if row is None or (self.counts[:, :, row] + 1e-3 < np.outer((good, bad), members)).any():
            return None
        self.add(answer, own, prompt, members, -good, -bad)
        self.counts[:, :, row] = np.maximum(self.counts[:, :, row], 0)  # rounding
        self._refresh(row)
        return row

    @np.errstate(invalid="ignore")  # vectors that are not finite give features that are not: the caller looks
    def features(self, prompts: Array, which: Array, answers: Sequence[bytes], own: Array, pairs: Array) -> Array:
        """What is known about each (prompt, answer): float32 of shape (heads, pairs, FEATURES).

        Args:
            prompts: vectors of the distinct prompts, (n, size); ``which`` (pairs,) is the row of each pair's.
            answers: keys of the distinct answers; own: their vectors, (m, size); pairs: row of each pair's.
        """
        rows = [self.rows.get(key, -1) for key in answers]
        at = np.array(rows, np.int64).take(pairs)
        mine, among, faults, good, bad = looked = np.zeros((5, self.heads, len(at)), np.float32)
        asked = prompts.take(which, 0)
        if width := len(self.rows):
            fit = self._centres[:width].reshape(-1, self.size) @ (SHARPNESS * prompts.T)
            fit = fit.reshape(width, self.heads, len(prompts))
            mine[:], among[:] = fit[at, :, which].T, _together(fit).take(which, 1)
            faults[:] = (self._faults[at] @ asked[:, :, None])[:, :, 0].T
            looked[3:] = self.counts[:, :, at]
        else:
            among[:] = -np.inf
        if -1 in rows:  # of these nothing is known but their own vectors
            new = np.flatnonzero(at < 0)
            near = SHARPNESS * np.vecdot(asked[new], own[pairs[new]])
            mine[:, new], among[:, new] = near, np.logaddexp(among[:, new], near)
            looked[2:, :, new] = 0
        goods, bads = self.totals.tolist()
        base = (goods + 1) / (goods + bads + 2)
        lead = mine - among
        found = np.empty((self.heads, len(at), FEATURES), np.float32)
        found[..., 0] = np.maximum(lead, -8.0)
        found[..., 1] = mine / SHARPNESS - 0.5
        found[..., 2] = faults
        found[..., 3] = np.log((good + 2 * base) / (bad + 2 * (1 - base)))
        found[..., 4] = SUPPORTED * np.log1p(good)
        found[..., 5] = np.exp(lead)
        return found

    def pack(self, row: int) -> bytes:
        """One row as bytes, for a durable state that is written row by row."""
        parts = (self.own[row], self.good[:, row], self.bad[:, row], self.counts[:, :, row])
        return self.keys[row] + b"".join(np.ascontiguousarray(part, "<f4").tobytes() for part in parts)

    def unpack(self, row: int, packed: bytes) -> None:
        """Take back what :meth:`pack` gave, rows in ascending order. Raises ValueError where it has another size."""
        heads, size = self.heads, self.size
        if row != len(self.rows) or len(packed) != 16 + 4 * (size + 2 * heads * size + 2 * heads):
            raise ValueError(f"row {row} of {len(packed)} bytes does not continue prototypes of {heads} heads x {size}")
        numbers = np.frombuffer(packed[16:], "<f4")
        own, good, bad, counts = np.split(numbers, np.cumsum([size, heads * size, heads * size]))
        good, bad = good.reshape(heads, size), bad.reshape(heads, size)
        self.put(row, packed[:16], own, good, bad, counts.reshape(2, heads))
