"""What the reward model is measured against: the same stream, learned in three plainer ways.

Each has ``foretell(asked)``, the probability of what is to be told, and ``told(asked)``. For a pair both mean "the
chosen one is better"; a baseline sees a pair from a side that it cannot know.
"""

from __future__ import annotations

import zlib
from collections import Counter
from typing import Any, Protocol

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from reward.features import Example
from reward.model import Label, Pair, Vectors, shared_features
from reward.prototypes import key_of

Array = np.ndarray[Any, np.dtype[np.float64]]
HASHED = 2**18
CROSSED = 24  # words of either text whose combinations are features
RATE = 0.1
FIRST_FIT, REFITS = 64, 16  # things told before the first offline fit; fits over a stream
FEW_ANSWERS = 100  # distinct answers of a stream up to which the offline baseline learns each by itself
STRENGTHS = (0.03, 0.3, 3.0)  # of which the offline baseline takes the best on its newest fifth


class Baseline(Protocol):
    def foretell(self, asked: Label | Pair) -> float: ...

    def told(self, asked: Label | Pair) -> None: ...


def sides(asked: Label | Pair) -> list[Example]:
    """The answers of what is asked: one, or the chosen and the rejected one."""
    if isinstance(asked, Label):
        return [asked.example]
    return [Example(asked.prompt, asked.chosen), Example(asked.prompt, asked.rejected)]


def value(asked: Label | Pair) -> float:
    """What was told: a label's value; of a pair, that its chosen answer is better."""
    return asked.value if isinstance(asked, Label) else 1.0


class Majority:
    """Says how often it was good so far: half of all pairs."""

    def __init__(self) -> None:
        self.good, self.all = 1.0, 2.0

    def foretell(self, asked: Label | Pair) -> float:
        return self.good / self.all if isinstance(asked, Label) else 0.5

    def told(self, asked: Label | Pair) -> None:
        self.good, self.all = self.good + value(asked), self.all + 1


class Words:
    """Hashed words of prompt and answer and their combinations, logistic regression online by AdaGrad."""

    def __init__(self) -> None:
        self.weights, self.sums = np.zeros(HASHED), np.full(HASHED, 1e-8)
        self._last: tuple[Label | Pair, Array, Array] | None = None

    def _hashed(self, example: Example) -> Counter[int]:
        asked, said = (text.lower().split() for text in (example.prompt, example.answer))
        names = [f"p {word}" for word in asked] + [f"a {word}" for word in said]
        names += [f"{one}|{other}" for one in asked[:CROSSED] for other in said[:CROSSED]] + ["1"]
        return Counter(zlib.crc32(name.encode("utf-8", "replace")) % HASHED for name in set(names))

    def _features(self, asked: Label | Pair) -> tuple[Array, Array]:
        if self._last is None or self._last[0] is not asked:
            counts = self._hashed(sides(asked)[0])
            if isinstance(asked, Pair):
                counts.subtract(self._hashed(sides(asked)[1]))
            present = {at: count for at, count in counts.items() if count}
            at, amount = np.array(list(present), np.int64), np.array(list(present.values()), np.float64)
            self._last = asked, at, amount / max(np.linalg.norm(amount), 1e-9)
        return self._last[1:]

    def foretell(self, asked: Label | Pair) -> float:
        at, amount = self._features(asked)
        return float(1 / (1 + np.exp(-self.weights[at] @ amount)))

    def told(self, asked: Label | Pair) -> None:
        slope = (self.foretell(asked) - value(asked)) * self._features(asked)[1]
        at = self._features(asked)[0]
        self.sums[at] += slope**2
        self.weights[at] -= RATE * slope / np.sqrt(self.sums[at])


class Offline:
    """Logistic regression on the same encoder's vectors, fitted anew to everything before, ``REFITS`` times.

    Where answers are few and recur, each has weights of its own for the prompt. The strength of its prior is the one
    that foretells the newest fifth of what it is fitted to best. ``style``: whether it sees how an answer looks.
    """

    def __init__(self, encoder: Vectors, length: int, answers: list[str], *, style: bool = True) -> None:
        self.style = style
        self.encoder, self.every = encoder, max(FIRST_FIT, length // REFITS)
        self.answers = {key_of(answer): at for at, answer in enumerate(answers)} if len(answers) <= FEW_ANSWERS else {}
        self.rows: list[Any] = []
        self.values: list[float] = []
        self.model: LogisticRegression | None = None
        self.pairs = False

    def _features(self, asked: Label | Pair) -> Any:
        shown = sides(asked)
        vectors = self.encoder.encode([one.prompt for one in shown] + [one.answer for one in shown])
        rows = shared_features(vectors[: len(shown)], vectors[len(shown) :], shown, self.style)
        row = sparse.csr_matrix(rows[:1] - rows[1:] if len(shown) == 2 else rows)
        if not self.answers:
            return row
        one = np.zeros((1, len(self.answers)))
        one[0, self.answers[key_of(shown[0].answer)]] = 1
        own = sparse.kron(sparse.csr_matrix(one), sparse.csr_matrix(np.append(vectors[:1], [[1.0]], 1)))
        return sparse.hstack([row, 3 * own], format="csr")

    def foretell(self, asked: Label | Pair) -> float:
        if self.model is None:
            return 0.5
        return float(self.model.predict_proba(self._features(asked))[0, 1])

    def told(self, asked: Label | Pair) -> None:
        row = self._features(asked)
        self.pairs = isinstance(asked, Pair)
        self.rows.append(row)
        self.values.append(value(asked))
        if self.pairs:
            self.rows.append(-row)
            self.values.append(0.0)
        told = len(self.rows) // (2 if self.pairs else 1)
        if (told == FIRST_FIT or told % self.every == 0) and len(set(self.values)) == 2:
            self._fit()

    def _fit(self) -> None:
        rows, values = sparse.vstack(self.rows, format="csr"), np.array(self.values) > 0.5
        cut = len(values) * 4 // 5 // 2 * 2
        kept: tuple[float, float] = (np.inf, STRENGTHS[0])
        for strength in STRENGTHS:
            if len(set(values[:cut])) == 2:
                found = np.clip(self._made(strength, rows[:cut], values[:cut]).predict_proba(rows[cut:])[:, 1], 1e-6, 1)
                loss = -np.mean(np.log(np.where(values[cut:], found, np.clip(1 - found, 1e-6, 1))))
                kept = min(kept, (float(loss), strength))
        self.model = self._made(kept[1], rows, values)

    def _made(self, strength: float, rows: Any, values: Any) -> LogisticRegression:
        return LogisticRegression(C=strength, fit_intercept=not self.pairs, max_iter=300).fit(rows, values)
