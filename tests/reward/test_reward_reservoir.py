"""What is remembered for replay: fair shares of the slices, the same after a restart, and what that is worth."""

import numpy as np
import pytest
from everloop.config import RewardConfig

from reward import model as model_module
from reward.features import Example
from reward.heads import Lesson
from reward.model import Label, RewardModel
from reward.reservoir import REPLAY, Reservoir, slice_of
from reward.topics import MOST, Topics


def lesson(label=1.0):
    return Lesson(np.zeros((1, 1), np.float32), np.zeros(1, np.float32), label, 1.0, np.ones(1, np.float32))


def test_a_quiet_slice_keeps_its_share_and_a_busy_one_its_newest():
    memory = Reservoir(60)
    for number in range(40):
        memory.add(lesson(number), slice_=1)
    for number in range(5000):
        memory.add(lesson(1000 + number), slice_=2)
    assert memory.sizes() == {1: 30, 2: 30}
    labels = sorted(memory.lesson(slot).label for slot in range(60))
    assert labels == [*range(10, 40), *range(5970, 6000)]


def test_slices_tell_topics_and_turns_apart():
    assert len({slice_of(topic, turn) for topic in range(MOST) for turn in range(3)}) == 3 * MOST
    assert slice_of(2, 2) == slice_of(2, 40)


def test_topics_are_few_and_never_move(words):
    topics, prompts = Topics(words.size), words.encode([f"word{i}" for i in range(60)])
    placed = [topics.place(prompt) for prompt in prompts]
    first = topics.centres.copy()
    assert len(first) == MOST
    assert placed[:MOST] == list(range(MOST))
    assert [topics.place(prompt) for prompt in prompts] == topics.of(prompts).tolist()
    np.testing.assert_array_equal(topics.centres, first)


def test_a_memory_put_together_again_goes_on_the_same():
    one, other = Reservoir(64), Reservoir(64)
    for number in range(300):
        one.add(lesson(number), slice_=number % 7 and 1)
    held = [(*mark, one.lesson(slot)) for slot, mark in enumerate(one.marks)]
    other.restore(held, one.count)
    for number in range(100):
        assert one.sample().labels.tolist() == other.sample().labels.tolist()
        assert one.add(lesson(number), slice_=number % 3) == other.add(lesson(number), slice_=number % 3)
    assert one.silence(380) == other.silence(380) is not None
    assert one.silence(0) is None
    assert len(one.sample().labels) == REPLAY
    with pytest.raises(ValueError, match="numbers below"):
        Reservoir(64).restore(held, 10)


def topic_labels(name, count, seed):
    """Answers that never recur: right where they share the prompt's word of this topic's ten."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        asked, said = random.integers(6, size=2) if random.random() < 0.6 else (random.integers(6),) * 2
        example = Example(f"{name} {name}ask{asked}", f"{name}say{said} {name}{seed}x{i}")
        found.append(Label(f"{name}{seed}-{i}", example, float(asked == said)))
    return found


def heads_alone(words):
    """Without prototypes, so that what the heads forget shows."""
    made = RewardModel(RewardConfig(heads=3, reservoir=600, learning_rate=0.005), words)
    made.prototypes.capacity = 1
    return made


def right_on(model, labels):
    values = [one.value for one in model.estimate([label.example for label in labels])]
    good = np.array([label.value for label in labels]) > 0.5
    return float(np.mean((np.array(values) > np.median(values)) == good))


def test_a_topic_that_goes_quiet_for_five_thousand_labels_is_not_forgotten(words, monkeypatch):
    def lost():
        model = heads_alone(words)
        model.learn(topic_labels("bank", 600, 0))
        before = right_on(model, unseen)
        model.learn(topic_labels("shop", 5000, 2))
        assert before > 0.7
        return before - right_on(model, unseen)

    unseen = topic_labels("bank", 400, 1)
    kept = lost()
    monkeypatch.setattr(model_module, "slice_of", lambda topic, turn: 0)
    assert kept < 0.06
    assert lost() > 2 * kept, "a memory of the newest alone forgets"


def test_one_pass_agrees_with_every_other_order(words):
    """Over shuffles of the same 800 labels: probabilities of unseen answers differ by 0.05 on the mean at most."""
    labels, unseen = topic_labels("bank", 800, 4), topic_labels("bank", 200, 5)
    found = []
    for seed in range(4):
        shuffled = [labels[i] for i in np.random.default_rng(seed).permutation(len(labels))]
        made = RewardModel(RewardConfig(), words)
        made.learn(shuffled)
        found.append([one.value for one in made.estimate([label.example for label in unseen])])
    values = np.array(found)
    assert np.abs(values - values.mean(0)).mean() <= 0.05
