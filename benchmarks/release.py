"""Is a release's verdict as reliable as it says? Many simulated releases, each looked at after every episode.

The code under test is the releaser's own: the weighted difference over stages and its sequence, the guards' e-value,
and the number of units that is said before the start. What is simulated is what makes such tests lie: people differ, a
few are very active (Pareto), feedback comes late or never, the base rate drifts, and the share grows from stage to
stage as soon as what was seen allows it. A fixed-horizon z-test on the same releases shows what peeking does to it.

Measured, over all looks of a release: how often an equal adapter is ever called worse, one that is worse by the margin
ever promoted, an equal one blamed by a guard; and how many are decided once both arms have the units that were said.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from everloop.release import CanaryPlan
from numpy.typing import NDArray

from benchmarks import _report
from pipelines.guards import ALPHA, e_value
from pipelines.sequential import FEWEST, POWER, Moments, stratified, units_needed, variance_of, weighted

PLAN = CanaryPlan(share=0.25, stages=(0.01, 0.05, 0.25), margin=0.05, alpha=0.05, min_units=50, stage_units=20)
DELAYS = (0, 200, 2000)  # episodes after which a rating comes
COMES = (0.35, 0.15, 0.10)  # with which probability; else never
DRIFT = 0.1  # of the success rate, up and down
SEASON = 5000.0  # episodes of the last stage in which it does
HARD, HARD_SHARE = 0.5, 0.01  # a few people's calls fail so often, with any adapter
Z95 = 1.645
Bool = NDArray[np.bool_]
Bounds = Callable[[Moments, Moments, CanaryPlan], tuple[Any, Any]]
"""(difference, half width) of two arms, as :func:`pipelines.sequential.stratified`."""


def fixed_horizon(canary: Moments, control: Moments, plan: CanaryPlan) -> tuple[Any, Any]:
    """The z-test of one look, 5% on each side: what a dashboard shows."""
    difference, variance, units = weighted(canary, control)
    return difference, np.where(units > 0, Z95 * np.sqrt(variance), np.inf)


@dataclass(frozen=True)
class World:
    """``loss``: by which the canary's success rate is lower than the control's, for everybody."""

    loss: float
    releases: int
    episodes: int
    people: int
    seed: int = 0
    plan: CanaryPlan = PLAN


class Crowd:
    """The people of every release, in the order in which growing shares take them in; and what they say."""

    def __init__(self, world: World, random: np.random.Generator) -> None:
        shape = (world.releases, world.people)
        self.world, self.random = world, random
        self.rows = np.arange(world.releases)
        self.taste = (0.15 + 0.75 * random.beta(1.3, 0.7, shape)).astype(np.float32)  # mean 0.64, at most 0.9
        self.canary = random.random(shape, dtype=np.float32) < 0.5
        self.hard = random.random(shape, dtype=np.float32) < HARD_SHARE
        self.habit = np.cumsum(random.pareto(1.5, world.people) + 0.1)
        shares = np.array(world.plan.shares)
        self.reached = np.maximum((world.people * shares / shares[-1]).astype(int), 2)
        self.pace = shares[-1] / shares  # time of an episode of a stage, in episodes of the last one
        self.season = random.random(world.releases) * 2 * np.pi
        self.clock = np.zeros(world.releases)

    def episode(self, stage: NDArray[np.int64]) -> tuple[NDArray[np.int64], Bool, Bool]:
        """(who, whether they liked it, whether something went wrong) of the next episode of every release."""
        reached = self.reached[stage]
        who = np.searchsorted(self.habit, self.random.random(len(self.rows)) * self.habit[reached - 1])
        self.clock += self.pace[stage]
        moved = DRIFT * np.sin(self.season + 2 * np.pi * self.clock / SEASON)
        rate = self.taste[self.rows, who] + moved - self.world.loss * self.canary[self.rows, who]
        liked = self.random.random(len(self.rows)) < rate
        wrong = self.hard[self.rows, who] & (self.random.random(len(self.rows)) < HARD)
        return who, liked, wrong


class Ledger:
    """What the releaser would know of every release: units by stage and arm, as sums."""

    def __init__(self, world: World) -> None:
        shape, stages = (world.releases, world.people), len(world.plan.shares)
        self.rows = np.arange(world.releases)
        self.entered = np.full(shape, -1, np.int8)
        self.shown, self.liked = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.hurt = np.zeros(shape, bool)
        self.came = np.zeros((stages, 2, world.releases), np.int64)
        self.sums = np.zeros((stages, 2, 3, world.releases))
        self.hit = np.zeros((2, world.releases), np.int64)

    def came_in(self, who: NDArray[np.int64], side: NDArray[np.int64], stage: NDArray[np.int64], wrong: Bool) -> None:
        new = self.rows[self.entered[self.rows, who] < 0]
        self.entered[new, who[new]] = stage[new]
        self.came[stage[new], side[new], new] += 1
        first = self.rows[wrong & ~self.hurt[self.rows, who]]
        self.hurt[first, who[first]] = True
        self.hit[side[first], first] += 1

    def rated(self, rows: NDArray[np.int64], who: NDArray[np.int64], side: NDArray[np.int64], liked: Bool) -> None:
        """A unit's mean changes, wherever it stands: in the stage that it came in."""
        shown, before = self.shown[rows, who], self.liked[rows, who]
        old = np.divide(before, shown, out=np.zeros(len(rows)), where=shown > 0)
        new = (before + liked) / (shown + 1)
        self.shown[rows, who] += 1
        self.liked[rows, who] += liked
        stage = self.entered[rows, who]
        for at, change in enumerate((shown == 0, new - old, new**2 - old**2)):
            self.sums[stage, side, at, rows] += change

    def moments(self, side: int) -> Moments:
        units, total, squares = (self.sums[:, side, at] for at in range(3))
        return units, total / np.maximum(units, 1), variance_of(units, total, squares)

    def fewest(self) -> NDArray[np.float64]:
        """Rated units in the smaller arm."""
        least: NDArray[np.float64] = self.sums[:, :, 0].sum(axis=0).min(axis=0)
        return least


@dataclass
class Seen:
    """By release, over all looks: whether it was ever called worse, promoted, blamed by a guard.

    ``in_time``: harm or promotion by the time both arms had ``needed`` rated units; ``reached``: they had.
    """

    harm: Bool
    promoted: Bool
    blamed: Bool
    harm_in_time: Bool
    promoted_in_time: Bool
    reached: Bool
    stage: NDArray[np.int64]
    units: NDArray[np.float64]


def simulate(world: World, needed: int = 10**9, bound: Bounds = stratified) -> Seen:
    """Run every release to its last episode, looking after each. A verdict ends none, which only adds to errors."""
    random = np.random.default_rng(world.seed)
    crowd, ledger, plan = Crowd(world, random), Ledger(world), world.plan
    none = np.zeros(world.releases, bool)
    seen = Seen(*(none.copy() for _ in range(6)), np.zeros(world.releases, np.int64), none.astype(float))
    past: list[tuple[NDArray[np.int64], NDArray[np.int64], Bool, NDArray[np.int64]]] = []
    table = _e_values()
    for now in range(world.episodes):
        who, liked, wrong = crowd.episode(seen.stage)
        side = 1 - crowd.canary[crowd.rows, who].astype(np.int64)
        when = np.searchsorted(np.cumsum(COMES), random.random(world.releases))
        ledger.came_in(who, side, seen.stage, wrong)
        past.append((who, side, liked, when))
        for kind, delay in enumerate(DELAYS):
            if now >= delay:
                who, side, liked, when = past[now - delay]
                rows = crowd.rows[when == kind]
                ledger.rated(rows, who[rows], side[rows], liked[rows])
        _look(ledger, seen, plan, needed, bound, table)
    return seen


def _look(ledger: Ledger, seen: Seen, plan: CanaryPlan, needed: int, bound: Bounds, table: NDArray[np.float64]) -> None:
    with np.errstate(invalid="ignore"):
        difference, width = bound(ledger.moments(0), ledger.moments(1), plan)
        last = seen.stage == len(plan.shares) - 1
        seen.units = ledger.fewest()
        seen.harm |= (seen.units >= FEWEST) & (difference + width < 0)
        seen.promoted |= last & (seen.units >= max(FEWEST, plan.min_units)) & (difference - width > -plan.margin)
    seen.blamed |= table[tuple(np.minimum(ledger.hit, len(table) - 1))] >= 1 / ALPHA
    before = ~seen.reached
    seen.harm_in_time |= before & seen.harm
    seen.promoted_in_time |= before & seen.promoted
    seen.reached |= seen.units >= needed
    rows = ledger.rows
    grows = ~seen.harm & ~last & (ledger.came[seen.stage, :, rows].min(axis=1) >= plan.stage_units)
    seen.stage = seen.stage + grows


def _e_values(most: int = 400) -> NDArray[np.float64]:
    """By affected units of the canary and the control."""
    return np.array([[e_value(a, b) if a > b else 0.0 for b in range(most)] for a in range(most)])


def lately(world: World, episodes: int = 4000) -> float:
    """The variance of unit means in traffic before the release, as the releaser would find it in the log."""
    before = World(0.0, 50, episodes, world.people, world.seed + 1, CanaryPlan(share=0.5))
    random = np.random.default_rng(before.seed)
    crowd, ledger = Crowd(before, random), Ledger(before)
    stage = np.zeros(before.releases, np.int64)
    for _ in range(episodes):
        who, liked, wrong = crowd.episode(stage)
        side = np.zeros(before.releases, np.int64)
        ledger.came_in(who, side, stage, wrong)
        rows = crowd.rows[random.random(before.releases) < COMES[0]]
        ledger.rated(rows, who[rows], side[rows], liked[rows])
    return float(ledger.moments(0)[2].mean())


def measure(releases: int, episodes: int, people: int) -> tuple[list[dict[str, Any]], list[_report.Aim]]:
    """The table and the aims."""
    margin = PLAN.margin
    variance = lately(World(0.0, releases, episodes, people))
    enough = units_needed(PLAN, variance=variance)
    drop = 2 * margin
    to_find = units_needed(PLAN, difference=drop - margin, variance=variance)
    equal = simulate(World(0.0, releases, episodes, people, 1), enough)
    worse = simulate(World(margin, releases, episodes, people, 2))
    bad = simulate(World(drop, releases, episodes // 3, people, 3), to_find)
    naive = simulate(World(0.0, releases, episodes // 3, people, 1), bound=fixed_horizon)
    rows = [
        _row("equal: ever called worse", equal.harm, PLAN.alpha, equal),
        _row("equal: ever blamed by a guard of calls", equal.blamed, ALPHA, equal),
        _row("worse by the margin: ever promoted", worse.promoted, PLAN.alpha, worse),
        _row(f"equal: promoted by {enough:,} units an arm", equal.promoted_in_time, POWER, equal),
        _row(f"worse by {100 * drop:g} points: called worse by {to_find:,}", bad.harm_in_time, POWER, bad),
        _row("equal, by a z-test at each look: ever called worse", naive.harm, None, naive),
    ]
    aims = [
        _report.aim("share of equal adapters ever called worse", PLAN.alpha, float(equal.harm.mean()), most=True),
        _report.aim("share of equal adapters ever blamed by a guard", ALPHA, float(equal.blamed.mean()), most=True),
        _report.aim("share promoted of those worse by the margin", PLAN.alpha, float(worse.promoted.mean()), most=True),
        _report.aim("power: equal ones promoted in time", POWER, float(equal.promoted_in_time.mean())),
        _report.aim("power: bad ones found in time", POWER, float(bad.harm_in_time.mean())),
    ]
    return rows, aims


def _row(what: str, happened: Bool, stated: float | None, seen: Seen) -> dict[str, Any]:
    return {
        "releases": what,
        "simulated": len(happened),
        "share": round(float(happened.mean()), 4),
        "stated": stated,
        "in the last stage at the end": round(float((seen.stage == len(PLAN.shares) - 1).mean()), 3),
        "rated units an arm": int(np.median(seen.units)),
    }


def main() -> int:
    options = _report.parser("error rates and power of the canary's verdicts, by simulation").parse_args()
    began, load = time.monotonic(), _report.load()
    size = (200, 20_000, 30_000) if options.quick else (1000, 20_000, 30_000)
    rows, aims = measure(*size)
    notes = [
        f"{size[1]:,} episodes of both arms a release, each looked at; {size[2]:,} people, the most active one in a "
        "hundred makes a quarter of the episodes; 40% are never rated, 25% late",
        f"took {time.monotonic() - began:.0f} s; {_report.loads(load)}",
    ]
    _report.publish("release", rows, aims, quick=options.quick, notes=notes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
