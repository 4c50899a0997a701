"""The gate: what a candidate and the incumbent answered to the gold set, to a decision with its evidence. Pure.

All checks must pass, else the incumbent stays:

=========  ==========================================================================================
files      the engine could take them (names, shapes, finite values); found out before, given here
gold       the mean gain is above 0, and by a paired bootstrap its lower bound at or above ``min_gain``: with one
           below 0, as by default, a larger loss is ruled out, and a gain beyond chance is not shown
skills     topics learned earlier, in pools of at least 400 items, lose at most ``old_skill_loss``; where there are
           fewer items, only what is certain to be a larger loss fails, and the decision says so
slices     no slice loses more than ``slice_loss`` beyond chance
kl         nats a token to the base, over the candidate's answers, at most ``max_kl``; not known: a person decides
behaviour  answers that are empty, cut off, refusing, off format, asking back what is plain, or a broken tool call do
           not become more frequent by a tenth, beyond chance, and the mean length changes by no more than
           ``max_length_change``
=========  ==========================================================================================

Slices and behaviours are many looks at once: each is tested at its share of the level (Bonferroni), so that either
check as a whole stops a harmless candidate with probability ``1 - confidence`` at most.

With fewer than ``min_gold`` items nothing is shown, no gain neither: the decision is to *wait* for a person.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from everloop.config import GateConfig
from numpy.typing import NDArray
from scipy import stats

from pipelines.behaviour import asks_back, refuses
from reward.floor import broken_call

POOL = 400  # items: with 40, one answer is 2.5 points
LEARNED = 0.5  # share of right answers from which on a topic counts as learned
RESAMPLES = 10_000
TOLERANCE = 1.1  # a behaviour's rate may be this many times the incumbent's
BEHAVIOURS = ("empty", "cut_off", "refusal", "off_format", "asking_back", "broken_call")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """What one adapter answered to the gold items, in their order. All arrays have shape (items,).

    ``right``: 0 to 1. ``length`` in tokens, or another unit. ``kl``: mean over the answer's tokens of
    log p - log p_base, in nats; nan where it is not known. ``flags``: 0 or 1, by name in ``BEHAVIOURS``.
    """

    right: Floats
    length: Floats
    kl: Floats
    flags: dict[str, Floats]


@dataclass(frozen=True)
class Evidence:
    """Everything that the decision rests on. ``skills``: each item's slice; '' is none. ``unit``: of lengths."""

    skills: tuple[str, ...]
    incumbent: Answers
    candidate: Answers
    files: str | None = None
    """Why the files were refused; None: they were not."""
    unit: str = "tokens"


class Check(NamedTuple):
    """One line of the table above, with the numbers that decided it. ``passed`` None: it could not be told."""

    name: str
    passed: bool | None
    says: str
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Decision:
    """``wait``: nothing speaks against it, but too little is known to promote without a person."""

    verdict: Literal["pass", "fail", "wait"]
    reason: str
    checks: tuple[Check, ...] = field(default=())

    def numbers(self) -> dict[str, Any]:
        """What a release keeps of it."""
        return {check.name: {"passed": check.passed, "says": check.says, **check.numbers} for check in self.checks}


def refused(cause: str) -> Decision:
    """The decision about files that no engine takes: nothing was asked of them."""
    check = Check("files", False, cause, {})
    return Decision("fail", f"Rejected: the adapter's files are refused: {cause}.", (check,))


def decide(evidence: Evidence, config: GateConfig, *, seed: int = 0) -> Decision:
    """The decision, the same for the same evidence and seed."""
    if evidence.files is not None:
        return refused(evidence.files)
    items = len(evidence.skills)
    if items == 0:
        return Decision("wait", f"No gold items, {config.min_gold} are needed: a person decides.")
    checks = (
        _gold(evidence, config, seed),
        _old_skills(evidence, config),
        _slices(evidence, config),
        _kl(evidence, config),
        _behaviour(evidence, config, seed),
    )
    failed = [check.says for check in checks if check.passed is False]
    if failed:
        return Decision("fail", f"Rejected: {'; '.join(failed)}.", checks)
    if items < config.min_gold:
        text = f"{items} gold items, {config.min_gold} are needed to promote without a person: {checks[0].says}."
        return Decision("wait", text, checks)
    unknown = [check.says for check in checks if check.passed is None]
    if unknown:
        return Decision("wait", f"{'; '.join(unknown)}, {checks[0].says}: a person decides.", checks)
    return Decision("pass", f"Passed: {checks[0].says}; {checks[1].says}; {checks[3].says}.", checks)


def gain_bounds(differences: Floats, confidence: float, seed: int = 0) -> tuple[float, float, float]:
    """(mean, lower, upper) of paired differences by the percentile bootstrap, each bound one-sided.

    Resampling n items with replacement is a multinomial draw over their distinct values, which is the same and
    needs no n by resamples array (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).
    """
    n = differences.size
    values, counts = np.unique(differences, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES) @ values / n
    low, high = np.quantile(drawn, (1 - confidence, confidence))
    return float(differences.mean()), float(low), float(high)


def _gold(evidence: Evidence, config: GateConfig, seed: int) -> Check:
    before, after = evidence.incumbent.right, evidence.candidate.right
    gain, low, high = gain_bounds(after - before, config.confidence, seed)
    numbers = {
        "items": before.size,
        "incumbent": float(before.mean()),
        "candidate": float(after.mean()),
        "gain": gain,
        "low": low,
        "high": high,
        "needed": config.min_gain,
    }
    says = f"gold {_points(gain)} points over {before.size} items"
    if low < config.min_gain:
        needed = f"below the {_points(config.min_gain)} that are needed"
        return Check("gold", False, f"{says}, lower bound {_points(low)}, {needed}", numbers)
    if gain <= 0 and before.size >= config.min_gold:
        return Check("gold", False, f"{says}: no gain", numbers)
    return Check("gold", True, f"{says}, lower bound {_points(low)}", numbers)


def _old_skills(evidence: Evidence, config: GateConfig) -> Check:
    """Topics are picked as learned on one half of their items and compared on the other, both ways round: picked
    and compared on the same items, luck would count as skill, and every candidate would seem to lose some.
    """
    losses = []
    gains = evidence.candidate.right - evidence.incumbent.right
    for members in pools(evidence):
        gain = float(gains[members].mean())
        # A pool that stays small is held to its upper bound: there one answer is more than the limit.
        error = 0.0 if members.size >= POOL else _error(gains[members], config.confidence)
        losses.append((gain + error, gain, int(members.size)))
    if not losses:
        return Check("skills", True, "no topic was learned yet", {"pools": 0})
    bound, worst, size = min(losses)
    passed = bound >= -config.old_skill_loss
    numbers = {"pools": len(losses), "worst": worst, "bound": bound, "size": size, "limit": -config.old_skill_loss}
    says = f"old skills {_points(worst)} points" + ("" if passed else f", below {_points(-config.old_skill_loss)}")
    if size < POOL:
        says += f" (only {size} items, so by their upper bound {_points(bound)}: a larger loss could go unseen)"
    return Check("skills", passed, says, numbers)


def pools(evidence: Evidence) -> list[NDArray[np.intp]]:
    """Items of topics learned earlier, in pools of ``POOL`` or more (one smaller where there are not enough)."""
    skills = np.array(evidence.skills)
    learned = []
    for skill in sorted(set(evidence.skills) - {""}):
        members = np.flatnonzero(skills == skill)
        halves = members[::2], members[1::2]
        for picked, compared in (halves, halves[::-1]):
            if picked.size and compared.size and evidence.incumbent.right[picked].mean() >= LEARNED:
                learned.append(compared)
    made: list[NDArray[np.intp]] = []
    gathered: list[NDArray[np.intp]] = []
    for members in learned:
        gathered.append(members)
        if sum(each.size for each in gathered) >= POOL:
            made.append(np.concatenate(gathered))
            gathered = []
    if gathered and made:
        made[-1] = np.concatenate([made[-1], *gathered])
    elif gathered:
        made.append(np.concatenate(gathered))
    return made


def _error(gains: Floats, confidence: float) -> float:
    """Half the width of the one-sided interval of a mean of gains, by Student's t; infinite for a single one.

    A gain of 1 and a loss of 1 are added to the variance: a few equal gains are no certainty.
    """
    if gains.size < 2:
        return float("inf")
    deviation = float(np.append(gains, (1.0, -1.0)).std(ddof=1))
    return float(stats.t.ppf(confidence, gains.size - 1)) * deviation / gains.size**0.5


def _slices(evidence: Evidence, config: GateConfig) -> Check:
    """A slice fails when its loss is beyond ``slice_loss`` by a one-sided t-test, Bonferroni over all slices."""
    skills = np.array(evidence.skills)
    names = sorted(set(evidence.skills) - {""})
    gains = evidence.candidate.right - evidence.incumbent.right
    level = 1 - (1 - config.confidence) / max(len(names), 1)
    lost = {}
    for name in names:
        own = gains[skills == name]
        if own.mean() + _error(own, level) < -config.slice_loss:
            lost[name] = float(own.mean())
    worst = min(lost, key=lambda name: lost[name]) if lost else ""
    says = f"slice '{worst}' loses {-100 * lost[worst]:.0f} points" if lost else "no slice lost"
    return Check("slices", not lost, says, {"slices": len(names), "lost": lost})


def _kl(evidence: Evidence, config: GateConfig) -> Check:
    known = evidence.candidate.kl[~np.isnan(evidence.candidate.kl)]
    if not known.size:
        return Check("kl", None, "KL to the base not known", {"known": 0})
    mean = float(known.mean())
    passed = bool(np.isfinite(mean)) and mean <= config.max_kl
    says = f"KL to the base {mean:.2f}" + ("" if passed else f" nats a token, above {config.max_kl:g}")
    return Check("kl", passed, says, {"mean": mean, "limit": config.max_kl, "known": int(known.size)})


def _behaviour(evidence: Evidence, config: GateConfig, seed: int) -> Check:
    level = (1 - config.confidence) / (len(BEHAVIOURS) + 1)
    says = []
    numbers: dict[str, Any] = {"level": level}
    for name in BEHAVIOURS:
        before, after = evidence.incumbent.flags[name], evidence.candidate.flags[name]
        p_value = rise_by_chance(before, after)
        numbers[name] = [float(before.mean()), float(after.mean()), p_value]
        if after.mean() > TOLERANCE * before.mean() and p_value < level:
            says.append(f"{name.replace('_', '-')} answers rose from {before.mean():.1%} to {after.mean():.1%}")
    before, after = evidence.incumbent.length, evidence.candidate.length
    _, low, high = gain_bounds(after - before, 1 - level / 2, seed)  # either way
    numbers["length"] = [float(before.mean()), float(after.mean()), low, high]
    change = float(after.mean()) / max(float(before.mean()), 1e-9) - 1
    if abs(change) > config.max_length_change and (low > 0 or high < 0):
        says.append(f"answers went from {before.mean():.1f} to {after.mean():.1f} {evidence.unit}")
    return Check("behaviour", not says, "; ".join(says) or "behaviour as before", numbers)


def rise_by_chance(before: Floats, after: Floats) -> float:
    """How probable so many flags more are where nothing became more frequent: McNemar's exact test, one-sided.

    Of the items whose flag (0 or 1) changed, half would have gone either way (McNemar, "Note on the sampling error
    of the difference between correlated proportions or percentages", Psychometrika 12, 1947).
    """
    more, fewer = int((after > before).sum()), int((after < before).sum())
    return float(stats.binom.sf(more - 1, more + fewer, 0.5))


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


class Given(NamedTuple):
    """One answer as an engine gave it. ``kl``: see :class:`Answers`; None: not known."""

    text: str
    tokens: int
    finished: bool
    kl: float | None = None


def judge_answers(right_answers: Sequence[str], given: Sequence[Given]) -> Answers:
    """Answers beside the right ones: exact match after trimming, and the behaviours of each."""
    closed = closed_set(right_answers)
    paired = list(zip(right_answers, given, strict=True))
    flags = {
        "empty": [not answer.text.strip() for _, answer in paired],
        "cut_off": [not answer.finished for _, answer in paired],
        "refusal": [refuses(answer.text) for _, answer in paired],
        "off_format": [_off_format(right, answer.text, closed) for right, answer in paired],
        "asking_back": [asks_back(answer.text) and not asks_back(right) for right, answer in paired],
        "broken_call": [broken_call(answer.text) and not broken_call(right) for right, answer in paired],
    }
    return Answers(
        right=_floats(right.strip() == answer.text.strip() for right, answer in paired),
        length=_floats(answer.tokens for _, answer in paired),
        kl=_floats(np.nan if answer.kl is None else answer.kl for _, answer in paired),
        flags={name: _floats(values) for name, values in flags.items()},
    )


def closed_set(right_answers: Sequence[str]) -> frozenset[str]:
    """The answers to choose from, where every one occurs twice on average or more; empty: answers are free."""
    distinct = frozenset(answer.strip() for answer in right_answers)
    return distinct if 2 * len(distinct) <= len(right_answers) else frozenset()


def _off_format(right: str, text: str, closed: frozenset[str]) -> bool:
    if closed:
        return text.strip() not in closed
    return _is_object(right) and not _is_object(text)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False


def _floats(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)
