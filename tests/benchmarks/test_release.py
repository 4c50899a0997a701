"""A small version of the simulated releases: errors as stated, power as said, and teeth where the method is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.release import PLAN, World, fixed_horizon, lately, simulate
from pipelines.sequential import POWER, stratified, units_needed

RELEASES, PEOPLE = 200, 4000
WIDE = PLAN.model_copy(update={"margin": 0.2})


def noise(share: float) -> float:
    return 3 * math.sqrt(share * (1 - share) / RELEASES)


def test_an_equal_adapter_is_seldom_called_worse_though_the_share_grows_and_everybody_looks() -> None:
    seen = simulate(World(0.0, RELEASES, 1500, PEOPLE))
    assert (seen.stage == 2).mean() > 0.95  # it went through all stages
    assert seen.harm.mean() <= PLAN.alpha + noise(PLAN.alpha)
    assert seen.blamed.mean() <= 0.02


def test_a_test_for_one_look_would_fail_here() -> None:
    seen = simulate(World(0.0, RELEASES, 1500, PEOPLE), bound=fixed_horizon)
    assert seen.harm.mean() > PLAN.alpha + 2 * noise(PLAN.alpha)


def test_what_is_worse_by_the_margin_is_seldom_promoted() -> None:
    world = World(0.2, RELEASES, 1500, PEOPLE, plan=WIDE)
    assert simulate(world).promoted.mean() <= WIDE.alpha + noise(WIDE.alpha)


def test_the_units_that_are_said_decide_as_often_as_is_said() -> None:
    world = World(0.0, RELEASES, 1800, PEOPLE, plan=WIDE)
    needed = units_needed(WIDE, variance=lately(world, 1000))
    seen = simulate(world, needed)
    assert seen.reached.mean() > 0.9
    assert seen.promoted_in_time.mean() >= POWER - noise(POWER)


@pytest.mark.parametrize("bound", [stratified, fixed_horizon])
def test_a_rate_that_moves_from_stage_to_stage_moves_no_difference(bound) -> None:
    units = np.array([[100.0], [50.0]]), np.array([[300.0], [150.0]])
    mean, variance = np.array([[0.9], [0.3]]), np.full((2, 1), 0.2)
    difference, _ = bound((units[0], mean, variance), (units[1], mean, variance), PLAN)
    assert difference == pytest.approx(0.0)
