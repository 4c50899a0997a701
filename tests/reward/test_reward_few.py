"""A candidate takes over only where it would also without the few raters who speak most for it."""

import numpy as np
import pytest
from everloop.config import RewardConfig

from reward.features import Example
from reward.model import Label, RewardModel
from reward.release import FEWEST_RATERS, Shadow


def told(kit):
    turns = [one.turns[0] for one in kit.desk_traffic(200)]
    return [(Example(t.call.messages[0].content, t.call.output.content), t.feedback[0].value > 0) for t in turns]


@pytest.fixture
def model(words, kit):
    made = RewardModel(RewardConfig(), words)
    made.learn([Label(f"l{i}", example, float(up)) for i, (example, up) in enumerate(told(kit))])
    return made


@pytest.fixture
def liked(kit):
    """Well-rated answers that the model knows, so that planted ones lose against them."""
    return [example for example, up in told(kit) if up]


def foretold(shadow, liked, rng, raters, count, *, candidate_errs):
    """Labels of some raters of which one version foretells two in three rightly, and the other nearly all."""
    for number in range(count):
        label = float(number % 2)
        good, bad = 0.5 + (label - 0.5) * 0.8, 0.5 + (label - 0.5) * 0.6 * rng.choice([1, 1, -1])
        both = (good, bad) if candidate_errs else (bad, good)
        shadow.add(*both, label, liked[number % len(liked)], raters[number % len(raters)])


def honest_and(liked, rng, raters, count):
    """40 raters whose labels the candidate foretells worse than what scores, and others with whom it is the better."""
    shadow = Shadow(1000)
    foretold(shadow, liked, rng, [f"rater:{i:02}" for i in range(40)], 120, candidate_errs=True)
    foretold(shadow, liked, rng, raters, count, candidate_errs=False)
    return shadow


def test_a_takeover_that_hangs_on_one_rater_waits_and_names_him(model, liked):
    shadow = honest_and(liked, np.random.default_rng(0), ["rater:bot"], 240)
    verdict = shadow.judge(model, model)
    assert not verdict.takes_over
    assert verdict.reason.startswith("waits: without rater:bot the decision would be 'refuse', not 'take over'")
    assert verdict.evidence["auc"] > verdict.evidence["incumbent_auc"]


def test_the_same_labels_of_many_raters_take_over(model, liked):
    shadow = honest_and(liked, np.random.default_rng(0), [f"rater:other{i}" for i in range(60)], 240)
    assert shadow.judge(model, model).takes_over


def test_three_together_are_found_too(model, liked):
    shadow = honest_and(liked, np.random.default_rng(0), ["rater:a", "rater:b", "rater:c"], 240)
    verdict = shadow.judge(model, model)
    assert not verdict.takes_over
    assert all(name in verdict.reason for name in ("rater:a", "rater:b", "rater:c"))


def test_labels_of_nobody_known_each_stand_alone(model, liked):
    assert honest_and(liked, np.random.default_rng(0), [""], 240).judge(model, model).takes_over


def test_few_raters_decide_what_they_decide(model, liked):
    shadow = Shadow(1000)
    raters = [f"rater:{i}" for i in range(FEWEST_RATERS - 1)]
    foretold(shadow, liked, np.random.default_rng(0), raters, 100, candidate_errs=False)
    assert shadow.judge(model, model).takes_over


def test_who_said_it_survives_a_restart(model, liked):
    shadow = honest_and(liked, np.random.default_rng(0), ["rater:bot"], 240)
    again = Shadow(1000, **shadow.dump())
    assert again.judge(model, model) == shadow.judge(model, model)
