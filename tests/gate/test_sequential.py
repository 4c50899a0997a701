"""The canary's test: its error rates under continuous peeking, by simulation, and its verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from everloop.release import CanaryPlan
from numpy.typing import NDArray

from pipelines.sequential import (
    FEWEST,
    arm,
    bounds,
    half_width,
    judge,
    stage_lacks,
    stratified,
    units_needed,
    variance_of,
)

PLAN = CanaryPlan(margin=0.05, alpha=0.05, min_units=50)
RELEASES = 1000


class Traffic:
    """Many simulated releases at once: people of different taste who come back, half of them in each arm."""

    def __init__(self, seed: int, releases: int, people: int, loss: float) -> None:
        self.random = np.random.default_rng(seed)
        self.releases, self.people = releases, people
        taste = self.random.beta(1.3, 0.7, (releases, people))  # mean 0.65, from hardly ever to always content
        self.canary = np.arange(people) % 2 == 0
        self.rate = np.clip(taste - loss * self.canary, 0, 1)
        habit = self.random.pareto(1.5, people) + 0.1
        self.habit = np.cumsum(habit / habit.sum())
        self.shown = np.zeros((releases, people))
        self.liked = np.zeros((releases, people))
        self.sums = np.zeros((2, 3, releases))  # by arm: units, sum and sum of squares of unit means

    def episode(self) -> None:
        every = np.arange(self.releases)
        who = np.minimum(np.searchsorted(self.habit, self.random.random(self.releases)), self.people - 1)
        thumb = self.random.random(self.releases) < self.rate[every, who]
        shown, liked = self.shown[every, who], self.liked[every, who]
        before = np.divide(liked, shown, out=np.zeros_like(liked), where=shown > 0)
        after = (liked + thumb) / (shown + 1)
        self.shown[every, who] += 1
        self.liked[every, who] += thumb
        change = np.stack([shown == 0, after - before, after**2 - before**2])
        in_canary = self.canary[who]
        self.sums[0] += change * in_canary
        self.sums[1] += change * ~in_canary

    def bounds(self, plan: CanaryPlan) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(lower bound, upper bound, fewest units) of every release now."""
        counts = np.maximum(self.sums[:, 0], 1)
        variances = variance_of(self.sums[:, 0], self.sums[:, 1], self.sums[:, 2])
        means = self.sums[:, 1] / counts
        arms = [(self.sums[side, 0][None], means[side][None], variances[side][None]) for side in (0, 1)]
        difference, width = stratified(arms[0], arms[1], plan)
        return difference - width, difference + width, self.sums[:, 0].min(axis=0)


def peek(loss: float, *, episodes: int, people: int = 500, plan: CanaryPlan = PLAN) -> tuple[float, float]:
    """Shares of releases with a verdict (harm first, promote first) when looked at after every episode."""
    traffic = Traffic(7, RELEASES, people, loss)
    harm = np.zeros(RELEASES, dtype=bool)
    good = np.zeros(RELEASES, dtype=bool)
    for _ in range(episodes):
        traffic.episode()
        low, high, fewest = traffic.bounds(plan)
        harm |= ~good & (fewest >= FEWEST) & (high < 0)
        good |= ~harm & (fewest >= plan.min_units) & (low > -plan.margin)
    return float(harm.mean()), float(good.mean())


def noise(alpha: float) -> float:
    return 3 * math.sqrt(alpha * (1 - alpha) / RELEASES)


@pytest.mark.parametrize("people", [300, 5000])  # most come back, most are new
def test_an_equal_adapter_is_seldom_called_harmful_however_often_one_looks(people: int) -> None:
    harm, _ = peek(0.0, episodes=3000, people=people)
    assert harm <= PLAN.alpha + noise(PLAN.alpha)


def test_an_adapter_worse_by_the_margin_is_seldom_promoted_however_often_one_looks() -> None:
    _, good = peek(PLAN.margin, episodes=3000, people=2000)
    assert good <= PLAN.alpha + noise(PLAN.alpha)


def test_real_harm_is_found() -> None:
    harm, good = peek(0.25, episodes=3000)
    assert harm > 0.95
    assert good == 0


def test_an_equal_adapter_is_promoted_when_the_margin_is_wide() -> None:
    _, good = peek(0.0, episodes=3000, plan=PLAN.model_copy(update={"margin": 0.2}))
    assert good > 0.9


def test_the_bound_is_the_paper_s() -> None:
    # By hand: t=100, s2=0.25, alpha=0.05, r2=0.01: grown = 2; sqrt(.25*2*2/(1e4*.01)*log1p(sqrt(2)/.1)).
    assert float(half_width(100, 0.25, 0.05, 0.01)) == pytest.approx(
        math.sqrt(0.25 * 4 / 100 * math.log1p(math.sqrt(2) / 0.1))
    )


def test_a_few_equal_thumbs_are_no_certainty() -> None:
    happy = arm([1.0] * 5)
    assert happy.variance > 0
    difference, low, high = bounds([(happy, arm([1.0] * 5))], PLAN)
    assert (difference, low, high) == (0.0, -1.0, 1.0)


@pytest.mark.parametrize(
    ("canary", "control", "seconds", "episodes", "action"),
    [
        ([1, 0] * 1000, [1, 0] * 1000, 0, 4000, "promote"),
        ([0, 0, 0, 1] * 500, [1, 0] * 1000, 0, 4000, "harm"),
        ([0] * 19, [1] * 19, 0, 38, "continue"),  # too few for any verdict
        ([1, 0] * 50, [1, 0] * 50, 0, 200, "continue"),
        ([1, 0] * 50, [1, 0] * 50, PLAN.max_seconds, 200, "inconclusive"),
        ([1, 0] * 50, [1, 0] * 50, 0, PLAN.max_episodes, "inconclusive"),
        ([], [], PLAN.max_seconds, 0, "inconclusive"),
    ],
)
def test_verdicts(canary: list[int], control: list[int], seconds: float, episodes: int, action: str) -> None:
    verdict = judge([(arm(canary), arm(control))], PLAN, seconds=seconds, episodes=episodes)
    assert verdict.action == action
    assert verdict.reason


def test_how_many_are_needed_is_said_before_the_start() -> None:
    typical = units_needed(PLAN, variance=0.25, power=0.5)  # half of them are decided with no luck either way
    for extra, action in ((-25, "continue"), (25, "promote")):
        values = [0, 1] * (typical // 2 + extra)
        assert judge([(arm(values), arm(values))], PLAN, seconds=0, episodes=1).action == action
    assert units_needed(PLAN, variance=0.25) > typical
    assert units_needed(PLAN, difference=0.1) < typical
    assert units_needed(PLAN, variance=1e-6) == PLAN.min_units
    with pytest.raises(ValueError, match="never shown"):
        units_needed(PLAN, difference=-0.05)


def test_a_base_rate_that_moves_from_stage_to_stage_moves_no_verdict() -> None:
    """By chance the control has most of the good first stage: a plain mean would call the canary worse."""
    stages = [(arm([1] * 90 + [0] * 10), arm([1] * 270 + [0] * 30)), (arm([1, 0, 0, 0] * 75), arm([1, 0, 0, 0] * 25))]
    difference, low, high = bounds(stages, PLAN)
    assert difference == pytest.approx(0.0)
    assert low == pytest.approx(-high)
    assert bounds([*stages, (arm([1.0] * 9), arm([]))], PLAN) == (difference, low, high)  # nothing to compare with


def test_only_the_last_stage_promotes_and_any_ends() -> None:
    equal, worse = [(arm([1, 0] * 1500), arm([1, 0] * 1500))], [(arm([0, 0, 0, 1] * 500), arm([1, 0] * 1000))]
    assert judge(equal, PLAN, seconds=0, episodes=1).action == "promote"
    assert judge(equal, PLAN, seconds=0, episodes=1, last=False).action == "continue"
    assert judge(worse, PLAN, seconds=0, episodes=1, last=False).action == "harm"


def test_what_a_stage_needs_before_the_share_grows() -> None:
    assert "19 of 20 people" in str(stage_lacks(PLAN, 19, 400, 9e9))
    assert "in 60 s" in str(stage_lacks(PLAN, 20, 20, PLAN.stage_seconds - 60))
    assert stage_lacks(PLAN, 20, 20, PLAN.stage_seconds) is None


def test_an_adapter_that_hardly_answered_is_not_promoted_for_being_like_what_is_live() -> None:
    equal = [(arm([1, 0] * 1500), arm([1, 0] * 1500))]
    held = judge(equal, PLAN, seconds=0, episodes=1, reached=0.3)
    assert held.action == "continue"
    assert "30% of the canary's answers" in held.reason
    assert judge(equal, PLAN, seconds=PLAN.max_seconds, episodes=1, reached=0.3).action == "inconclusive"
    assert judge(equal, PLAN, seconds=0, episodes=1, reached=0.8).action == "promote"
