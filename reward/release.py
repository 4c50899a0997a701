"""Whether a snapshot takes over the scoring: judged beside the version that scores, on labels that neither had learned.

::

    label ─▶ incumbent foretells ─┐
          ─▶ live model foretells ┴▶ pair ─▶ learned          every N updates: snapshot ─▶ verdict over the pairs

The live model foretells each label before it learns it, and the snapshot is the live model at one moment. So the line
that a candidate is cut from is judged by labels that were new to it (progressive validation; Blum, Kalai and Langford
1999), at once, without waiting for labels after it. What its last update may have broken is asked of the snapshot
itself: finite numbers, and planted answers that must lose against well-rated ones.

What hangs on a few raters is not taken: it must take over without each of the three who speak most for it, and without
all of them, too (:func:`same_without`), where there are ten raters or more.

A candidate takes over where a loss of more than 0.01 of AUC is ruled out (one-sided, 95%). Where that is not so yet it
waits, and pairs add up for the next snapshot, ``window`` of them at most: the two are so alike that few are needed.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from reward.calibration import BINS, auc, calibration_error
from reward.features import Example, style_vector
from reward.model import RewardModel
from reward.probes import probes

V = TypeVar("V")
Array = np.ndarray[Any, np.dtype[np.float64]]
Z = 1.645  # one-sided 95%
FEWEST = 20  # labels below which nothing is decided
FEWEST_OF_A_KIND = 5
FEWEST_RATERS = 10  # from which on a decision must be the same without the three who speak most for it
MARGIN = 0.01  # of AUC; see RewardVersion.evidence
MOST_ERROR = 0.05  # of calibration
MOST_LENGTH = 0.1  # correlation with the logarithm of the answer's length
MOST_NULL = 0.05  # share of prompts for which saying nothing beats a well-rated answer
PRAISED = 24  # well-rated answers that planted ones are set against
LONGEST = 2000  # characters of such an answer with its prompt


class Foretold(NamedTuple):
    """P(the label says good), before it was learned, by both; the label, 0 to 1; the answer's log-length. ``rater``:
    who said it, as the guard against poison names them; empty: nobody knows.
    """

    incumbent: float
    candidate: float
    label: float
    length: float
    rater: str = ""


class Verdict(NamedTuple):
    """``reason``: one sentence for people; ``evidence``: numbers by name. ``waits``: it may pass with more labels, or
    once a person lets it; else one that does not take over is refused."""

    takes_over: bool
    reason: str
    evidence: dict[str, float]
    waits: bool = False


class Shadow:
    """The newest ``window`` labels since the incumbent took over, and well-rated answers. Constant memory."""

    def __init__(
        self, window: int, pairs: Sequence[Sequence[Any]] = (), praised: Sequence[Sequence[str]] = (), **later: object
    ) -> None:
        """``later``: what a later release keeps too."""
        self.pairs: deque[Foretold] = deque((Foretold(*pair) for pair in pairs), maxlen=window)
        self.praised: deque[Example] = deque((Example(*texts) for texts in praised), maxlen=PRAISED)

    def dump(self) -> dict[str, Any]:
        """What the constructor takes back."""
        return {"pairs": [*self.pairs], "praised": [(one.prompt, one.answer) for one in self.praised]}

    def add(self, incumbent: float, candidate: float, label: float, example: Example, rater: str = "") -> None:
        """Note what was foretold of a label; what is not finite counts as no opinion."""
        said = [value if math.isfinite(value) else 0.5 for value in (incumbent, candidate)]
        self.pairs.append(Foretold(*said, label, style_vector(example.answer)[0], rater))
        if label > 0.5 and example.answer.strip() and len(example.prompt) + len(example.answer) <= LONGEST:
            self.praised.append(Example(example.prompt, example.answer))

    @property
    def auc(self) -> float | None:
        """Of the version that scores, on what it had not learned since it does; None: too few labels."""
        pairs = _numbers(self.pairs)
        return auc(pairs[:, 0], pairs[:, 2]) if len(pairs) >= FEWEST else None

    def judge(self, incumbent: RewardModel, candidate: RewardModel) -> Verdict:
        """Whether the candidate takes over; all reasons against it are told."""
        if not finite(candidate):
            return Verdict(False, "refused: its weights are not finite, so it can say nothing", {})
        if not incumbent.may_judge:
            return Verdict(True, "takes over: the version before it had too few labels for an opinion", {})
        pairs = _numbers(self.pairs)
        good = int((pairs[:, 2] > 0.5).sum())
        evidence: dict[str, float] = {"labels": len(pairs)}
        if len(pairs) < FEWEST or min(good, len(pairs) - good) < FEWEST_OF_A_KIND:
            few = f"{len(pairs)} labels, {good} of them good, since the incumbent took over"
            needed = f"{FEWEST} with {FEWEST_OF_A_KIND} of each kind"
            return Verdict(False, f"waits: {few}; a comparison needs {needed}", evidence, waits=True)
        against = [_ranking(pairs, evidence), _calibration(pairs, evidence), _length(pairs, evidence)]
        against.append(_planted(incumbent, candidate, list(self.praised), evidence))
        reasons = [reason for reason in against if reason is not None]
        if reasons:
            waits = evidence["auc_upper"] >= 0 and reasons == against[:1]
            return Verdict(False, f"{'waits' if waits else 'refused'}: {'; '.join(reasons)}", evidence, waits)
        if few := _few(self.pairs):
            return Verdict(False, f"waits: {few}", evidence, True)
        auc_now, before = evidence["auc"], evidence["incumbent_auc"]
        return Verdict(
            True,
            f"takes over: over {len(pairs)} labels new to both, AUC {auc_now:.3f} against {before:.3f} and calibration "
            f"error {evidence['calibration_error']:.3f} against {evidence['incumbent_calibration_error']:.3f}",
            evidence,
        )


def _numbers(pairs: Iterable[Foretold]) -> Array:
    """(labels, 4): all but who said it."""
    return np.array([pair[:4] for pair in pairs], np.float64).reshape(-1, 4)


def _few(pairs: Iterable[Foretold]) -> str:
    """Why it is a few raters' doing that a candidate takes over; empty: it is not, or there are too few of them to do
    without any. A label of nobody known stands alone.
    """
    votes: defaultdict[str, list[Foretold]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        votes[pair.rater or f"nobody known ({number})"].append(pair)
    return same_without(votes, _decided, _pull) if len(votes) >= FEWEST_RATERS else ""


def _decided(votes: list[list[Foretold]]) -> str:
    pairs = _numbers(pair for its in votes for pair in its)
    good = int((pairs[:, 2] > 0.5).sum())
    if min(good, len(pairs) - good) < FEWEST_OF_A_KIND:
        return "wait for labels of either kind"
    against = (check(pairs, {}) for check in (_ranking, _calibration, _length))
    return "take over" if all(reason is None for reason in against) else "refuse"


def _pull(pairs: list[Foretold]) -> float:
    """How far a rater speaks for the candidate: by how much less it errs on their labels, squared, summed."""
    return sum((one.incumbent - one.label) ** 2 - (one.candidate - one.label) ** 2 for one in pairs)


def finite(model: RewardModel) -> bool:
    """Whether everything that a snapshot says is decided by finite numbers."""
    known = model.prototypes
    arrays = (*model.heads.arrays().values(), *model.values.heads.arrays().values(), known.totals, known.counts)
    arrays = (*arrays, model.calibration.curve)
    return all(bool(np.isfinite(array).all()) for array in arrays)


def delong(first: Array, second: Array, labels: Array) -> tuple[float, float]:
    """AUC of ``second`` less that of ``first`` over the same labels, and its standard error.

    DeLong, DeLong and Clarke-Pearson (1988): from how each good one is placed among the bad ones, and each bad one
    among the good ones. Both kinds must be there, at least two of each.
    """
    good = labels > 0.5
    placed = [np.sign(one[good][:, None] - one[~good][None, :]) / 2 + 0.5 for one in (first, second)]
    apart = placed[1] - placed[0]
    by_good, by_bad = apart.mean(axis=1), apart.mean(axis=0)
    variance = by_good.var(ddof=1) / len(by_good) + by_bad.var(ddof=1) / len(by_bad)
    return float(apart.mean()), math.sqrt(variance)


def _ranking(pairs: Array, evidence: dict[str, float]) -> str | None:
    before, now, labels, _ = pairs.T
    apart, error = delong(before, now, labels)
    evidence["auc"], evidence["incumbent_auc"] = auc(now, labels) or 0.0, auc(before, labels) or 0.0
    evidence["auc_lower"], evidence["auc_upper"] = apart - Z * error, apart + Z * error
    if evidence["auc_lower"] >= -MARGIN:
        return None
    if evidence["auc_upper"] < 0:
        return (
            f"over {len(pairs)} labels new to both its AUC is {evidence['auc']:.3f}, the incumbent's "
            f"{evidence['incumbent_auc']:.3f}: worse by more than chance (at least {-evidence['auc_upper']:.3f})"
        )
    return (
        f"over {len(pairs)} labels new to both its AUC is {evidence['auc']:.3f}, the incumbent's "
        f"{evidence['incumbent_auc']:.3f}: a loss of {-evidence['auc_lower']:.3f} cannot be ruled out yet, "
        f"{MARGIN:g} may be lost"
    )


def _calibration(pairs: Array, evidence: dict[str, float]) -> str | None:
    before, now, labels, _ = pairs.T
    chance = math.sqrt(2 / math.pi * float((now * (1 - now)).mean()) * min(BINS, len(pairs)) / len(pairs))
    error, incumbent = calibration_error(now, labels), calibration_error(before, labels)
    evidence["calibration_error"], evidence["incumbent_calibration_error"] = error, incumbent
    evidence["calibration_noise"] = chance
    if error - chance > MOST_ERROR and error > incumbent + MARGIN:
        return (
            f"its calibration error is {error:.3f} (chance alone gives {chance:.3f}, at most {MOST_ERROR:g} more is "
            f"allowed), the incumbent's {incumbent:.3f}"
        )
    return None


def correlation(values: Array, lengths: Array) -> float:
    """Pearson's; 0 where either does not vary."""
    if len(values) < 2 or np.ptp(values) < 1e-9 or np.ptp(lengths) < 1e-9:
        return 0.0
    return float(np.corrcoef(values, lengths)[0, 1])


def _length(pairs: Array, evidence: dict[str, float]) -> str | None:
    before, now, _, lengths = pairs.T
    own, incumbent, chance = correlation(now, lengths), correlation(before, lengths), Z / math.sqrt(len(pairs))
    evidence["length_correlation"], evidence["incumbent_length_correlation"] = own, incumbent
    if abs(own) > MOST_LENGTH + chance and abs(own) > abs(incumbent) + chance / 2:
        return f"its opinions follow the answer's length (correlation {own:.2f}, the incumbent's {incumbent:.2f})"
    return None


def probe(model: RewardModel, praised: Sequence[Example]) -> dict[str, Array]:
    """By kind of planted pair (:mod:`reward.probes`), of those made of well-rated answers: 1 where the good answer is
    placed above the bad one, else 0. Empty where there are no well-rated answers."""
    if not praised:
        return {}
    made = probes([(one.prompt, one.answer) for one in praised])
    values = model.estimate([Example(pair.prompt, answer) for pair in made for answer in (pair.good, pair.bad)])
    won: dict[str, list[float]] = {}
    for pair, good, bad in zip(made, values[::2], values[1::2], strict=True):
        won.setdefault(pair.kind, []).append(float(good.value > bad.value))
    return {kind: np.array(its) for kind, its in won.items()}


def _planted(
    incumbent: RewardModel, candidate: RewardModel, praised: list[Example], evidence: dict[str, float]
) -> str | None:
    before, now = probe(incumbent, praised), probe(candidate, praised)
    if not now:
        return None
    null = 1 - float(now["null"].mean())
    apart = np.concatenate([now[kind] - before[kind] for kind in now])
    evidence["null_wins"] = null
    evidence["planted_lose"] = float(np.concatenate(list(now.values())).mean())
    evidence["incumbent_planted_lose"] = float(np.concatenate(list(before.values())).mean())
    if null >= MOST_NULL:
        return f"saying nothing beats {null:.0%} of the answers that people rated well; {MOST_NULL:.0%} is the limit"
    if apart.mean() + Z * apart.std() / math.sqrt(len(apart)) < 0:
        worst = min(now, key=lambda kind: float((now[kind] - before[kind]).mean()))
        return (
            f"planted answers lose against well-rated ones in {evidence['planted_lose']:.0%} of the cases, with the "
            f"incumbent in {evidence['incumbent_planted_lose']:.0%}; worst with {worst} answers"
        )
    return None


def same_without(
    votes: Mapping[str, V], decide: Callable[[list[V]], object], weight: Callable[[V], float], top: int = 3
) -> str:
    """Why a decision hangs on a few users; empty: it does not.

    ``votes``: what each user brings. It is decided anew without each of the ``top`` users of the largest weight, and
    without all of them: where that differs, the decision should not be taken.
    """
    first = decide(list(votes.values()))
    largest = sorted(votes, key=lambda user: (-abs(weight(votes[user])), user))[:top]
    for left_out in [*([user] for user in largest), largest]:
        other = decide([vote for user, vote in votes.items() if user not in left_out])
        if other != first:
            return f"without {', '.join(left_out)} the decision would be {other!r}, not {first!r}: it is not taken"
    return ""
