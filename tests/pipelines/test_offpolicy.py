"""Off-policy estimates: by hand, on simulated logs whose truth is known, and where there must be no number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pipelines.offpolicy import MIN_ESS, Evaluation, Logged, evaluate

UP, DOWN = 1.0, 0.0


def two_kinds(**changed: Any) -> Logged:
    """100 people whose answer was good and has weight 0.5, 100 whose answer was bad and has weight 1.25."""
    first = np.arange(200) < 100
    fields: dict[str, Any] = {
        "reward": np.where(first, UP, DOWN),
        "behaviour": np.full(200, math.log(0.4)),
        "candidate": np.where(first, math.log(0.2), math.log(0.5)),
        "cluster": np.arange(200),
        "predicted": np.where(first, 0.6, 0.2),
        "expected": np.full(200, 0.5),
    }
    return Logged.of(**{**fields, **changed})


def test_the_estimates_are_those_computed_by_hand() -> None:
    found = evaluate(two_kinds())
    assert found.overlap.lacks is None
    assert found.overlap.mass == pytest.approx(0.875)
    assert found.overlap.ess == pytest.approx(175**2 / (100 * 0.5**2 + 100 * 1.25**2))
    assert found.overlap.largest == pytest.approx(1.25 / 175)
    assert found.logged.value == pytest.approx(0.5)
    assert found.importance.value == pytest.approx(100 * 0.5 / 200)
    assert found.snips.value == pytest.approx(50 / 175)
    assert found.doubly_robust.value == pytest.approx(0.5 + (100 * 0.5 * 0.4 - 100 * 1.25 * 0.2) / 175)
    assert found.best is found.doubly_robust
    assert found.left_out == {}


def test_the_interval_is_the_one_computed_by_hand() -> None:
    found = evaluate(two_kinds())
    influence = 0.5 * (1 - 50 / 175) / 175  # of either kind, with opposite signs
    ess = found.overlap.ess
    half = 1.97418 * math.sqrt(200 * influence**2 * 200 / 199 + 2 / ess**2)  # Student's t of 168 degrees
    unseen = 1 - found.overlap.mass_high
    assert unseen == pytest.approx(1 - 0.875 - 1.97196 * 0.375 / math.sqrt(199), abs=1e-5)
    assert found.snips.low == pytest.approx((50 / 175 - half) * (1 - unseen), abs=1e-5)
    high = 50 / 175 + half
    assert found.snips.high == pytest.approx(high + (1 - high) * unseen, abs=1e-5)


def test_a_policy_that_is_the_logged_one_has_the_mean_of_its_rewards() -> None:
    same = two_kinds()
    found = evaluate(two_kinds(candidate=same.behaviour, predicted=None, expected=None))
    assert found.snips == pytest.approx(found.logged)
    assert found.importance.value == pytest.approx(found.logged.value)
    assert found.overlap.ess == pytest.approx(200)
    assert found.doubly_robust is None
    assert found.best is found.snips


def test_weights_above_the_root_of_n_are_cut_and_the_share_is_told() -> None:
    logged = two_kinds()
    behaviour = logged.behaviour.copy()
    behaviour[150] = math.log(0.5) - math.log(100.0)  # a weight of 100; 14.1 are left of it
    found = evaluate(two_kinds(behaviour=behaviour))
    total = 50 + 99 * 1.25
    assert found.overlap.cut == pytest.approx(1 - (total + math.sqrt(200)) / (total + 100))
    assert found.snips.value == pytest.approx(50 / (total + math.sqrt(200)))


# Simulated: a question has a number x, three answers, and a chance of a thumb up by answer and x; people differ.


def chances(x: np.ndarray, slope: float) -> np.ndarray:
    scores = np.stack([slope * x, np.zeros_like(x), -slope * x + 0.3], axis=1)
    grown = np.exp(scores)
    return grown / grown.sum(axis=1, keepdims=True)


def success(x: np.ndarray) -> np.ndarray:
    return np.stack([0.2 + 0.6 * x, np.full_like(x, 0.5), 0.85 - 0.6 * x], axis=1)


TRUTH_AT = (np.arange(100_000) + 0.5) / 100_000
TRUTH = float((chances(TRUTH_AT, 2.0) * success(TRUTH_AT)).sum(axis=1).mean())


def simulated(seed: int, n: int = 600, *, model: str = "right", told: float = 2.0) -> Logged:
    """``told``: the slope of the policy whose log-probabilities are given as the candidate's, whose own is 2."""
    random = np.random.default_rng(seed)
    x, at = random.random(n), np.arange(n)
    who = random.integers(n // 3, size=n)
    logging = chances(x, -1.0)
    answers, own = (
        (random.random(n)[:, None] > each.cumsum(axis=1)).sum(axis=1).clip(max=2) for each in (logging, chances(x, 2.0))
    )
    taste = random.uniform(-0.1, 0.1, n // 3)[who]
    reward = (random.random(n) < success(x)[at, answers] + taste).astype(float)
    reward[random.random(n) < 0.4] = np.nan
    q = success(x) if model == "right" else np.tile([0.9, 0.1, 0.4], (n, 1))
    candidate = np.log(chances(x, told)[at, answers])
    return Logged.of(reward, np.log(logging[at, answers]), candidate, who, q[at, answers], q[at, own])


def test_much_data_gives_the_truth_also_with_a_model_of_the_reward_that_is_wrong() -> None:
    found = evaluate(simulated(1, 200_000, model="wrong"))
    assert abs(found.logged.value - TRUTH) > 0.03
    for estimate in (found.importance, found.snips, found.doubly_robust):
        assert estimate.value == pytest.approx(TRUTH, abs=0.006)


def test_with_a_right_model_the_truth_is_found_though_the_probabilities_are_wrong() -> None:
    found = evaluate(simulated(2, 200_000, told=0.0))
    assert abs(found.snips.value - TRUTH) > 0.03
    assert found.doubly_robust.value == pytest.approx(TRUTH, abs=0.006)


def test_intervals_hold_the_truth_as_often_as_they_say_and_a_good_model_makes_them_narrower() -> None:
    logs = [evaluate(simulated(seed)) for seed in range(300)]
    for kind in ("logged", "importance", "snips", "doubly_robust"):
        where = TRUTH if kind != "logged" else float((chances(TRUTH_AT, -1.0) * success(TRUTH_AT)).sum(1).mean())
        found = [getattr(one, kind) for one in logs]
        held = np.mean([one.low <= where <= one.high for one in found])
        assert held >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / 300), kind
        assert abs(np.mean([one.value for one in found]) - where) < 0.006, kind  # no bias to speak of
    narrow = np.mean([one.snips.high - one.snips.low for one in logs])
    assert narrow < 0.25  # such an interval says something


def test_intervals_at_the_least_overlap_that_is_accepted_hold_the_truth() -> None:
    """Small logs with heavy weights: those that give a number at all."""
    given = [one for one in (evaluate(simulated(seed, 450)) for seed in range(400)) if one.best is not None]
    assert 60 <= len(given) <= 340
    held = np.mean([one.snips.low <= TRUTH <= one.snips.high for one in given])
    assert held >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / len(given))


def test_ten_copies_of_each_answer_are_no_more_evidence_where_they_are_one_persons() -> None:
    first = np.arange(200) < 100
    once = two_kinds(candidate=np.where(first, math.log(0.2), math.log(0.6)))
    ten = {name: np.repeat(getattr(once, name), 10) for name in vars(once)}
    of_one, of_many = evaluate(Logged.of(**ten)), evaluate(Logged.of(**{**ten, "cluster": np.arange(2000)}))
    single = evaluate(once)
    width = {name: one.snips.high - one.snips.low for name, one in (("1", single), ("10", of_one), ("n", of_many))}
    assert of_one.overlap.ess == pytest.approx(single.overlap.ess)
    assert width["10"] == pytest.approx(width["1"])
    assert width["n"] < 0.6 * width["1"]


# No number.


def refused(found: Evaluation) -> str:
    assert found.importance is None
    assert found.snips is None
    assert found.doubly_robust is None
    assert found.best is None
    assert found.overlap.lacks is not None
    return found.overlap.lacks


def test_a_candidate_that_says_nothing_of_what_was_said_gets_no_number() -> None:
    found = evaluate(two_kinds(candidate=np.full(200, -math.inf)))
    assert "90% are needed" in refused(found)
    assert found.overlap.mass == 0.0
    assert found.overlap.ess == 0.0
    assert found.logged is not None  # what the logged answers were worth is known all the same


def test_a_candidate_that_says_half_of_it_elsewhere_gets_no_number() -> None:
    assert "90% are needed" in refused(evaluate(two_kinds(candidate=np.full(200, math.log(0.2)))))


def test_few_people_get_no_number_however_often_they_came() -> None:
    candidate = np.where(np.arange(200) < 100, math.log(0.2), math.log(0.6))
    found = evaluate(two_kinds(candidate=candidate, cluster=np.arange(200) % 40))
    assert found.overlap.ess < MIN_ESS
    assert "50 are needed" in refused(found)
    assert "40 people" in refused(found)


def test_one_answer_with_all_the_weight_gets_no_number_and_does_not_overflow() -> None:
    behaviour = np.full(200, math.log(0.4))
    behaviour[7] = -5000.0
    candidate = np.full(200, math.log(0.4) - 4.0)
    candidate[7] = -1.0
    found = evaluate(two_kinds(behaviour=behaviour, candidate=candidate))
    refused(found)
    assert found.overlap.largest > 0.5
    assert math.isfinite(found.overlap.mass)


def test_probabilities_of_something_else_are_told_from_their_mean() -> None:
    said = refused(evaluate(two_kinds(behaviour=np.full(200, math.log(0.1)))))
    assert "where 1 is expected" in said


def test_answers_that_nobody_rated_get_no_number() -> None:
    found = evaluate(two_kinds(reward=np.full(200, np.nan)))
    assert refused(found) == "nobody rated any of the 200 answers"
    assert found.logged is None


def test_no_answers_at_all_get_no_number() -> None:
    found = evaluate(Logged.of([], [], [], []))
    assert "no logged answer" in refused(found)
    assert found.logged is None


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("behaviour", math.nan, "who answered"),
        ("behaviour", -math.inf, "who answered"),
        ("behaviour", 0.5, "who answered"),
        ("candidate", math.nan, "the candidate's"),
        ("candidate", math.inf, "the candidate's"),
        ("reward", math.inf, "from 0 to 1"),
        ("reward", -0.1, "from 0 to 1"),
    ],
)
def test_a_number_that_is_none_leaves_its_call_out_and_is_counted(field: str, value: float, reason: str) -> None:
    clean = two_kinds()
    broken = np.append(getattr(clean, field), value)
    more = {name: np.append(getattr(clean, name), getattr(clean, name)[0]) for name in vars(clean)}
    found = evaluate(Logged.of(**{**more, field: broken}))
    assert found.overlap.calls == 200
    assert found.snips == evaluate(clean).snips
    ((why, count),) = found.left_out.items()
    assert reason in why
    assert count == 1


def test_where_the_model_knows_nothing_of_some_calls_the_rest_still_helps() -> None:
    whole = simulated(3)
    some = np.arange(600) % 3 == 0
    found = evaluate(
        Logged.of(
            whole.reward,
            whole.behaviour,
            whole.candidate,
            whole.cluster,
            np.where(some, np.nan, whole.predicted),
            np.where(some, np.inf, whole.expected),
        )
    )
    assert found.doubly_robust.low < TRUTH < found.doubly_robust.high


def test_arrays_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one number a call"):
        Logged.of([1.0], [0.0, 0.0], [0.0], ["rita"])
