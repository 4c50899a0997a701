"""What a comment says of an answer, read by the encoder and learned from people who also said it plainly.

A comment that came with a thumb or a rating of the same person about the same answer, or with an outcome of that
answer, is an example of what such words mean. The newest MOST examples are kept as vectors, and a line through them
(ridge regression, from a vector to -1 … 1) reads all others. A comment is read once, before anything is learned of it;
so how far readings are right (the source ``comment``; :mod:`reward.reliability`) is found on comments that were new.

An example whose words are withdrawn or revised is taken out, and the line is what it would be without it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from everloop.feedback import Feedback, FeedbackKind

Array = np.ndarray[Any, np.dtype[np.float32]]
MOST = 512  # examples: 0.8 MB of vectors
FEWEST, FEWEST_OF_A_KIND = 20, 5  # examples before anything is read
RIDGE = 0.2  # how much is lost for a steep line, in squared errors of one example
CHARS = 2000  # of a comment
PLAIN = (FeedbackKind.THUMB, FeedbackKind.RATING)
MARK = struct.Struct("<Qf")  # an example's name and value


class Comments:
    """The examples and the line through them. A slot is overwritten by the example that comes MOST later."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.vectors = np.zeros((0, size), np.float32)
        self.values = np.zeros(0, np.float32)  # -1 … 1; NaN: taken out
        self.changed: set[int] = set()
        self._names: list[int] = []
        self._line: Array | None = np.zeros(size + 1, np.float32)

    def learn(self, name: str, vector: Array, value: float) -> None:
        """``value``: 0 to 1, what was said plainly. A name that is known already must be forgotten first."""
        self._put(self.count % MOST, _number(name), vector, 2 * value - 1)
        self.count += 1

    def forget(self, name: str) -> None:
        """Take an example out; one that is not there any more is nothing."""
        if (number := _number(name)) in self._names:
            slot = self._names.index(number)
            self._put(slot, 0, np.zeros_like(self.vectors[slot]), float("nan"))

    def _put(self, slot: int, number: int, vector: Array, value: float) -> None:
        if slot == len(self.values):
            self.vectors = np.concatenate([self.vectors, vector[None]])
            self.values = np.append(self.values, np.float32(value))
            self._names.append(number)
        self.vectors[slot], self.values[slot], self._names[slot] = vector, value, number
        self.changed.add(slot)
        self._line = None

    @property
    def line(self) -> Array:
        """(size + 1,) weights and shift; zeros while there are too few examples, and nothing is read."""
        if self._line is None:
            self._line = _fitted(self.vectors, self.values)
        return self._line

    @line.setter
    def line(self, line: Array) -> None:
        self._line = np.array(line, np.float32)

    def read(self, vector: Array) -> float | None:
        """P(the answer is good) as far as the comment says; None: nothing was learned yet."""
        line = self.line
        if not line.any():
            return None
        return float(np.clip(0.5 + (line[:-1] @ vector + line[-1]) / 2, 0.0, 1.0))

    def pack(self, slot: int) -> bytes:
        held = MARK.pack(self._names[slot], float(self.values[slot]))
        return held + np.ascontiguousarray(self.vectors[slot], "<f4").tobytes()

    def unpack(self, slot: int, packed: bytes) -> None:
        """Take what :meth:`pack` gave, slot by slot from 0 on. Raises ValueError where it is none."""
        number, value = MARK.unpack_from(packed)
        vector = np.frombuffer(packed[MARK.size :], "<f4").astype(np.float32)
        if vector.shape != self.vectors.shape[1:] or slot > len(self.values):
            raise ValueError(f"a comment of {len(packed)} bytes in slot {slot}")
        self._put(slot, number, vector, value)
        self.changed.discard(slot)


def read_new(model: Any, words: Sequence[Feedback], call: dict[str, Any]) -> None:
    """Note in ``call`` under ``read``, by id, what the model makes of each comment that it has not read before."""
    texts = {word.id: word.text or "" for word in words if is_one(word)}
    before = call.get("read", {})
    read = {name: before[name] if name in before else model.read(text) for name, text in texts.items()}
    if read or before:
        call["read"] = read


def learn(model: Any, about: str, words: Sequence[Feedback], call: dict[str, Any]) -> None:
    """Bring the examples that the comments on an answer are into line with these words, all that stand.

    ``about``: the answer's name. ``call`` remembers under ``examples``, by id, what each was learned as.
    """
    meant = {word.id: (word.text or "", value) for word in words if (value := _meant(word, words)) is not None}
    known: dict[str, float] = call.get("examples", {})
    for name in [name for name, value in known.items() if name not in meant or meant[name][1] != value]:
        model.comments.forget(f"{about}\0{name}")
        del known[name]
    for name, (text, value) in meant.items():
        if name not in known:
            model.comments.learn(f"{about}\0{name}", model.vector(text), value)
            known[name] = value
    if known:
        call["examples"] = known


def is_one(word: Feedback) -> bool:
    return word.kind is FeedbackKind.COMMENT and word.text is not None


def adds(word: Feedback, words: Sequence[Feedback]) -> bool:
    """Whether a comment says more than its writer has said plainly, about the answer or the episode."""
    plain = (*PLAIN, FeedbackKind.CORRECTION)
    return not any(other.rater == word.rater is not None and other.kind in plain for other in words)


def _meant(comment: Feedback, words: Sequence[Feedback]) -> float | None:
    """What the writer of a comment said plainly, 0 to 1, or what was measured; None: neither, or it is no comment."""
    if not is_one(comment):
        return None
    own = [w for w in words if w.kind in PLAIN and w.source is None and w.rater == comment.rater is not None]
    said = own or [w for w in words if w.kind is FeedbackKind.OUTCOME]
    values = [w.success for w in said if w.success is not None]
    return sum(values) / len(values) if values else None


def _number(name: str) -> int:
    """Never 0."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") | 1


def _fitted(vectors: Array, values: Array) -> Array:
    """The line through the examples, as seen from their mean: weights and shift."""
    line = np.zeros(vectors.shape[1] + 1, np.float32)
    there = np.isfinite(values)
    seen, said = vectors[there].astype(np.float64), values[there].astype(np.float64)
    good = int((said > 0).sum())
    if len(said) < FEWEST or min(good, len(said) - good) < FEWEST_OF_A_KIND:
        return line
    centre, mean = seen.mean(0), said.mean()
    apart = seen - centre
    shares = np.linalg.solve(apart @ apart.T + RIDGE * np.eye(len(said)), said - mean)
    line[:-1] = shares @ apart
    line[-1] = mean - line[:-1] @ centre
    return line
