"""The reward model: how probable it is that an answer is good, how sure that is, and how it learns.

::

    prompt, answer ─▶ encoder ─▶ prototypes: own features of each member ─┐
    structure, length, product of the vectors: features all share ────────┴▶ heads ─▶ line ─▶ probability

Everything that learns is learned at once, in constant time: a label predicts first (for AUC and calibration), then
moves the prototypes of its answer, makes one step of the heads with replay, and refits the line. What changes
meanwhile is told apart by :mod:`reward.drift`, and answered as the policy's ``[reward] on_drift`` says. Nothing is
drawn by chance: bootstrap masks hash the label's id, replay is drawn by the count of lessons; the same labels in the
same order give the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from everloop.config import RewardConfig

from reward import declaration, features
from reward.calibration import Calibration, sigmoid
from reward.comments import CHARS, Comments
from reward.drift import Drift
from reward.features import Example, Structure
from reward.floor import worthless
from reward.heads import Heads, Lesson, probability
from reward.hollow import PRIOR as AGAINST_HOLLOW
from reward.hollow import Hollow
from reward.length import BAD, GOOD, PAIR, Length, length_of
from reward.propensity import Propensity
from reward.prototypes import NAMES as KNOWN
from reward.prototypes import SUPPORTED, Prototypes, key_of
from reward.reliability import Reliability
from reward.reservoir import Reservoir, slice_of
from reward.topics import MOST as MOST_TOPICS
from reward.topics import Topics
from reward.value import Values

Array = np.ndarray[Any, np.dtype[np.float32]]
MIN_LABELS = 30  # pieces of feedback, of either kind FEWEST_OF_A_KIND, before the model may have an opinion
FEWEST_OF_A_KIND = 5
MAX_SPREAD = 0.35  # above it the members contradict each other
KEEP = 0.8  # share of the members that see a label: what makes them differ
EMPHASIS = 4.0  # of structure and style, a few features beside a thousand: how much faster they are learned
SLIPS = 0.05  # share of thumbs that say the opposite of what was meant
NEVER = -30.0  # logit of an answer that says nothing, or only says back: there is nothing in it to be right
RECALIBRATE = 100  # newest labels that a recalibration keeps
FROZEN = 200  # updates for which a freeze lasts
RETRAIN = 300  # steps of 64 lessons that learn the heads anew: half a second
RELATIVE = 0.5  # what a preference says about each of its answers by itself, in labels
PRIOR = np.array([0.0, 0.6, 3.0, -0.5, 0.3, 0.0, 1.0, *AGAINST_HOLLOW], np.float32)
"""Weights of (1, *prototypes.NAMES, *hollow.NAMES) at the start."""


class Vectors(Protocol):
    """What the model needs of an encoder; see :class:`reward.encoder.Encoder`."""

    name: str
    size: int

    @property
    def version(self) -> str: ...

    def encode(self, texts: Sequence[str]) -> Array: ...


@dataclass(frozen=True)
class Label:
    """What was said about an answer: ``value`` from 0 (bad) to 1 (good).

    ``certain``: measured, not said in passing; then it is not discounted for slips. ``watched``: it enters AUC and
    calibration error; False where another label of the same answer already did. ``rarity``: for how many times the
    answers it stands, since hardly anybody speaks of some kinds; the heads learn it so much more, the answer's own
    prototype does not.
    """

    id: str
    example: Example
    value: float
    weight: float = 1.0
    certain: bool = False
    watched: bool = True
    rarity: float = 1.0


@dataclass(frozen=True)
class Pair:
    """``chosen`` is better than ``rejected``; ``absolute``: and it is right by itself (a correction)."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    weight: float = 1.0
    absolute: bool = False
    structure: Structure = field(default_factory=Structure)


class Trace(NamedTuple):
    """What a label did that can be taken back: its value, the weights that its answer got, which lesson it became."""

    value: float
    good: float
    bad: float
    lesson: int


@dataclass(frozen=True)
class Estimate:
    """What the model says of one answer; the fields are those of :class:`everloop.score.Score`.

    ``value`` is the probability that the answer is good; that a label says so is a little less sure
    (:meth:`reward.calibration.Calibration.heard`). ``logits`` (heads,): calibrated, one a member, from which an
    opinion is combined with people's words.
    """

    value: float
    spread: float
    reward: float
    mask: bool
    logits: tuple[float, ...] = field(default=(), repr=False)


class Seen(NamedTuple):
    """Answers as the heads see them: ``own`` (heads, n, 1 + prototypes + hollow) and ``shared`` (n, …) features, the
    prompts' ``topics`` (n,), and the vectors of prompts and answers (n, size)."""

    own: Array
    shared: Array
    topics: Array
    asked: Array
    said: Array


def shared_features(prompts: Array, answers: Array, examples: Sequence[Example], style: bool = True) -> Array:
    """(n, SHARED + 3·size): structure, style (nothing of it where not ``style``), the texts' vectors, their product."""
    size = prompts.shape[1]
    made = np.zeros((len(examples), SHARED + 3 * size), np.float32)
    known = [[*example.structure.vector(), *features.content_vector(example)] for example in examples]
    made[:, : len(features.NAMES)] = known
    if style:
        made[:, STYLE_COLUMNS] = [features.style_vector(example.answer) for example in examples]
    made[:, :SHARED] *= EMPHASIS
    np.multiply(prompts, answers * np.float32(math.sqrt(size)), out=made[:, SHARED : SHARED + size])
    made[:, SHARED + size : SHARED + 2 * size] = answers
    made[:, SHARED + 2 * size :] = prompts
    return made


def shared_prior(size: int) -> Array:
    """Where the shared weights start: struggle speaks a little against an answer, the rest is not known."""
    weights = np.zeros(SHARED + 3 * size, np.float32)
    weights[: len(features.NAMES)] = np.array([features.PRIOR[name] for name in features.NAMES]) / EMPHASIS
    return weights


SUPPORT = KNOWN.index("support")
SHARED = len(features.NAMES) + features.STYLES
STYLE_COLUMNS = slice(len(features.NAMES), SHARED)
STYLE_IS_SCORED = False  # it is learned with, so that it explains what raters owe to it, and left out of what is said


class RewardModel:
    """The live model of one (tenant, policy). Not thread-safe; one writer.

    ``updates`` counts the labels and pairs learned from. ``offsets`` are those of the records read so far, kept
    by whoever feeds it; they are part of a version.
    """

    def __init__(self, config: RewardConfig, encoder: Vectors) -> None:
        self.declaration = declaration.load(config.declaration)
        pessimism = self.declaration.combine.pessimism
        self.config = config if pessimism is None else config.model_copy(update={"pessimism": pessimism})
        self.encoder = encoder
        self.comments = Comments(encoder.size)
        self.believe(Reliability(self.declaration))
        self.prototypes = Prototypes(config.heads, encoder.size)
        self.heads = Heads(config.heads, PRIOR, shared_prior(encoder.size), config.learning_rate)
        self.hollow, self.length = Hollow(), Length()
        self.reservoir = Reservoir(config.reservoir)
        self.topics = Topics(encoder.size)
        self.values = Values(config.heads, shared_prior(encoder.size), config.learning_rate, config.reservoir)
        self.calibration = Calibration(config.window, MOST_TOPICS)
        self.drift = Drift(encoder.size)
        self.propensity = Propensity()
        self.frozen_until = 0  # updates before which no opinion is to be trained on
        self.updates = 0
        self.seen = [0, 0]  # bad and good labels
        self.refused = 0  # labels that were not learned because something in them was not finite
        self.trace: Trace | None = None  # of the label that was learned last; None: it was a pair, or refused
        self.offsets: dict[str, int] = {}
        self.changed_rows: set[int] = set()
        self.changed_slots: set[int] = set()

    @property
    def may_judge(self) -> bool:
        """Whether enough was learned to have an opinion."""
        return sum(self.seen) >= MIN_LABELS and min(self.seen) >= FEWEST_OF_A_KIND

    def estimate(self, examples: Sequence[Example]) -> list[Estimate]:
        """What the model says of each answer; distinct texts are encoded once."""
        if not examples:
            return []
        columns = self.calibration.line(*self._logits(examples)).T.tolist()
        silent = (NEVER,) * self.config.heads
        return [
            opinion(silent, self.config.pessimism, True)
            if worthless(example)
            else opinion(tuple(column), self.config.pessimism, self.may_judge)
            for example, column in zip(examples, columns, strict=True)
        ]

    def _logits(self, examples: Sequence[Example]) -> tuple[Array, Array]:
        """Each member's logits (heads, n), what is only style or length left out, and the prompts' topics (n,)."""
        seen = self.seen_of(examples, style=STYLE_IS_SCORED)
        return self.heads.logits(seen.own, seen.shared) - self._by_length(examples), seen.topics

    def _by_length(self, examples: Sequence[Example]) -> Any:
        return 0 if STYLE_IS_SCORED else self.length.part([example.answer for example in examples])

    def seen_of(self, examples: Sequence[Example], *, style: bool) -> Seen:
        """What the heads see of answers; distinct texts are encoded once."""
        texts = [example.prompt for example in examples]
        prompts, which = _distinct(texts)
        answers, pairs = _distinct([example.answer for example in examples])
        vectors = self.encoder.encode([*prompts, *answers])
        asked, said = vectors[: len(prompts)], vectors[len(prompts) :]
        own = self.prototypes.features(asked, which, [key_of(answer) for answer in answers], said, pairs)
        fading = np.exp(-own[..., SUPPORT, None] / SUPPORTED)  # 1 / (1 + good labels of the answer)
        topics = self.topics.of(asked).take(which)
        asked, said = asked.take(which, 0), said.take(pairs, 0)
        hollow = self.hollow.features(self.encoder, texts, asked, said) * fading
        own = np.concatenate([np.ones((*own.shape[:2], 1), np.float32), own, hollow], axis=2)
        return Seen(own, shared_features(asked, said, examples, style), topics, asked, said)

    def believe(self, reliability: Reliability) -> None:
        """Weigh words by this, which reads comments by what this model has learned of them."""
        self.reliability = reliability
        reliability.reading = self.read

    def read(self, comment: str) -> float | None:
        """P(the answer is good) as far as a comment says; None: comments cannot be read yet."""
        return self.comments.read(self.vector(comment))

    def vector(self, comment: str) -> Array:
        """(size,) of a comment's words."""
        (vector,) = self.encoder.encode([comment[:CHARS]])
        return vector

    def members(self, name: str) -> Array:
        """Which members learn of what is named so, (heads,) of 0 and 1."""
        return _members(name, self.config.heads)

    def save(self, root: Path) -> str:
        """Write an immutable snapshot below ``root``; returns its version. See :mod:`reward.snapshot`."""
        from reward import snapshot

        return snapshot.save(self, root)

    @staticmethod
    def load(folder: Path, encoder: Vectors) -> RewardModel:
        """The model of a snapshot folder, to score with. Raises ContractError where it is not whole."""
        from reward import snapshot

        return snapshot.load(folder, encoder)

    def learn(self, lessons: Sequence[Label | Pair]) -> list[float]:
        """Learn from each in turn; returns what was expected before: P(it says good), or P(chosen is better)."""
        return [self._learn_pair(one) if isinstance(one, Pair) else self._learn_label(one) for one in lessons]

    def foretell(self, one: Label | Pair) -> float:
        """What is expected of a lesson that is not learned yet: P(it says good), or P(chosen is better)."""
        if isinstance(one, Pair):
            return self._expected_of_pair(
                self._of_pair(*_difference(self.seen_of(_sides(one), style=True))), longer(one)
            )
        return self._expected_of_label(*self._logits([one.example]))[0]

    def _expected_of_label(self, logits: Array, topic: Array) -> tuple[float, float]:
        """P(a label says good), and P(the answer is good)."""
        right = self.calibration.good(logits[:, 0].tolist(), int(topic[0]))
        return self.calibration.heard(right), right

    def _expected_of_pair(self, raw: Array, longer: float) -> float:
        """P(chosen is better), of members' logits (heads, 1) and by how much the chosen answer is longer."""
        return float(probability(raw if STYLE_IS_SCORED else raw - self.length.slope * longer).mean())

    def _of_pair(self, difference: Array, alike: Array) -> Array:
        """Each member's logit (heads, 1) for the first answer's being better, what is only style left out."""
        return self.heads.logits(difference[:, None], _neutral(alike[None]))

    def take_back(self, name: str, example: Example, trace: Trace) -> None:
        """Undo a label that nobody stands by any more: in its answer's prototype, the counts and replay.

        The step that the heads made stays, since later ones build on it; what is learned instead steps against it.
        """
        self._forget(example.answer, example.prompt, _members(name, self.config.heads), trace.good, trace.bad)
        self._silence(trace.lesson)
        self.seen[trace.value > 0.5] -= 1

    def take_back_pair(self, pair: Pair, lesson: int) -> None:
        """Undo a pair that became the ``lesson``-th: in its answers' prototypes and in replay, as a label."""
        members, told = _told_by(pair, self.config.heads)
        for answer, good, bad in told:
            self._forget(answer, pair.prompt, members, good, bad)
        self._silence(lesson)

    def _forget(self, text: str, asked: str, members: Array, good: float, bad: float) -> None:
        if text.strip():
            prompt, answer = self.encoder.encode([asked, text])
            row = self.prototypes.remove(key_of(text), answer, prompt, members, good, bad)
            self.changed_rows.update(() if row is None else (row,))

    def _silence(self, lesson: int) -> None:
        slot = self.reservoir.silence(lesson)
        self.changed_slots.update(() if slot is None else (slot,))

    def _learn_label(self, label: Label) -> float:
        seen = self.seen_of([label.example], style=True)
        self.trace = None
        raw = self.heads.logits(seen.own, _neutral(seen.shared))
        logits = raw - self._by_length([label.example])
        expected, right = self._expected_of_label(logits, seen.topics)
        if not all(map(math.isfinite, (label.value, expected, *raw[:, 0].tolist()))):
            return self._refuse()
        members = _members(label.id, self.config.heads)
        good = label.value if label.certain else meant(label.value, right)
        self.trace = Trace(label.value, label.weight * good, label.weight * (1 - good), self.reservoir.count)
        self._remember(label.example.answer, seen.asked[0], seen.said[0], members, self.trace.good, self.trace.bad)
        weight = label.weight * label.rarity
        lesson = Lesson(seen.own[:, 0], seen.shared[0], label.value, weight, members)
        topic = self._step(lesson, seen.asked[0], label.example.structure.turn)
        said = GOOD if label.value > 0.5 else BAD
        self.length.add(said, length_of(label.example.answer), _mean(raw[:, 0].tolist()), label.weight)
        self.seen[label.value > 0.5] += 1
        if label.watched:
            self.calibration.add(_mean(logits[:, 0].tolist()), expected, label.value, topic)
            self._answer(self.drift.told(label.value, expected))
        return expected

    def saw(self, example: Example) -> None:
        """Watch what is asked and answered: once for each call, whether or not anybody says anything of it."""
        (prompt,) = self.encoder.encode([example.prompt])
        self._answer(self.drift.asked(prompt))
        self.propensity.saw(example)

    @property
    def frozen(self) -> bool:
        """Whether what this model thinks is not to be trained on for now, since something has changed."""
        return self.updates < self.frozen_until

    def _answer(self, changed: list[str]) -> None:
        """Do what the configuration says about each kind of drift."""
        for kind in changed:
            for action in self.config.on_drift[kind]:
                if action == "recalibrate":
                    self.calibration.forget(RECALIBRATE)
                elif action == "retrain":
                    self._retrain()
                elif action == "freeze":
                    self.frozen_until = self.updates + FROZEN

    def _retrain(self) -> None:
        """Learn the heads anew from what is remembered: what was said before counts no more than its share of it."""
        size = self.encoder.size
        self.heads = Heads(self.config.heads, PRIOR, shared_prior(size), self.config.learning_rate)
        for step in range(RETRAIN if len(self.reservoir) else 0):
            self.heads.step(self.reservoir.sample(step))

    def _learn_pair(self, pair: Pair) -> float:
        seen = self.seen_of(_sides(pair), style=True)
        self.trace = None
        difference, alike = _difference(seen)
        raw = self._of_pair(difference, alike)
        expected = self._expected_of_pair(raw, longer(pair))
        if not (math.isfinite(expected) and np.isfinite(alike).all()):
            return self._refuse()
        members, told = _told_by(pair, self.config.heads)
        for (answer, good, bad), asked, said in zip(told, seen.asked, seen.said, strict=False):
            self._remember(answer, asked, said, members, good, bad)
        self.length.add(PAIR, longer(pair), _mean(raw[:, 0].tolist()), pair.weight)
        self._step(Lesson(difference, alike, 1.0, pair.weight, members), seen.asked[0], pair.structure.turn)
        return expected

    def _refuse(self) -> float:
        """Nothing is learned from what is not finite; it is counted, and nothing was expected of it."""
        self.refused += 1
        return 0.5

    def _remember(self, text: str, asked: Array, said: Array, members: Array, good: float, bad: float) -> None:
        if text.strip():
            self.changed_rows.add(self.prototypes.add(key_of(text), said, asked, members, good, bad))

    def _step(self, lesson: Lesson, asked: Array, turn: int) -> int:
        """Learn it and remember it; the topic that its prompt is of, which it may have founded."""
        topic = self.topics.place(asked)
        slot = self.reservoir.add(lesson, slice_of(topic, turn))
        self.changed_slots.add(slot)
        self.heads.step(self.reservoir.sample(beside=slot))
        self.updates += 1
        return topic


def _sides(pair: Pair) -> list[Example]:
    """The chosen and the rejected answer."""
    return [Example(pair.prompt, answer, pair.structure) for answer in (pair.chosen, pair.rejected)]


def longer(pair: Pair) -> float:
    """By how much, in lengths, the chosen answer is the longer one."""
    return length_of(pair.chosen) - length_of(pair.rejected)


def _told_by(pair: Pair, heads: int) -> tuple[Array, list[tuple[str, float, float]]]:
    """Which members see a pair, and what it says of its answers by themselves: (answer, good, bad), chosen first."""
    if pair.absolute:  # rare and meant: no member may miss it
        return np.ones(heads, np.float32), [(pair.chosen, pair.weight, 0.0)]
    weight = RELATIVE * pair.weight
    return _members(pair.id, heads), [(pair.chosen, weight, 0.0), (pair.rejected, 0.0, weight)]


def _difference(seen: Seen) -> tuple[Array, Array]:
    """Own (heads, …) and shared (…,) features of the first answer less those of the second."""
    return seen.own[:, 0] - seen.own[:, 1], seen.shared[0] - seen.shared[1]


def _neutral(shared: Array) -> Array:
    """Shared features (n, …) without what is only style."""
    if STYLE_IS_SCORED:
        return shared
    neutral = shared.copy()
    neutral[:, STYLE_COLUMNS] = 0
    return neutral


def _distinct(texts: Sequence[str]) -> tuple[list[str], Any]:
    """The texts without repetition, and for each of the given ones its place among them."""
    at: dict[str, int] = {}
    rows = [at.setdefault(text, len(at)) for text in texts]
    return list(at), np.array(rows)


def _members(label: str, heads: int) -> Array:
    """Which members see a label, (heads,) of 0 and 1: decided by the label's id, never none of them."""
    digest = hashlib.blake2b(label.encode(), digest_size=heads).digest()
    members = [byte < 256 * KEEP for byte in digest]
    return np.array(members if any(members) else [True] * heads, np.float32)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def meant(said: float, right: float, slips: float = SLIPS) -> float:
    """P(good | what was said), by Bayes, for an answer thought good with probability ``right`` before.

    A share ``slips`` of labels say the opposite of what was meant. Example: ``meant(1.0, 0.05) == 0.5``: where one
    answer in twenty is good and one thumb in twenty is a slip, an up is as likely the one as the other.
    """
    up = right * (1 - slips) / (right * (1 - slips) + (1 - right) * slips)
    down = right * slips / (right * slips + (1 - right) * (1 - slips))
    return said * up + (1 - said) * down


def opinion(logits: tuple[float, ...], pessimism: float, entitled: bool) -> Estimate:
    """Members' calibrated logits as mean, spread and pessimistic reward; where they are not finite, no opinion."""
    if not all(math.isfinite(logit) for logit in logits):
        return Estimate(0.5, 0.0, 0.0, False, logits)
    members = [sigmoid(logit) for logit in logits]
    value = _mean(members)
    spread = math.sqrt(sum((member - value) ** 2 for member in members) / len(members))
    reward = min(max(2 * (value - pessimism * spread) - 1, -1.0), 1.0)
    return Estimate(value, spread, reward, entitled and spread <= MAX_SPREAD, logits)
