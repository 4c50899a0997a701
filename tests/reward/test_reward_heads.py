"""The heads' loss by hand and by finite differences; preferences as differences; replay's bounds."""

import math

import numpy as np
import pytest

from reward.heads import Batch, Heads, Lesson, gradients, loss, probability
from reward.reservoir import REPLAY, Reservoir


def batch(random, heads=2, n=5, own=3, shared=4):
    return Batch(
        random.normal(size=(n, heads, own)),
        random.normal(size=(n, shared)),
        random.random(n),
        random.random(n) + 0.5,
        random.integers(0, 2, (n, heads)).astype(float),
    )


def alone(lesson):
    return Batch(*(np.array([part]) for part in lesson))


def test_loss_of_one_label_by_hand():
    one = Batch(np.array([[[2.0]]]), np.zeros((1, 1)), np.array([1.0]), np.array([1.0]), np.array([[1.0]]))
    weights = np.array([[0.5]]), np.zeros((1, 1))
    by_own, by_shared = gradients(*weights, one)
    # logit 0.5 · 2 = 1; -log σ(1); gradient (σ(1) - 1) · 2
    assert loss(*weights, one) == pytest.approx(math.log(1 + math.exp(-1)))
    assert by_own[0, 0] == pytest.approx((1 / (1 + math.exp(-1)) - 1) * 2)
    assert by_shared[0, 0] == 0


def test_loss_of_a_preference_is_bradley_terrys():
    chosen, rejected, weights = np.array([1.0, 3.0]), np.array([2.0, 0.5]), np.array([0.3, 0.7])
    difference = (chosen - rejected)[None, None]
    pair = Batch(difference, np.zeros((1, 1)), np.ones(1), np.ones(1), np.ones((1, 1)))
    better, worse = math.exp(weights @ chosen), math.exp(weights @ rejected)
    assert loss(weights[None], np.zeros((1, 1)), pair) == pytest.approx(-math.log(better / (better + worse)))


def test_gradients_agree_with_finite_differences():
    random = np.random.default_rng(0)
    lessons = batch(random)
    own, shared = random.normal(size=(2, 3)), random.normal(size=(2, 4))
    by_own, by_shared = gradients(own, shared, lessons)
    for weights, gradient in ((own, by_own), (shared, by_shared)):
        for at in np.ndindex(*weights.shape):
            kept, step = weights[at], 1e-6
            weights[at] = kept + step
            above = loss(own, shared, lessons)
            weights[at] = kept - step
            below = loss(own, shared, lessons)
            weights[at] = kept
            assert gradient[at] == pytest.approx((above - below) / (2 * step), abs=1e-7)


def test_a_member_learns_nothing_from_a_label_that_it_does_not_see():
    heads = Heads(2, np.zeros(1), np.zeros(1), 0.1)
    lesson = Lesson(np.ones((2, 1), np.float32), np.zeros(1, np.float32), 1.0, 1.0, np.array([1.0, 0.0], np.float32))
    heads.step(alone(lesson))
    assert heads.own[0, 0] > 0
    assert heads.own[1, 0] == 0


def test_a_step_that_would_not_be_finite_is_not_made():
    heads = Heads(1, np.ones(1), np.zeros(1), 0.1)
    lesson = Lesson(np.full((1, 1), np.inf, np.float32), np.zeros(1, np.float32), 0.0, 1.0, np.ones(1, np.float32))
    assert not heads.step(alone(lesson))
    assert heads.own.tolist() == [[1.0]]


def test_probability_does_not_overflow():
    assert probability(np.array([-1e9, 0.0, 1e9])).tolist() == pytest.approx([0.0, 0.5, 1.0], abs=1e-9)


def test_reservoir_is_bounded_and_draws_the_same_for_the_same_count():
    def filled():
        reservoir = Reservoir(64)
        for i in range(200):
            reservoir.add(Lesson(np.zeros((1, 1)), np.zeros(1), float(i), 1.0, np.ones(1)))
        return reservoir

    reservoir = filled()
    drawn = reservoir.sample().labels.tolist()
    assert len(reservoir) == 64
    assert sorted(reservoir.lesson(slot).label for slot in range(64)) == [float(i) for i in range(136, 200)]
    assert len(drawn) == REPLAY
    assert drawn == filled().sample().labels.tolist()
