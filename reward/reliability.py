"""How far each source of words is to be believed, learned from how its words agree with others about the same answers.

As Dawid and Skene (1979): an answer is good or bad, nobody sees which, and source k says "good" of a good one with
probability P(good | good), of a bad one with P(good | bad). What is kept are sums over answers, as in online EM
(Cappé and Moulines 2009): for each two sources, how often they said what of the same answer. From them the likeliest
probabilities are found anew whenever something was added, by EM on the likelihood of pairs (a composite likelihood;
Varin, Reid and Firth 2011), always from the same start. So what is believed depends on which words stand, not on the
order in which they came, and a word that is taken back leaves nothing but rounding.

A word counts one in all, however many others were said of the answer; nobody agrees with himself. An outcome is
nearly certain. The model's opinion from before it had learned of the answer is one more source beside people's.
Machines (judges, critics, implicit and derived signals) are held against people and outcomes, never against the model
or each other; a critic against outcomes and checks alone.

A rater's own probabilities start from those of the source, which stand for OWN words. Nothing is ever turned round: a
source that is wrong more often than not weighs nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from everloop.errors import ContractError
from everloop.feedback import Feedback, FeedbackKind

from reward.declaration import DEFAULT, Declaration

Array = np.ndarray[Any, np.dtype[np.float64]]
PEOPLE = frozenset({"thumb", "rating", "correction", "comment"})
OUTCOME, MODEL = "outcome", "model"
SUPPOSED = {
    "thumb": 0.95,
    "rating": 0.95,
    "correction": 1 / (1 + math.exp(-4.0)),  # who writes a better answer means it
    "implicit": 1 / (1 + math.exp(-0.5)),  # a product's guess: an answer kept, edited, asked again
    "derived": 1 / (1 + math.exp(-0.5)),
    "check": 1 / (1 + math.exp(-0.5)),
    "comment": 0.5,  # nothing, until people's other words bear it out
    "judge": 0.5,
    "critic": 0.5,
    MODEL: 0.6,
    OUTCOME: 0.995,
}
"""How often the words of each family are right, before anything was heard."""
MODELS = 4.0  # words that what is supposed of the model stands for: it says more the more it has learned
OWN = 16.0  # words of its source that a rater starts from
SOURCES, RATERS = 64, 2048  # that are remembered; beyond them the new source is as supposed, the least heard rater goes
KNOWN = 3.0  # words of a rater from which on a snapshot knows of them
MOST_WORDS = 32  # about one answer that are compared with each other: the first of them
STEPS, OWN_STEPS = 24, 10  # of EM: always as many, from the same start
SURE = 1e-3  # no source is surer than that


class Piece(NamedTuple):
    """One word about an answer: ``good`` from 0 to 1, a rating between them being so much of either.

    ``rater`` is a digest of who said it and the source, ``person`` of who said it; None: unknown, or no person.
    ``weight`` is below 1 for the model's opinions.
    """

    source: str
    rater: str | None
    good: float
    weight: float = 1.0
    person: str | None = None


def family(source: str) -> str:
    return source.partition(":")[0]


def source_of(word: Feedback) -> str:
    """'thumb', 'implicit:<name>', 'check:<name>' …; a verdict that is an outcome comes from 'outcome'."""
    if word.kind is FeedbackKind.OUTCOME and (word.source is None or family(word.source) == "check"):
        return OUTCOME
    if word.source is not None:
        return word.source
    return f"implicit:{word.name or 'unnamed'}" if word.kind is FeedbackKind.IMPLICIT else word.kind.value


def rater_of(word: Feedback) -> str | None:
    """16 hexadecimal digits of the rater and the source; None: nobody is known to have said it."""
    if word.rater is None:
        return None
    return hashlib.blake2b(f"{source_of(word)}\0{word.rater}".encode(), digest_size=8).hexdigest()


def person_of(word: Feedback) -> str | None:
    """16 hexadecimal digits of who said it, whatever the source; None: nobody is known to."""
    return None if word.rater is None else hashlib.blake2b(word.rater.encode(), digest_size=8).hexdigest()


def vote(expected: float) -> Piece:
    """The model's opinion as a word: the surer it was, the more it counts."""
    return Piece(MODEL, None, float(expected > 0.5), abs(2 * expected - 1))


def comparable(one: str, other: str) -> bool:
    """Whether words of two sources about the same answer tell how far either is right; symmetric."""
    kinds = {one, other}
    if OUTCOME in kinds:
        return one != other
    if "critic" in (family(one), family(other)):
        return "check" in (family(one), family(other))
    return bool(kinds & PEOPLE)


def _same_person(one: Piece, other: Piece) -> bool:
    return one.person is not None and one.person == other.person


def _read(piece: Piece) -> bool:
    """Whether it is a comment: its reading is the platform's, so what its writer said plainly tells if it was read
    right. Of the writer that tells nothing: nobody vouches for himself."""
    return piece.source == FeedbackKind.COMMENT


class Reliability:
    """What is believed of the sources and raters of one policy. Not thread-safe."""

    def __init__(self, declaration: Declaration = DEFAULT) -> None:
        self.declaration = declaration
        self.reading: Callable[[str], float | None] = lambda comment: None  # P(good) as far as a comment says
        self.tables: dict[tuple[str, str], Array] = {}  # (2, 2) by what the first said and what the second said
        self.raters: dict[str, int] = {}  # digest to slot
        self.own: list[tuple[str, str, dict[str, Array]]] = []  # digest, source, tables with the others' sources
        self.heard: Array = np.zeros(RATERS)  # words of each slot
        self.changed_slots: set[int] = set()
        self.changed = False
        self._found: dict[str, Array] | None = None
        self._found_own: dict[str, Array] = {}

    def learn(self, pieces: Sequence[Piece], sign: int = 1) -> None:
        """Hear all the words about an answer together; ``sign`` -1 takes them back, as they were given."""
        pieces = pieces[:MOST_WORDS]
        pairs = [
            (i, j)
            for i, one in enumerate(pieces)
            for j, other in enumerate(pieces[:i])
            if comparable(one.source, other.source) and (not _same_person(one, other) or _read(one) != _read(other))
        ]
        among = np.bincount(np.array(pairs, np.int64).ravel(), minlength=len(pieces))
        for i, j in pairs:
            one, other = pieces[i], pieces[j]
            self._add(one, other, sign * one.weight * other.weight / float(max(among[i], among[j])))

    def _add(self, one: Piece, other: Piece, worth: float) -> None:
        if one.source > other.source:
            one, other = other, one
        key = (one.source, other.source)
        if key not in self.tables and not self._room(key):
            return
        said = worth * np.outer([1 - one.good, one.good], [1 - other.good, other.good])
        _fold(self.tables, key, said)
        if not _same_person(one, other):
            self._add_own(one, other, said)
            self._add_own(other, one, said.T)
        self.changed = True
        self._found = None
        self._found_own.clear()

    def _room(self, key: tuple[str, str]) -> bool:
        known = {source for pair in self.tables for source in pair}
        return len(known | set(key)) <= SOURCES

    def _add_own(self, mine: Piece, other: Piece, said: Array) -> None:
        if mine.rater is None:
            return
        slot = self._slot(mine) if said.sum() > 0 else self.raters.get(mine.rater)
        if slot is None:  # it made room since, and what it had said with it
            return
        _fold(self.own[slot][2], other.source, said)
        self.heard[slot] = _words_in(self.own[slot][2])
        self.changed_slots.add(slot)

    def _slot(self, mine: Piece) -> int:
        """The slot of a rater, made or taken from the least heard one."""
        assert mine.rater is not None
        if mine.rater not in self.raters:
            slot = len(self.own)
            if slot == RATERS:
                slot = int(self.heard.argmin())
                del self.raters[self.own[slot][0]]
            self.put(slot, mine.rater, mine.source, {})
        return self.raters[mine.rater]

    def put(self, slot: int, rater: str, source: str, tables: dict[str, Array]) -> None:
        """Set one rater. No slot is left out."""
        self.own[slot : slot + 1] = [(rater, source, tables)]
        self.raters[rater] = slot
        self.heard[slot] = _words_in(tables)

    def probabilities(self, source: str, rater: str | None = None) -> Array:
        """(2,) P(says "good" | bad) and P(says "good" | good)."""
        if self._found is None:
            self._found = _likeliest(self.tables, self.declaration.combine.prior)
        its = self._found.get(source)
        if its is None:
            its = _supposed(source)
        slot = None if rater is None else self.raters.get(rater)
        if rater is None or slot is None or self.own[slot][1] != source:
            return its
        if rater not in self._found_own:
            self._found_own[rater] = _likeliest_own(self.own[slot][2], its, self.probabilities)
        return self._found_own[rater]

    def counts(self, word: Feedback) -> bool:
        return self.declaration.signal(source_of(word)).count

    def weighs(self, source: str, rater: str | None = None) -> tuple[float, float]:
        """Log-odds, at least 0, that a "good" and a "bad" are worth, within what is declared."""
        bad, good = self.probabilities(source, rater)
        signal = self.declaration.signal(source)
        if not signal.count:
            return 0.0, 0.0
        worths = (math.log(good / bad), math.log((1 - bad) / (1 - good)))
        up, down = (min(max(worth, signal.least), signal.most) for worth in worths)
        return up, down

    def odds(self, source: str, rater: str | None, good: float) -> float:
        """What a word adds to the log-odds of the answer's being good."""
        up, down = self.weighs(source, rater)
        return good * up - (1 - good) * down

    def worth(self, source: str, rater: str | None) -> float:
        """0 to 1: how much is learned from a word, next to one of whom its source is supposed to be."""
        bad, good = _supposed(source)
        usual = math.log(good / bad)
        return min(1.0, sum(self.weighs(source, rater)) / 2 / usual) if usual > 0 else 0.0

    def status(self) -> dict[str, Any]:
        """By source: how often its "good" and "bad" are right, what they weigh, and how many words were compared."""
        found = {}
        for source in sorted({source for pair in self.tables for source in pair}):
            bad, good = self.probabilities(source)
            up, down = self.weighs(source)
            words = sum(float(table.sum()) * pair.count(source) for pair, table in self.tables.items())
            its = {"good_if_good": float(good), "bad_if_bad": float(1 - bad), "up": up, "down": down, "words": words}
            found[source] = {name: round(number, 4) for name, number in its.items()}
        return found

    def spread(self, most: int = 256) -> dict[str, dict[str, float]]:
        """By source, over the raters that were heard most: how many, and quartiles of what a word of theirs weighs."""
        heard = np.argsort(-self.heard[: len(self.own)], kind="stable")[:most]
        weights: dict[str, list[float]] = {}
        for slot in heard:
            rater, source, _ = self.own[slot]
            weights.setdefault(source, []).append(sum(self.weighs(source, rater)) / 2)
        names = ("least", "quarter", "median", "three_quarters", "most")
        return {
            source: {
                "raters": len(its),
                **dict(zip(names, np.quantile(its, [0, 0.25, 0.5, 0.75, 1]).round(3).tolist(), strict=True)),
            }
            for source, its in sorted(weights.items())
        }

    def dump(self) -> list[Any]:
        """The sources' tables as JSON values, in order of their names."""
        return [[*key, self.tables[key].ravel().tolist()] for key in sorted(self.tables)]

    def dump_rater(self, slot: int) -> list[Any]:
        rater, source, tables = self.own[slot]
        return [rater, source, {name: tables[name].ravel().tolist() for name in sorted(tables)}]

    def dump_raters(self) -> list[Any]:
        """Those that were heard KNOWN words or more: of others a snapshot thinks as of their source."""
        return [self.dump_rater(slot) for slot in range(len(self.own)) if self.heard[slot] >= KNOWN]

    def take(self, tables: Iterable[Any], raters: Iterable[Any]) -> None:
        """Take back what :meth:`dump` and, slot by slot, :meth:`dump_rater` gave. Raises ValueError otherwise."""
        for one, other, numbers in tables:
            self.tables[one, other] = _table(numbers)
        for slot, (rater, source, its) in enumerate(raters):
            self.put(slot, rater, source, {name: _table(numbers) for name, numbers in its.items()})
        self._found = None
        self._found_own.clear()


def _words_in(tables: dict[str, Array]) -> float:
    """How many words they count; the same however they were added up, since a snapshot is cut by it."""
    return math.fsum(number for table in tables.values() for number in table.ravel().tolist())


def _table(numbers: Any) -> Array:
    table = np.array(numbers, np.float64).reshape(2, 2)
    if not (np.isfinite(table).all() and (table >= 0).all()):
        raise ValueError(f"counts of {numbers}")
    return table


def _fold(tables: dict[Any, Array], key: Any, said: Array) -> None:
    """Add to a table; what is taken back leaves no rounding below 0, and nothing where nothing is left."""
    summed = np.maximum(tables.get(key, 0.0) + said, 0.0)
    if summed.sum() > 1e-9:
        tables[key] = summed
    else:
        tables.pop(key, None)


def _supposed(source: str) -> Array:
    right = SUPPOSED.get(family(source), 0.5)
    return np.array([1 - right, right])


def _likeliest(tables: dict[tuple[str, str], Array], prior: float) -> dict[str, Array]:
    """Each source's (2,) P(says "good" | truth), by EM from what is supposed."""
    sources = sorted({source for pair in tables for source in pair})
    if not sources:
        return {}
    at = {source: i for i, source in enumerate(sources)}
    keys = sorted(tables)
    counts = np.concatenate([tables[key].ravel() for key in keys])  # by pair, said by the first, by the second
    firsts = np.array([2 * at[one] + said for one, _ in keys for said in (0, 0, 1, 1)])
    seconds = np.array([2 * at[other] + said for _, other in keys for said in (0, 1, 0, 1)])
    words = np.zeros((len(counts), 2 * len(sources)))  # which words a cell is made of
    np.add.at(words, (np.arange(len(counts)), firsts), 1)
    np.add.at(words, (np.arange(len(counts)), seconds), 1)
    start = np.stack([_supposed(source) for source in sources], axis=1)  # (truth, sources)
    worth = np.array([MODELS if source == MODEL else prior for source in sources]) / 2
    free = np.array([source not in (PEOPLE | {OUTCOME}) for source in sources])
    says, truths = start, np.array([[0.5], [0.5]])
    for step in range(STEPS):
        if step == STEPS // 2:  # until then people are as supposed: two who differ do not tell which of them is wrong
            free = np.array([source != OUTCOME for source in sources])
        said = np.stack([1 - says, says], axis=2).reshape(2, -1)  # (truth, sources and what they say)
        joint = said[:, firsts] * said[:, seconds] * truths
        joint *= counts / joint.sum(0)
        spoken = (joint @ words).reshape(2, -1, 2)
        found = (spoken[:, :, 1] + worth * start) / (spoken.sum(2) + worth)
        says = np.where(free, found.clip(SURE, 1 - SURE), start)
        truths = joint.sum(1, keepdims=True) + prior / 2
        truths /= truths.sum()
    return {source: says[:, i] for source, i in at.items()}


def _likeliest_own(tables: dict[str, Array], its: Array, of: Any) -> Array:
    """A rater's own (2,), by EM from its source's, given what the others' sources are."""
    if not tables:
        return its
    names = sorted(tables)
    counts = np.concatenate([tables[name] for name in names], axis=1)  # (said by the rater, others and their words)
    others = np.stack([of(name) for name in names], axis=1)
    said = np.stack([1 - others, others], axis=2).reshape(2, 1, -1)  # (truth, 1, others and their words)
    says = its
    for _ in range(OWN_STEPS):
        joint = np.stack([1 - says, says], axis=1)[:, :, None] * said
        spoken = (joint / joint.sum(0) * counts).sum(2)  # (truth, said by the rater)
        says = ((spoken[:, 1] + OWN / 2 * its) / (spoken.sum(1) + OWN / 2)).clip(SURE, 1 - SURE)
    return says


@functools.lru_cache(maxsize=8)
def of_snapshot(folder: Path) -> Reliability:
    """What a snapshot of a reward model believed of its sources. Raises ContractError where the snapshot is not whole.

    For reading alone: the same object for the same folder.
    """
    try:
        return restored(json.loads((folder / "model.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContractError(f"{folder} is not a whole snapshot of a reward model: {error!r}") from None


def restored(facts: dict[str, Any]) -> Reliability:
    """From the facts of a snapshot; one that was made before sources were weighed has nothing heard yet."""
    made = Reliability(Declaration.model_validate(facts.get("declaration", {})))
    made.take(facts.get("sources", ()), facts.get("raters", ()))
    return made
