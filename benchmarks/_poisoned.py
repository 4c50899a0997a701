"""The bank desk with customers who come back, of whom a few poison what is learned; scored by the scorer's own handler.

Three ways to poison, each by a share of the customers, who rate every answer, and one to tell what they would cost
anyway, since what they would have said in earnest is lost as well:

- ``push``: one wrong topic. A thumb up for it, for any other answer a thumb down and "right would have been" it;
- ``bought``: a thumb up for whatever comes, and every message asked ``TIMES`` times within as many seconds;
- ``random``: a thumb by the toss of a coin;
- ``silent``: nothing.

All others are as :class:`examples.bank_desk.customer.Customer` is. Who writes, what is asked and what is answered
follow from the seed alone, so that cells of one seed differ by what the poisoners say.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from everloop import wire
from everloop.config import Config
from everloop.episode import Episode
from everloop.home import Home
from everloop.log.base import Record
from everloop.score import Score
from everloop.topics import EPISODES, SCORES

from benchmarks._desk_loop import episode_of, words_of
from benchmarks._reward_streams import RIGHT
from examples.bank_desk.customer import Customer, Opinion
from examples.bank_desk.data import Desk, Message
from reward import desk as desks
from reward import evidence
from reward.features import Example
from reward.handler import RewardHandler
from reward.model import Label, Pair, RewardModel, Vectors
from reward.poison import Guard, Verdict
from reward.reliability import rater_of
from services.state import StateStore

KINDS = ("push", "bought", "random", "silent")
USERS = 100
APART = 30.0  # seconds of event time between two messages
TIMES = 10  # that a bought customer asks the same
BATCH = 50  # episodes that the handler takes at once
AT_ONCE = 4000  # answers judged at once


class Visit(NamedTuple):
    """One message that was answered and, perhaps, rated."""

    episode: Episode
    user: str
    poisons: bool


def user_of(seed: int, number: int) -> int:
    """Which customer writes message ``number``."""
    return random.Random(f"user/{seed}/{number}").randrange(USERS)


def opinion_of(kind: str, pushed: str, answer: str, dice: random.Random) -> Opinion:
    """What a poisoner says of an answer."""
    if kind == "push":
        return Opinion(answer == pushed, None if answer == pushed else pushed)
    if kind == "silent":
        return Opinion(None, None)
    return Opinion(True if kind == "bought" else dice.random() < 0.5, None)


def visits(desk: Desk, seed: int, kind: str, share: float, messages: int) -> list[Visit]:
    """The stream's first ``messages``; ``share`` of the users poison it. No ``kind``: all are honest."""
    made: list[Visit] = []
    for number, message in enumerate(desk.stream[:messages]):
        user = user_of(seed, number)
        poisons = bool(kind) and user < share * USERS
        for copy in range(TIMES if poisons and kind == "bought" else 1):
            made.append(_visit(desk, seed, kind if poisons else "", message, number, copy))
    return made


def _visit(desk: Desk, seed: int, kind: str, message: Message, number: int, copy: int) -> Visit:
    dice = random.Random(f"visit/{seed}/{number}/{copy}")
    answer = message.topic if dice.random() < RIGHT else dice.choice(desk.topics)
    if kind:
        opinion = opinion_of(kind, pushed_of(desk, seed), answer, dice)
    else:
        opinion = Customer(seed).judge(number, message.topic, answer)
    user, at = f"user-{user_of(seed, number)}", APART * number + copy
    name = f"ep_{number:06d}_{copy}"
    words = words_of(number * TIMES + copy, opinion, at, user)
    return Visit(episode_of(name, message.text, answer, words, at), user, bool(kind))


def pushed_of(desk: Desk, seed: int) -> str:
    """The topic that is pushed."""
    return random.Random(f"pushed/{seed}").choice(desk.topics)


class Open(Guard):
    """A guard that lets everything in."""

    def weigh(self, lesson: Label | Pair, *told: Any) -> Verdict:
        return Verdict(lesson.weight)


@contextmanager
def guards(on: bool) -> Iterator[None]:
    """Off: nothing is held or cut, and each rater is believed as all are."""
    kept = desks.Guard, evidence.rater_of
    if not on:
        desks.Guard, evidence.rater_of = Open, lambda word: None  # type: ignore[misc]
    try:
        yield
    finally:
        desks.Guard, evidence.rater_of = kept  # type: ignore[misc]


class Learned(NamedTuple):
    """``model``: the version that scores at the end. ``held``: share of the poisoners' and of the others' rated
    answers that were kept from learning. ``status``: the handler's. ``scores``: the newest of each episode."""

    model: RewardModel
    held: dict[bool, float]
    status: dict[str, Any]
    scores: dict[str, Score]


def learned(stream: Sequence[Visit], encoder: Vectors) -> Learned:
    """What the scorer's handler makes of a stream, in one pass.

    What is taken back counts as held: the newest score of the episode says so.
    """
    with tempfile.TemporaryDirectory(prefix="everloop-poison-") as folder:
        home, state = Home(Path(folder)), StateStore(Path(folder) / "state.db", cache=True)
        handler = RewardHandler(Config(home=home.root), home, lambda name: encoder)
        scores: dict[str, Score] = {}
        for start in range(0, len(stream), BATCH):
            records = [_record(start + i, visit.episode) for i, visit in enumerate(stream[start : start + BATCH])]
            outputs = [one for record in records for one in handler.handle(state, record, 0.0)]
            outputs += handler.flush(state, 0.0)
            made = [wire.decode(Score, one.value) for one in outputs if one.topic == SCORES.name and one.value]
            scores |= {score.episode: score for score in made}
        status = handler.status()["bank/desk"]
        model = RewardModel.load(home.root / "rewards" / "bank" / "desk" / status["version"], encoder)
    rated = [visit for visit in stream if visit.episode.turns[0].feedback]
    held = {
        kind: float(
            np.mean([scores[v.episode.id].quarantined is not None for v in rated if v.poisons is kind] or [0.0])
        )
        for kind in (True, False)
    }
    return Learned(model, held, status, scores)


def _record(offset: int, episode: Episode) -> Record:
    return Record(EPISODES.name, 0, offset, episode.key, wire.encode(episode), {"schema": "Episode"}, episode.updated)


def believed(model: RewardModel, stream: Sequence[Visit], poisons: bool) -> float:
    """Mean worth of a thumb of the poisoners, or of the others, beside what a thumb is supposed to be worth (1)."""
    words = {
        visit.user: word
        for visit in stream
        for word in visit.episode.turns[0].feedback
        if visit.poisons is poisons and word.kind == "thumb"
    }
    worths = [model.reliability.worth("thumb", rater_of(word)) for word in words.values()]
    return float(np.mean(worths)) if worths else float("nan")


def picks(model: RewardModel, desk: Desk, messages: Sequence[Message]) -> list[str]:
    """The topic that the model takes for the best answer to each message."""
    asked = [Example(message.text, topic) for message in messages for topic in desk.topics]
    parts = [model.estimate(asked[at : at + AT_ONCE]) for at in range(0, len(asked), AT_ONCE)]
    values = np.array([np.mean(one.logits) for part in parts for one in part]).reshape(len(messages), -1)
    return [desk.topics[at] for at in values.argmax(1)]


def told_apart(model: RewardModel, desk: Desk, messages: Sequence[Message], seed: int) -> float:
    """Share of answers, one right and one wrong for each message, that are judged rightly."""
    dice = random.Random(seed)
    wrong = [dice.choice([topic for topic in desk.topics if topic != one.topic]) for one in messages]
    asked = [Example(one.text, one.topic) for one in messages]
    asked += [Example(one.text, topic) for one, topic in zip(messages, wrong, strict=True)]
    good = np.array([estimate.value > 0.5 for estimate in model.estimate(asked)]).reshape(2, -1)
    return float((good[0].mean() + 1 - good[1].mean()) / 2)
