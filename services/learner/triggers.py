"""When a policy is trained: pure functions from facts, settings and the time to a reason, or to what is missing.

In this order: an order of a person starts a run at once; a policy that is paused, or whose last adapter is still on
trial, waits; then N new scored episodes, the cadence, a fall of the mean reward, or a fall of the thumbs do. A run
waits for the trial to end because it starts from what is live: training beside a canary would start from an adapter
that is about to be replaced, and its candidate would have to beat the one that was promoted meanwhile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from everloop.config import TrainConfig
from everloop.release import ReleaseState

from services.learner.facts import Facts, mean

TRIAL = 900.0
"""Seconds that a run waits for the gate to take up or decide on the last adapter. A canary is waited out."""


class Due(NamedTuple):
    """A run should start. ``order``: the command that asks for it; None: a trigger."""

    reason: str
    order: dict[str, Any] | None = None


class Waiting(NamedTuple):
    """No run yet: one sentence for people, and the numbers in it."""

    sentence: str
    numbers: dict[str, float]


def decide(facts: Facts, train: TrainConfig, now: float) -> Due | Waiting:
    """Whether a run starts now, and why, or what it waits for."""
    if facts.orders and not facts.paused:
        return Due(f"ordered by {facts.orders[0].get('by') or 'a person'}", facts.orders[0])
    numbers = {"scored": float(facts.scored), "min_scored": float(train.min_scored)}
    if facts.paused:
        why = f" by {facts.paused_why}" if facts.paused_why else ""
        return Waiting(f"paused{why}: 'everloop resume' lets the next run start", numbers)
    if (trial := _trial(facts, now)) is not None:
        return Waiting(trial, numbers)
    reason = _new_episodes(facts, train) or _cadence(facts, train, now) or _worse(facts, train)
    if reason is not None:
        return Due(reason)
    return Waiting(_missing(facts, train, now), numbers)


def _trial(facts: Facts, now: float) -> str | None:
    """What is being decided about the last adapter."""
    if facts.deciding is None:
        return None
    adapter, state = facts.deciding["adapter"][:12], facts.deciding["state"]
    if state == ReleaseState.CANARY:
        return f"the canary of adapter {adapter} to end, so that the run starts from what is live"
    if now - facts.deciding["time"] < TRIAL:
        return f"a verdict on adapter {adapter} ({state})"
    return None


def _new_episodes(facts: Facts, train: TrainConfig) -> str | None:
    if facts.scored < train.min_scored:
        return None
    return f"{facts.scored} new scored episodes (min_scored {train.min_scored})"


def _cadence(facts: Facts, train: TrainConfig, now: float) -> str | None:
    if train.every_seconds is None or facts.scored == 0:
        return None
    if facts.run_started is not None and now - facts.run_started < train.every_seconds:
        return None
    return f"every {train.every}, with {facts.scored} new scored episodes"


def _worse(facts: Facts, train: TrainConfig) -> str | None:
    """A fall since the last run's start: of the mean reward, or of the share of good labels."""
    for words, before, values, most in (
        ("mean reward", facts.reward_before, facts.rewards, train.reward_drift),
        ("share of good ratings", facts.labels_before, facts.labels, train.thumbs_drop),
    ):
        after = mean(values)
        if most is not None and before is not None and after is not None and before - after > most:
            return f"the {words} fell from {before:.2f} to {after:.2f} (more than {most:g})"
    return None


def _missing(facts: Facts, train: TrainConfig, now: float) -> str:
    wait = f"{train.min_scored - facts.scored} more scored episodes ({facts.scored} of {train.min_scored} are there)"
    if train.every_seconds is not None and facts.run_started is not None:
        left = max(0.0, train.every_seconds - (now - facts.run_started))
        return f"{wait}, or {left:.0f} s (every {train.every}) with at least one"
    return wait
