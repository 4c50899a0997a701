"""Falls of the mean reward and of thumbs."""

import pytest

from reward.watch import FEWEST, Watch


def test_a_fall_is_the_older_window_less_the_newer():
    watch = Watch(50)
    for value in [0.8] * 100 + [0.2] * 50:
        watch.rewards.add(value)
    assert watch.rewards.fall == pytest.approx(0.6)
    assert watch.rewards.recent == pytest.approx(0.2)


def test_too_few_values_show_no_fall():
    watch = Watch(50)
    assert watch.status()["reward_mean"] is None
    for _ in range(2 * FEWEST - 1):
        watch.labels.add(1.0)
    assert (watch.labels.recent, watch.labels.fall) == (1.0, None)
    watch.labels.add(1.0)
    assert watch.labels.fall == 0.0


def test_memory_is_bounded_and_comes_back():
    watch = Watch(50)
    for i in range(1000):
        watch.rewards.add(float(i))
    again = Watch(50, **watch.dump())
    assert len(again.rewards.values) == 100
    assert again.status() == watch.status()
