"""Comments: what they mean is learned from those that came with a plainer word, and taken back with it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from everloop.config import Config
from everloop.feedback import Feedback
from everloop.home import Home
from everloop.score import Score

from benchmarks._comments import ENGLISH, GERMAN
from reward.comments import MOST, Comments
from reward.encoder import Encoder
from reward.evidence import said_of
from reward.handler import RewardHandler
from reward.model import RewardModel


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("minilm", threads=1)


class Traffic:
    """Episodes through the handler: each an answer with a comment, and where ``up`` is given a thumb of its writer."""

    def __init__(self, kit: Any, home: Home, encoder: Any) -> None:
        self.kit, self.home, self.encoder = kit, home, encoder
        self.state = kit.MemoryState()
        self.handler = RewardHandler(Config(), home, lambda name: encoder)
        self.count = 0

    def take(self, *episodes: Any) -> list[Any]:
        for record in self.kit.records(*episodes, start=self.count):
            self.handler.handle(self.state, record, now=0.0)
        self.count += len(episodes)
        return self.handler.flush(self.state, now=0.0)

    def said(self, name: str, text: str, up: bool | None, *more: Feedback, **fields: Any) -> Any:
        words = [Feedback(id=f"{name}-c", kind="comment", text=text, time=1.0, rater=f"rater of {name}")]
        if up is not None:
            words.append(self.kit.thumb(1 if up else -1, f"{name}-t", rater=f"rater of {name}"))
        return self.kit.episode(name, ("about my card", f"answer {name}"), feedback=[*words, *more], **fields)

    def taught(self, pairs: list[tuple[bool, str]], start: int = 0) -> None:
        self.take(*(self.said(f"e{start + i}", text, up) for i, (up, text) in enumerate(pairs)))

    @property
    def live(self) -> RewardModel:
        return self.handler._desks["default", "assistant"].live


@pytest.fixture
def traffic(kit: Any, home: Home, encoder: Encoder) -> Traffic:
    return Traffic(kit, home, encoder)


def shuffled(seed: int) -> list[tuple[bool, str]]:
    pairs = [*ENGLISH, *GERMAN]
    random.Random(seed).shuffle(pairs)
    return pairs


@pytest.mark.models
def test_comments_are_read_after_sixty_that_came_with_a_thumb(traffic: Traffic) -> None:
    pairs = shuffled(1)
    traffic.taught(pairs[:60])
    read = [(traffic.live.read(text), up) for up, text in pairs[60:]]
    right = sum((good is not None and good > 0.5) == up for good, up in read)
    assert right / len(read) > 0.6, f"{right} of {len(read)} that were never seen"
    traffic.taught(pairs[60:], start=60)
    weight = sum(traffic.live.reliability.weighs("comment")) / 2
    assert weight > 0.15, "and so they are believed, a little: seventeen words' worth against forty that doubt"
    good, bad = traffic.said("good", pairs[0][1], None), traffic.said("bad", pairs[1][1], None)
    ups = [pairs[0][0], pairs[1][0]]
    assert ups[0] != ups[1]
    words = [one.turns[0].feedback for one in (good, bad)]
    odds = [said_of("answer", its, traffic.live.reliability).odds for its in words]
    assert (odds[0] > 0 > odds[1]) == ups[0], "a comment alone moves the score its way"


@pytest.mark.models
def test_comments_that_say_nothing_of_the_answer_weigh_nothing(traffic: Traffic) -> None:
    pairs = shuffled(2)
    ups = [up for up, _ in pairs]
    random.Random(3).shuffle(ups)
    traffic.taught([(up, text) for up, (_, text) in zip(ups, pairs, strict=True)])
    assert sum(traffic.live.reliability.weighs("comment")) / 2 < 0.1


@pytest.fixture
def plain(kit: Any, home: Home, words: Any) -> Traffic:
    """By the encoder without weights: half of the comments say "fine", half "awful"."""
    made = Traffic(kit, home, words)
    made.taught([(i % 2 == 0, f"{'fine' if i % 2 == 0 else 'awful'} number {i}") for i in range(40)])
    return made


def test_the_line_is_part_of_the_version_and_survives_a_restart_to_the_bit(plain: Traffic, home: Home) -> None:
    before = plain.live.comments.line
    assert plain.live.read("fine number 99") > 0.5 > plain.live.read("awful number 99")
    version = plain.live.save(home.root / "one")
    plain.handler = RewardHandler(Config(), plain.home, lambda name: plain.encoder)
    plain.take()
    assert np.array_equal(plain.live.comments.line, before)
    assert plain.live.save(home.root / "two") == version
    held = RewardModel.load(home.root / "one" / version, plain.encoder)
    assert held.read("fine number 99") == plain.live.read("fine number 99"), "what scores reads as it did"
    plain.taught([(True, "awful number 50")], start=50)
    plain.live.offsets = held.offsets
    assert plain.live.save(home.root / "three") != version


def test_what_is_withdrawn_teaches_nothing_and_what_is_revised_teaches_the_other_way(plain: Traffic) -> None:
    before = plain.live.comments.line
    plain.take(plain.said("x", "awful indeed", True))
    assert not np.array_equal(plain.live.comments.line, before)
    revised = plain.said("x", "awful indeed", False, version=9)
    plain.take(revised)
    assert plain.live.comments.values[np.isfinite(plain.live.comments.values)][-1] == -1
    gone = plain.said("x", "awful indeed", None, version=10)
    plain.take(gone)
    assert np.array_equal(plain.live.comments.line, before)


def test_a_comment_is_read_before_anything_is_learned_of_it(plain: Traffic) -> None:
    heard = plain.live.reliability.tables["comment", "thumb"].copy()
    plain.take(plain.said("x", "fine indeed", False))
    added = plain.live.reliability.tables["comment", "thumb"] - heard
    assert added[1, 0] > 0.1 > added[0].max(), "it seemed good, and was said to be bad: heard as a mistake"
    again = plain.live.reliability.tables["comment", "thumb"].copy()
    plain.taught([(False, "fine indeed") for _ in range(30)], start=100)
    moved = plain.said("x", "fine indeed", False, plain.kit.thumb(1, "other", rater="r2"), version=9)
    before = plain.live.reliability.tables["comment", "thumb"].copy()
    plain.take(moved)
    assert (plain.live.reliability.tables["comment", "thumb"] - before)[0].max() < 1e-9, "it is not read anew"
    assert not np.array_equal(again, before)


def test_a_comment_beside_its_writers_thumb_adds_nothing_and_is_scored_when_it_comes(plain: Traffic, kit: Any) -> None:
    trust = plain.live.reliability
    both, alone = plain.said("x", "fine indeed", True), plain.said("x", "fine indeed", None)
    assert said_of("a", both.turns[0].feedback, trust).odds == said_of("a", both.turns[0].feedback[1:], trust).odds
    assert said_of("a", alone.turns[0].feedback, trust).odds > 0
    silent = kit.episode("y", ("about my card", "answer y"), version=1)
    spoken = plain.said("y", "fine indeed", None, version=2)
    plain.take(silent)
    (score,) = kit.decoded(Score, plain.take(spoken), "scores")
    assert score.version == 2


def test_a_quarantined_or_held_out_comment_teaches_nothing(plain: Traffic) -> None:
    count = plain.live.comments.count
    plain.take(plain.said("x", "awful indeed", True, quarantine="a test"))
    plain.take(plain.said("y", "awful indeed", True, split="gate"))
    assert plain.live.comments.count == count


def test_memory_is_constant_and_an_example_that_made_room_may_still_be_taken_back() -> None:
    chance, made = np.random.default_rng(0), Comments(16)
    for i in range(3 * MOST):
        made.learn(f"e{i}", chance.normal(size=16).astype(np.float32), float(i % 2))
    assert made.vectors.shape == (MOST, 16)
    line = made.line.copy()
    made.forget("e0")
    assert np.array_equal(made.line, line)
    other = Comments(16)
    for slot in range(MOST):
        other.unpack(slot, made.pack(slot))
    assert np.array_equal(other.line, line)
    with pytest.raises(ValueError, match="a comment of 20 bytes"):
        other.unpack(0, made.pack(0)[:20])
