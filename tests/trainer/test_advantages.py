"""Advantages against examples worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from trainer import advantages


def floats(*values: float) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def test_gae_over_three_turns_by_hand():
    # Errors: 0 + 0.9*0.4 - 0.2 = 0.16; 0 + 0.9*0.6 - 0.4 = 0.14; 1 - 0.6 = 0.4. Discount times trace is 0.45.
    found = advantages.gae(floats(0, 0, 1), floats(0.2, 0.4, 0.6), discount=0.9, trace=0.5)
    last = 0.4
    middle = 0.14 + 0.45 * last
    first = 0.16 + 0.45 * middle
    assert found.advantages == pytest.approx(floats(first, middle, last))
    assert found.returns == pytest.approx(floats(first + 0.2, middle + 0.4, last + 0.6))


def test_gae_of_one_turn_is_reward_minus_value():
    found = advantages.gae(floats(0.7), floats(0.2), discount=1, trace=0.95)
    assert found.advantages == pytest.approx(floats(0.5))
    assert found.returns == pytest.approx(floats(0.7))


def test_gae_with_full_trace_is_the_sum_of_rewards_to_come():
    found = advantages.gae(floats(1, -1, 0.5), floats(3, 2, 1), discount=1, trace=1)
    assert found.returns == pytest.approx(floats(0.5, -0.5, 0.5))


def test_gae_refuses_values_that_do_not_fit():
    with pytest.raises(ValueError, match="one value a turn"):
        advantages.gae(floats(1, 2), floats(1), discount=1, trace=1)


def test_group_centred_counts_identical_answers():
    assert advantages.group_centred(floats(1, 0), floats(3, 1)) == pytest.approx(floats(0.25, -0.75))
    repeated = advantages.group_centred(floats(1, 1, 1, 0), np.ones(4))
    assert repeated == pytest.approx(floats(0.25, 0.25, 0.25, -0.75))


def test_normalised_gives_every_episode_the_same_say():
    # One episode of two calls (weight 1/2 each) and one of a single call.
    weights = floats(0.5, 0.5, 1)
    found = advantages.normalised(floats(2, 0, 3), weights, centre=True)
    assert np.average(found, weights=weights) == pytest.approx(0)
    assert np.average(found**2, weights=weights) == pytest.approx(1)


def test_normalised_keeps_a_group_centred_mean():
    found = advantages.normalised(floats(0.25, -0.75), floats(3, 1), centre=False)
    assert found == pytest.approx(floats(0.25, -0.75) / np.sqrt(0.1875))


def test_a_batch_without_spread_teaches_nothing():
    assert not advantages.normalised(floats(0.3, 0.3), np.ones(2), centre=True).any()
    assert not advantages.normalised(floats(0, 0), np.ones(2), centre=False).any()
    assert advantages.normalised(floats(), floats(), centre=True).size == 0


def test_shaping_moves_rewards_to_the_turn_where_the_potential_moves_and_keeps_their_sum():
    assert advantages.shaped(floats(0, 0, 1), floats(0, 0, 0.9), 1) == pytest.approx(floats(0, 0.9, 0.1))
    rewards, potentials = floats(0.2, -0.3, 1), floats(0.4, -0.8, 0.1)
    found = advantages.shaped(rewards, potentials, 0.9)
    discounts = 0.9 ** np.arange(3)
    assert (found * discounts).sum() == pytest.approx((rewards * discounts).sum() - potentials[0])


def test_shaping_by_a_potential_is_gae_with_it_as_the_value():
    rewards, potentials = floats(0, 0.5, -1), floats(0.2, 0.7, -0.4)
    shaped = advantages.gae(advantages.shaped(rewards, potentials, 0.9), np.zeros(3), discount=0.9, trace=0.8)
    assert shaped.advantages == pytest.approx(advantages.gae(rewards, potentials, discount=0.9, trace=0.8).advantages)
