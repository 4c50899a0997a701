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


def _units(vectors: Array) -> Array:
    norms = np.sqrt(np.einsum("...d,...d->...", vectors, vectors))[..., None]
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 1e-12)


def _together(fit: Array) -> Array:
    """The logarithm of the sum of exponentials over the answers: (answers, heads, n) to (heads, n)."""
    most: Array = fit.max(axis=0)
    return most + np.log(np.exp(fit - most).sum(axis=0))


class Prototypes:
    """Centroids of at most ``capacity`` answers, for ``heads`` members, over vectors of ``size`` dimensions.

    Beyond the capacity the answer with the fewest labels makes room, that of the lowest row among equals.
    """

    def __init__(self, heads: int, size: int, capacity: int = 512) -> None:
        self.heads, self.size, self.capacity = heads, size, capacity
        self.rows: dict[bytes, int] = {}
        self.keys: list[bytes] = []  # of each row
        self.own = np.zeros((0, size), np.float32)
        self.good = np.zeros((heads, 0, size), np.float32)  # sums of prompt vectors
        self.bad = np.zeros((heads, 0, size), np.float32)
        self.counts = np.zeros((2, heads, 0), np.float32)  # weights of good and bad labels
        self._trust = np.geomspace(*OWN_WEIGHT, heads).astype(np.float32)[:, None]
        self.totals = np.zeros((2,), np.float32)  # of good and bad labels over all answers
        self._centres = np.zeros((0, heads, size), np.float32)  # rows together, so that one product compares all
        self._faults = np.zeros((0, heads, size), np.float32)

    def _room(self, width: int) -> None:
        """Grow the arrays to ``width`` rows."""
        more = width - self.own.shape[0]
        pad = ((0, 0), (0, more), (0, 0))
        self.own = np.pad(self.own, pad[1:])
        self.good, self.bad = np.pad(self.good, pad), np.pad(self.bad, pad)
        pad = ((0, more), (0, 0), (0, 0))
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
        self.own[row], self.good[:, row], self.bad[:, row] = own, good, bad
        self.counts[:, :, row] = counts

    def _refresh(self, row: int) -> None:
        self._centres[row] = _units(self.good[:, row] + self._trust * self.own[row])
        bad = self.counts[1, :, row, None]
        self._faults[row] = _units(self.bad[:, row]) * bad / (bad + BAD_PRIOR)

    def add(self, answer: bytes, own: Array, prompt: Array, members: Array, good: float, bad: float) -> int:
        """Learn that ``prompt`` was judged good and bad with these weights for an answer (its key and own vector).

        ``members`` (heads,) is 1 for the members that see this label, 0 for the others. Returns the changed row.
        """
        row = self._row(answer, own)
        goods, bads = np.float32(good) * members, np.float32(bad) * members
        self.good[:, row] += np.outer(goods, prompt)
        self.bad[:, row] += np.outer(bads, prompt)
        self.counts[:, :, row] += (goods, bads)
        self.totals += np.array([good, bad], np.float32)
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
        width = len(self.rows)
        rows = np.array([self.rows.get(key, -1) for key in answers], np.int64)[pairs]
        known = rows >= 0
        at = np.maximum(rows, 0)
        asked = prompts[which]
        fit = self._centres[:width].reshape(-1, self.size) @ (SHARPNESS * prompts.T)
        fit = fit.reshape(width, self.heads, len(prompts))
        near = SHARPNESS * np.einsum("pd,pd->p", asked, own[pairs])
        rivals = _together(fit)[:, which] if width else np.full((self.heads, len(which)), -np.inf)
        mine = np.where(known, fit[at, :, which].T, near) if width else np.broadcast_to(near, rivals.shape)
        faults = np.einsum("pd,phd->hp", asked, self._faults[at]) if width else rivals
        among = np.where(known, rivals, np.logaddexp(rivals, near))
        good, bad = self.counts[:, :, at] * known if width else np.zeros((2, *rivals.shape))
        base = (self.totals[0] + 1) / (self.totals.sum() + 2)
        found = np.empty((self.heads, len(which), FEATURES), np.float32)
        found[..., 0] = np.maximum(mine - among, -8.0)
        found[..., 1] = mine / SHARPNESS - 0.5
        found[..., 2] = np.where(known, faults, 0.0)
        found[..., 3] = np.log((good + 2 * base) / (bad + 2 * (1 - base)))
        found[..., 4] = SUPPORTED * np.log1p(good)
        found[..., 5] = np.exp(mine - among)
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
