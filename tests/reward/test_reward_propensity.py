"""Who speaks of an answer is no accident: labels count for those like them of which nobody speaks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import ormsgpack
import pytest
from everloop.config import Config, RewardConfig
from everloop.home import Home

from benchmarks.words import LENGTHS, answers
from reward import durable
from reward.features import Example, Structure
from reward.handler import RewardHandler
from reward.model import Label, RewardModel
from reward.propensity import LEAST, MOST, Propensity


def example(words: int, turn: int = 0) -> Example:
    return Example("what is this", " ".join(["word"] * words), Structure(turn=turn))


def test_a_mean_over_labels_becomes_one_over_all_calls() -> None:
    made, seen, late = Propensity(), [], []
    everything = list(answers(3000, 1))
    for words, good, spoken in everything:
        made.saw(example(words))
        late += [(words, good)] if spoken else []
        if len(late) > 20:  # words come late, and in no order
            seen += [(made.spoken(example(*[late[0][0]])), late.pop(0)[1])]
    weights, labels = np.array(seen, np.float64).T
    truth = float(np.mean([good for _, good, _ in everything]))
    plain, weighted = labels.mean(), float(weights @ labels / weights.sum())
    assert truth - plain > 0.15, "or there is nothing to correct"
    assert abs(weighted - truth) < 0.5 * abs(plain - truth)
    assert 0.8 < weights.mean() < 1.2
    assert weights.min() >= LEAST
    assert weights.max() <= MOST
    assert made.weight(example(3)) > 2 > 0.7 > made.weight(example(300))


def test_weights_begin_at_one_and_stay_there_where_silence_is_no_matter_of_kind() -> None:
    made, dice = Propensity(), random.Random(2)
    weights = []
    for _ in range(2000):
        one = example(dice.choice(LENGTHS), dice.randrange(4))
        made.saw(one)
        if dice.random() < 0.2:
            weights.append(made.spoken(one))
    assert weights[0] == 1.0
    assert max(abs(weight - 1) for weight in weights) < 0.6
    assert np.std(weights[-100:]) < 0.25


def test_the_same_calls_give_the_same_bits_through_a_restart() -> None:
    calls, half = list(answers(400, 3)), 200
    whole, first, second = Propensity(), Propensity(), Propensity()
    for made, part in ((whole, calls), (first, calls[:half])):
        for words, _, spoken in part:
            made.saw(example(words))
            _ = made.spoken(example(words)) if spoken else None
    second.take(first.dump())
    for words, _, spoken in calls[half:]:
        second.saw(example(words))
        _ = second.spoken(example(words)) if spoken else None
    assert second.dump() == whole.dump()


class Answered:
    """Calls through the handler, each with a prompt of its own, and a thumb where somebody spoke."""

    def __init__(self, kit: Any, home: Home, words: Any) -> None:
        self.kit, self.state = kit, kit.MemoryState()
        self.handler = RewardHandler(Config(), home, lambda name: words)
        self.count = 0

    def take(self, calls: list[tuple[int, bool, bool]]) -> None:
        episodes = []
        for words, good, spoken in calls:
            name = f"e{self.count + len(episodes)}"
            rated = [self.kit.thumb(1 if good else -1, f"{name}-t", rater=name)] if spoken else []
            answer = " ".join([name, *["word"] * (words - 1)])
            episodes.append(self.kit.episode(name, (f"question {name}", answer), feedback=rated))
        for record in self.kit.records(*episodes, start=self.count):
            self.handler.handle(self.state, record, now=0.0)
        self.count += len(episodes)
        self.handler.flush(self.state, now=0.0)


def test_the_estimate_of_success_is_nearer_to_the_truth(kit: Any, home: Home, words: Any) -> None:
    calls = list(answers(1000, 4))
    truth = float(np.mean([good for _, good, _ in calls]))
    made = Answered(kit, home, words)
    made.take(calls)
    status = made.handler.status()["default/assistant"]
    assert truth - status["thumbs_up_share"] > 0.15, "or there is nothing to correct"
    assert abs(status["success_estimate"] - truth) < 0.7 * abs(status["thumbs_up_share"] - truth)


def test_a_label_of_a_rare_kind_moves_the_heads_further_and_its_own_answer_no_more(letters: Any) -> None:
    models = [RewardModel(RewardConfig(), letters) for _ in range(2)]
    for made, rarity in zip(models, (1.0, 3.0), strict=True):
        made.learn([Label("l1", Example("what is this", "it is that"), 1.0, rarity=rarity)])
    one, rare = models
    assert np.abs(rare.heads.shared_sums).sum() > np.abs(one.heads.shared_sums).sum()
    assert np.array_equal(rare.prototypes.good, one.prototypes.good)
    assert rare.trace == one.trace


def test_what_a_rater_may_weigh_in_all_holds_for_rare_answers_too(kit: Any, home: Home, words: Any) -> None:
    made = Answered(kit, home, words)
    made.take(list(answers(400, 5)))
    desk = made.handler._desks["default", "assistant"]
    weights = [slot.weight for slot in desk.guard.slots]
    known = [ormsgpack.unpackb(value)[2] for key, value in made.state.entries.items() if key.startswith("episode/")]
    rarities = [call["rarity"] for calls in known for call in calls.values() if "rarity" in call]
    assert sum(weights) == pytest.approx(sum(rarities), rel=0.02), "the guard counts what is learned in the end"
    assert abs(sum(weights) / len(weights) - 1) > 0.05, "which is not a label's own weight"


def test_silence_teaches_the_heads_nothing_however_much_of_it_there_is(letters: Any) -> None:
    made, one = RewardModel(RewardConfig(), letters), Example("what is this", "it is that")
    made.saw(one)
    heads = {name: array.copy() for name, array in made.heads.arrays().items()}
    size = {name: len(piece) for name, piece in durable.changes(made)}
    for i in range(20_000):
        made.saw(example(10, i % 3) if i % 100 else one)
    assert all(np.array_equal(heads[name], array) for name, array in made.heads.arrays().items())
    assert made.seen == [0, 0]
    assert not len(made.reservoir)
    after = {name: len(piece) for name, piece in durable.changes(made)}
    assert after.keys() == size.keys()
    assert after["core"] < size["core"] + 3000, "digits of a hundred numbers, and no more"
    assert after["drift"] < size["drift"] + 20_000, "a logarithm of buckets"
    weights = [made.propensity.spoken(example(10, i % 3)) for i in range(30)]
    assert weights[0] == 1.0
    assert max(abs(weight - 1) for weight in weights) < 0.3, "and the first labels after it weigh as any"
