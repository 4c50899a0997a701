"""When a run starts, and what is said while it does not."""

from __future__ import annotations

from typing import Any

import pytest
from everloop.config import TrainConfig

from services.learner.facts import Facts
from services.learner.triggers import TRIAL, Due, Waiting, decide

TRAIN = TrainConfig(min_scored=100)


def told(facts: Facts, train: TrainConfig = TRAIN, now: float = 1000.0) -> Due | Waiting:
    return decide(facts, train, now)


def facts(**fields: Any) -> Facts:
    return Facts(**fields)


def test_enough_new_episodes_start_a_run():
    assert told(facts(scored=100)) == Due("100 new scored episodes (min_scored 100)")
    waiting = told(facts(scored=40))
    assert isinstance(waiting, Waiting)
    assert waiting.sentence == "60 more scored episodes (40 of 100 are there)"
    assert waiting.numbers == {"scored": 40.0, "min_scored": 100.0}


def test_a_cadence_starts_one_with_whatever_is_new():
    hourly = TrainConfig(min_scored=100, every="1h")
    assert isinstance(told(facts(scored=3, run_started=1000.0), hourly, now=4599.0), Waiting)
    due = told(facts(scored=3, run_started=1000.0), hourly, now=4600.0)
    assert due == Due("every 1h, with 3 new scored episodes")
    assert isinstance(told(facts(scored=0, run_started=1000.0), hourly, now=9000.0), Waiting)
    waiting = told(facts(scored=3, run_started=1000.0), hourly, now=4000.0)
    assert "or 600 s (every 1h)" in waiting.sentence  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rewards": [0.1] * 40, "reward_before": 0.3}, "mean reward fell from 0.30 to 0.10"),
        ({"labels": [0.0, 1.0] * 20, "labels_before": 0.7}, "share of good ratings fell from 0.70 to 0.50"),
    ],
)
def test_a_fall_starts_one(changes: dict[str, Any], says: str):
    due = told(facts(scored=40, **changes))
    assert isinstance(due, Due)
    assert says in due.reason
    assert isinstance(told(facts(scored=40, **changes), TrainConfig(reward_drift=None, thumbs_drop=None)), Waiting)


def test_few_values_are_no_fall():
    assert isinstance(told(facts(scored=5, rewards=[-1.0] * 5, reward_before=0.9)), Waiting)


def test_a_run_waits_for_the_trial_of_the_last_adapter():
    canary = {"adapter": "abc", "state": "canary", "time": 0.0}
    waiting = told(facts(scored=500, deciding=canary), now=1e9)
    assert isinstance(waiting, Waiting)
    assert waiting.sentence == "the canary of adapter abc to end, so that the run starts from what is live"
    announced = {"adapter": "abc", "state": "announced", "time": 100.0}
    assert isinstance(told(facts(scored=500, deciding=announced), now=100.0 + TRIAL - 1), Waiting)
    assert isinstance(told(facts(scored=500, deciding=announced), now=100.0 + TRIAL), Due)


def test_an_order_waits_for_nothing_but_a_pause():
    order = {"id": "c1", "by": "ada"}
    canary = {"adapter": "abc", "state": "canary", "time": 0.0}
    assert told(facts(orders=[order], deciding=canary)) == Due("ordered by ada", order)
    paused = told(facts(orders=[order], scored=1000, paused=True))
    assert isinstance(paused, Waiting)
    assert "everloop resume" in paused.sentence
