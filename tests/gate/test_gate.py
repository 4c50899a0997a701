"""The gate: which candidates pass, which fail and why, and that luck is not taken for skill."""

from __future__ import annotations

from typing import Any

import hypothesis
import numpy as np
import pytest
from everloop.config import GateConfig
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from pipelines.gate import (
    BEHAVIOURS,
    POOL,
    Answers,
    Evidence,
    Given,
    closed_set,
    decide,
    gain_bounds,
    judge_answers,
    pools,
    rise_by_chance,
)

CONFIG = GateConfig()
TOPICS, EACH = 77, 20


def answers(right: ArrayLike, *, length: float = 5.0, kl: float = 0.3, **flags: ArrayLike) -> Answers:
    array = np.asarray(right, dtype=float)
    made = {name: np.broadcast_to(np.asarray(flags.get(name, 0.0), dtype=float), array.shape) for name in BEHAVIOURS}
    return Answers(array, np.full(array.shape, length), np.full(array.shape, kl), made)


def desk(seed: int = 0, share: float = 0.4) -> tuple[tuple[str, ...], np.ndarray[Any, Any]]:
    """77 topics of 20 items; some topics are mastered and some not at all, as after a first training."""
    random = np.random.default_rng(seed)
    skills = tuple(f"topic {i}" for i in range(TOPICS) for _ in range(EACH))
    mastery = np.repeat(random.beta(0.8, 0.8 * (1 - share) / share, TOPICS), EACH)
    return skills, (random.random(TOPICS * EACH) < mastery).astype(float)


def verdict(before: ArrayLike, after: ArrayLike, skills: tuple[str, ...] | None = None, **options: Any) -> Any:
    named = ("",) * np.size(before) if skills is None else skills
    return decide(Evidence(named, answers(before), answers(after, **options)), CONFIG)


def test_a_better_candidate_passes_and_says_why_in_one_sentence() -> None:
    skills, before = desk()
    after = np.where(np.random.default_rng(1).random(before.size) < 0.15, 1.0, before)
    decision = verdict(before, after, skills)
    assert decision.verdict == "pass"
    assert decision.reason.startswith("Passed: gold +")
    assert decision.reason.count(".") - sum(c.isdigit() for c in decision.reason) <= 1
    gold = decision.numbers()["gold"]
    assert gold["low"] <= gold["gain"] <= gold["high"]
    assert gold["items"] == TOPICS * EACH


def test_a_worse_candidate_fails_on_gold() -> None:
    skills, before = desk()
    after = np.where(np.random.default_rng(1).random(before.size) < 0.05, 0.0, before)
    decision = verdict(before, after, skills)
    assert decision.verdict == "fail"
    assert "lower bound" in decision.reason


def test_who_answers_the_same_or_as_well_is_no_gain() -> None:
    before = np.array([0.0, 1.0] * 300)
    swapped = np.concatenate(([1.0, 0.0], before[2:]))
    for after in (before, swapped):
        decision = verdict(before, after)
        assert (decision.verdict, decision.reason) == ("fail", "Rejected: gold +0.0 points over 600 items: no gain.")
    slightly_worse = np.concatenate(([0.0, 0.0], before[2:]))
    assert "gold -0.2 points over 600 items: no gain" in verdict(before, slightly_worse).reason


def test_a_small_gain_is_enough_where_the_lower_bound_allows_it() -> None:
    """Above 0 on the mean, and a loss of more than a point is ruled out; more certainty can be asked for."""
    before = np.array([0.0, 1.0] * 300)
    better = Evidence(("",) * 600, answers(before), answers(np.concatenate(([1.0, 1.0], before[2:]))))
    assert decide(better, CONFIG).verdict == "pass"
    assert "below the +0.5 that are needed" in decide(better, GateConfig(min_gain=0.005)).reason
    by_luck = np.concatenate((np.tile([1.0, 1.0, 0.0, 0.0], 75), before[300:]))
    by_luck[:3] = 1.0
    decision = verdict(before, by_luck)
    assert decision.numbers()["gold"]["gain"] > 0
    assert "below the -1.0 that are needed" in decision.reason


def test_few_items_do_not_show_that_there_is_no_gain() -> None:
    assert verdict(np.ones(20), np.ones(20)).verdict == "wait"


def test_a_kl_that_is_not_known_is_for_a_person_to_judge() -> None:
    before = np.array([0.0, 1.0] * 300)
    decision = verdict(before, np.ones(600), kl=float("nan"))
    assert decision.verdict == "wait"
    assert decision.reason.startswith("KL to the base not known, gold +50.0 points")
    assert decision.numbers()["kl"]["passed"] is None
    assert verdict(before, before, kl=float("nan")).verdict == "fail"


def test_old_skills_must_stay_even_where_the_whole_gains() -> None:
    skills, before = desk()
    known = np.repeat(before.reshape(TOPICS, EACH).mean(axis=1) >= 0.4, EACH)
    random = np.random.default_rng(2).random(before.size)
    after = np.where(known, np.where(random < 0.08, 0.0, before), np.where(random < 0.3, 1.0, before))
    decision = verdict(before, after, skills)
    assert decision.numbers()["gold"]["passed"]
    assert decision.verdict == "fail"
    assert "old skills" in decision.reason


def test_luck_on_the_gold_set_is_not_taken_for_an_old_skill() -> None:
    """Two equally good models that err apart: on the items where the first was lucky, the second is not."""
    losses = []
    for seed in range(30):
        random = np.random.default_rng(seed)
        rate = np.repeat(random.uniform(0.2, 0.8, TOPICS), EACH)
        first, second = (random.random((2, rate.size)) < rate).astype(float)
        skills = tuple(f"topic {i}" for i in range(TOPICS) for _ in range(EACH))
        evidence = Evidence(skills, answers(first), answers(second))
        losses += [float((second - first)[members].mean()) for members in pools(evidence)]
    assert abs(np.mean(losses)) < 0.01


def test_pools_hold_400_items_where_there_are_as_many() -> None:
    skills, before = desk(share=0.6)
    evidence = Evidence(skills, answers(before), answers(before))
    made = pools(evidence)
    assert len(made) >= 2
    assert min(members.size for members in made) >= POOL
    assert len(np.unique(np.concatenate(made))) == sum(members.size for members in made)


def test_a_small_pool_says_that_a_larger_loss_could_go_unseen() -> None:
    before = np.ones(120)
    after = before.copy()
    after[[10, 30, 50, 70]] = 0.0
    skills = tuple(f"topic {i % 20}" for i in range(120))
    check = {check.name: check for check in verdict(before, after, skills).checks}["skills"]
    assert check.passed
    assert check.numbers["worst"] == pytest.approx(-4 / 120)
    assert check.numbers["worst"] < check.numbers["limit"] <= check.numbers["bound"]
    assert "only 120 items, so by their upper bound" in check.says
    skills, before = desk(share=0.6)
    large = {check.name: check for check in verdict(before, before, skills).checks}["skills"]
    assert "upper bound" not in large.says


def test_a_topic_that_breaks_is_named() -> None:
    skills, before = desk()
    topic = int(before.reshape(TOPICS, EACH).mean(axis=1).argmax())
    after = np.where(np.random.default_rng(3).random(before.size) < 0.2, 1.0, before)
    after[topic * EACH : (topic + 1) * EACH] = 0.0
    decision = verdict(before, after, skills)
    assert decision.verdict == "fail"
    assert f"slice 'topic {topic}' loses" in decision.reason


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kl": 2.5}, "nats a token"),
        ({"kl": float("inf")}, "nats a token"),
        ({"length": 12.0}, "tokens"),
        ({"length": 2.0}, "tokens"),
        ({"empty": [1.0] * 20 + [0.0] * 580}, "empty answers rose"),
        ({"refusal": [1.0] * 60 + [0.0] * 540}, "refusal answers rose"),
        ({"off_format": [1.0] * 60 + [0.0] * 540}, "off-format answers rose"),
        ({"cut_off": [1.0] * 60 + [0.0] * 540}, "cut-off answers rose"),
        ({"asking_back": [1.0] * 60 + [0.0] * 540}, "asking-back answers rose"),
        ({"broken_call": [1.0] * 60 + [0.0] * 540}, "broken-call answers rose"),
    ],
)
def test_behaviour_is_held(options: dict[str, Any], told: str) -> None:
    before = np.array([0.0, 1.0] * 300)
    decision = verdict(before, np.ones(600), **options)
    assert decision.verdict == "fail"
    assert told in decision.reason


def test_a_few_answers_that_differ_are_chance() -> None:
    """Four of fifty, and nothing the other way: with six behaviours and a length to look at, luck does that."""
    before = np.array([0.0, 1.0] * 25)
    assert verdict(before, np.ones(50), cut_off=[1.0] * 4 + [0.0] * 46).verdict == "pass"
    assert verdict(before, np.ones(50), cut_off=[1.0] * 8 + [0.0] * 42).verdict == "fail"


def test_a_mean_length_that_one_answer_makes_is_chance() -> None:
    before, after = answers([0.0, 1.0] * 30), answers(np.ones(60))
    rambling = Answers(after.right, np.array([400.0] + [5.0] * 59), after.kl, after.flags)
    assert decide(Evidence(("",) * 60, before, rambling), CONFIG).verdict == "pass"
    longer = Answers(after.right, np.random.default_rng(0).normal(11, 3, 60), after.kl, after.flags)
    assert "answers went from 5.0 to" in decide(Evidence(("",) * 60, before, longer), CONFIG).reason


def test_a_rise_is_mcnemar_s_exact_test() -> None:
    before, after = np.zeros(100), np.zeros(100)
    before[:2], after[2:10] = 1, 1  # eight more, two fewer
    assert rise_by_chance(before, after) == pytest.approx((45 + 10 + 1) / 2**10)  # 8, 9 or 10 heads of 10
    assert rise_by_chance(after, before) > 0.9
    assert rise_by_chance(before, before) == 1.0


def test_a_harmless_candidate_is_seldom_stopped_by_slices_or_behaviour() -> None:
    """Two equal models that err apart, on small slices and with behaviours now and then: luck alone."""
    stopped = 0
    for seed in range(300):
        random = np.random.default_rng(seed)
        skills = tuple(f"topic {i % 20}" for i in range(60))
        first, second = (random.random((2, 60)) < 0.6).astype(float)
        flags = [{name: (random.random(60) < 0.1).astype(float) for name in BEHAVIOURS} for _ in range(2)]
        evidence = Evidence(skills, answers(first, **flags[0]), answers(second, **flags[1]))
        numbers = decide(evidence, CONFIG).numbers()
        stopped += not (numbers["slices"]["passed"] and numbers["behaviour"]["passed"])
    assert stopped / 300 <= 2 * (1 - CONFIG.confidence)


def test_one_empty_answer_in_many_is_no_change_of_behaviour() -> None:
    before = np.array([0.0, 1.0] * 300)
    assert verdict(before, np.ones(600), empty=[1.0] + [0.0] * 599).verdict == "pass"


@pytest.mark.parametrize("items", [0, 1, 2, 49])
def test_too_few_items_wait_for_a_person(items: int) -> None:
    decision = verdict(np.zeros(items), np.ones(items))
    assert decision.verdict == "wait"
    assert "50 are needed" in decision.reason


def test_refused_files_are_not_asked_anything() -> None:
    decision = decide(Evidence(("",), answers([0.0]), answers([1.0]), files="weights are not finite"), CONFIG)
    assert decision.verdict == "fail"
    assert "weights are not finite" in decision.reason


def test_the_same_evidence_gives_the_same_decision() -> None:
    skills, before = desk()
    after = np.where(np.random.default_rng(1).random(before.size) < 0.15, 1.0, before)
    assert verdict(before, after, skills) == verdict(before, after, skills)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=2, max_size=200))
@hypothesis.example([-1.0, 0.5, -1.0, -1.0])
def test_the_quick_bootstrap_is_the_bootstrap(values: list[float]) -> None:
    array = np.array(values)
    _, low, high = gain_bounds(array, 0.95)
    drawn = np.random.default_rng(1).choice(array, (4000, array.size)).mean(axis=1)
    near = 0.3 * drawn.std() + np.ptp(array) / array.size  # one drawn value more or less: a quantile may lie at a jump
    assert low == pytest.approx(np.quantile(drawn, 0.05), abs=near + 1e-6)
    assert high == pytest.approx(np.quantile(drawn, 0.95), abs=near + 1e-6)


def test_answers_are_judged_beside_the_right_ones() -> None:
    rights = ["card", "card", "loan", "loan"]
    judged = judge_answers(
        rights,
        [
            Given(" card\n", 2, True, 0.1),
            Given("", 1, True, 0.2),
            Given("I'm sorry, I can't help with that.", 9, True, None),
            Given("loan loan loan", 16, False, 0.4),
        ],
    )
    assert judged.right.tolist() == [1, 0, 0, 0]
    assert judged.flags["empty"].tolist() == [0, 1, 0, 0]
    assert judged.flags["refusal"].tolist() == [0, 0, 1, 0]
    assert judged.flags["cut_off"].tolist() == [0, 0, 0, 1]
    assert judged.flags["off_format"].tolist() == [0, 1, 1, 1]
    assert np.isnan(judged.kl[2])


def test_free_answers_have_no_set_to_choose_from_but_may_have_a_form() -> None:
    assert closed_set(["a", "b", "c"]) == frozenset()
    judged = judge_answers(
        ['{"to": "a"}', '{"to": "b"}', "words"], [Given('{"to": "x"}', 3, True)] * 2 + [Given("y", 1, True)]
    )
    assert judged.flags["off_format"].tolist() == [0, 0, 0]
    assert judge_answers(['{"to": "a"}'], [Given("plain", 1, True)]).flags["off_format"].tolist() == [1]
