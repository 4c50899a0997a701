"""Releases as state and steps, without a log or an engine."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from everloop.errors import TransitionRefused
from everloop.event import BASE
from everloop.release import Adapter, CanaryPlan, Release, ReleaseState
from everloop.run import Command, CommandKind
from hypothesis import given
from hypothesis import strategies as st

from services.releaser import orders
from services.releaser.state import (
    Change,
    PolicyState,
    candidate,
    gated,
    last_decision,
    next_stage,
    promote,
    rejected,
    roll_back,
    start_canary,
    veto,
)

S = ReleaseState
PLAN = CanaryPlan(share=0.25)


def adapter(name: str) -> Adapter:
    return Adapter(
        hash=name, tenant="t", policy="p", base="tiny-k2", run=f"run-{name}", batch="b", uri=f"models:/t.p/{name}",
        rank=4, targets=("q",), time=1.0,
    )  # fmt: skip


def command(kind: CommandKind, **arguments: Any) -> Command:
    return Command(id=f"cmd-{kind}", kind=kind, tenant="t", policy="p", arguments=arguments, by="ann", time=5.0)


class Policy:
    """A state with steps applied as the releaser does, and every change kept."""

    def __init__(self) -> None:
        self.state = PolicyState("t", "p")
        self.changes: list[Change] = []

    def does(self, change: Change) -> Change:
        self.changes.append(change)
        self.state.apply(change)
        return change

    def candidate(self, name: str) -> Release:
        return self.does(candidate(self.state, adapter(name), 1.0)).releases[0]

    def canary(self, name: str) -> Release:
        release = self.does(gated(self.candidate(name), "Passed.", 2.0, {})).releases[0]
        return self.does(start_canary(self.state, release, PLAN, 3.0)).releases[0]

    def live(self, name: str) -> Release:
        return self.does(promote(self.state, self.canary(name), "Promoted.", 4.0, {})).releases[-1]

    def rebuilt(self) -> PolicyState:
        state = PolicyState("t", "p")
        for change in self.changes:
            for release in change.releases:
                state.take(release)
            if change.route is not None:
                state.take_route(change.route)
        return state


def test_the_whole_life_of_two_releases() -> None:
    policy = Policy()
    first = policy.live("a")
    assert policy.state.live_adapter == "a"
    assert first.incumbent == BASE
    policy.canary("b")
    route = policy.state.route
    assert route is not None
    assert (route.live, route.canary, route.share, route.epoch) == ("a", "b", 0.25, 3)
    assert set(route.uris) == {"a", "b"}
    policy.does(promote(policy.state, policy.state.canary, "Better.", 5.0, {}))  # type: ignore[arg-type]
    route = policy.state.route
    assert route is not None
    assert (route.live, route.canary, route.release, route.epoch) == ("b", None, None, 4)
    assert set(route.uris) == {"a", "b"}  # the way back stays resident
    assert policy.state.releases[first.id].state is S.RETIRED


def test_rolling_back_what_is_live_leads_to_the_one_before_and_then_to_the_base() -> None:
    policy = Policy()
    policy.live("a")
    policy.live("b")
    change = policy.does(orders.rolled_back(policy.state, command(CommandKind.ROLLBACK), 6.0))
    assert policy.state.live_adapter == "a"
    assert change.route is not None
    assert change.route.live == "a"
    assert policy.state.among(S.ROLLED_BACK)[0].adapter == "b"
    change = policy.does(orders.rolled_back(policy.state, command(CommandKind.ROLLBACK), 7.0))
    assert policy.state.live_adapter == BASE
    assert change.route is not None
    assert change.route.live == BASE
    with pytest.raises(TransitionRefused, match="base model"):
        orders.rolled_back(policy.state, command(CommandKind.ROLLBACK), 8.0)


def test_a_rollback_ends_the_canary_first_and_what_is_live_if_asked() -> None:
    policy = Policy()
    policy.live("a")
    policy.canary("b")
    assert orders.to_roll_back(policy.state, command(CommandKind.ROLLBACK)).adapter == "b"
    policy.does(orders.rolled_back(policy.state, command(CommandKind.ROLLBACK, live=True), 6.0))
    assert policy.state.live_adapter == BASE
    assert policy.state.canary is None  # its control is gone, so it was ended too
    assert policy.state.route is not None
    assert policy.state.route.canary is None


def test_the_newest_candidate_waits_and_older_ones_are_superseded() -> None:
    policy = Policy()
    policy.canary("a")
    policy.candidate("b")
    policy.candidate("c")
    assert policy.state.waiting is not None
    assert policy.state.waiting.adapter == "c"
    (late,) = policy.state.among(S.REJECTED)
    assert late.adapter == "b"
    assert "Superseded" in late.reason
    assert policy.state.canary is not None  # which goes on


def test_there_is_never_a_second_canary() -> None:
    policy = Policy()
    policy.canary("a")
    second = policy.does(gated(policy.candidate("b"), "Passed.", 4.0, {})).releases[0]
    with pytest.raises(TransitionRefused, match="is a canary already"):
        start_canary(policy.state, second, PLAN, 5.0)


def test_a_person_promotes_a_candidate_by_every_state_on_the_way() -> None:
    policy = Policy()
    policy.candidate("a")
    change = policy.does(
        orders.promoted(policy.state, command(CommandKind.PROMOTE, reason="seen it", without_evidence=True), 5.0)
    )
    assert [release.state for release in change.releases] == [S.GATED, S.CANARY, S.LIVE]
    assert change.releases[-1].reason == "Promoted without evidence (no gate verdict, no canary) by ann: seen it."
    assert policy.state.live_adapter == "a"
    with pytest.raises(TransitionRefused, match="live already"):
        orders.promoted(policy.state, command(CommandKind.PROMOTE, release="a", without_evidence=True), 6.0)


def test_a_person_brings_back_what_was_retired() -> None:
    policy = Policy()
    policy.live("a")
    policy.live("b")
    policy.does(orders.promoted(policy.state, command(CommandKind.PROMOTE, release="a", without_evidence=True), 6.0))
    assert policy.state.live_adapter == "a"
    assert policy.state.among(S.RETIRED)[0].adapter == "b"


def test_a_veto_ends_a_canary_and_refuses_what_is_live() -> None:
    policy = Policy()
    live = policy.live("a")
    canary = policy.canary("b")
    policy.does(orders.vetoed(policy.state, command(CommandKind.VETO, release=canary.id), 5.0))
    assert policy.state.route is not None
    assert policy.state.route.canary is None
    with pytest.raises(TransitionRefused, match="rollback"):
        veto(policy.state, live, "no", 6.0, {})
    with pytest.raises(TransitionRefused, match="from there it can go to: none"):
        veto(policy.state, policy.state.releases[canary.id], "no", 6.0, {})


def test_releases_are_found_by_prefix_if_it_fits_one() -> None:
    policy = Policy()
    release = policy.candidate("abc1")
    policy.candidate("abc2")
    assert policy.state.find("abc1").id == release.id
    assert policy.state.find(release.id).id == release.id
    for wrong in ("abc", "zzz", ""):
        with pytest.raises(TransitionRefused, match="see 'everloop release list'"):
            policy.state.find(wrong)


def test_the_last_decision_is_told() -> None:
    policy = Policy()
    policy.live("a")
    bad = policy.candidate("b")
    policy.does(rejected(bad, "Rejected: gold.", 9.0, {"gold": {"gain": -0.1}}))
    decided = last_decision(policy.state)
    assert decided is not None
    assert (decided.adapter, decided.reason) == ("b", "Rejected: gold.")


def test_a_canary_goes_to_larger_shares_and_nobody_changes_arms() -> None:
    policy = Policy()
    release = policy.does(gated(policy.candidate("a"), "Passed.", 2.0, {})).releases[0]
    plan = CanaryPlan(share=0.25, stages=(0.01, 0.05, 0.25))
    policy.does(start_canary(policy.state, release, plan, 3.0))
    arms: dict[str, str] = {}
    for stage, share in enumerate(plan.shares):
        held, route = policy.state.canary, policy.state.route
        assert held is not None
        assert route is not None
        assert (held.stage, held.canary_began, route.share, route.epoch) == (stage, 3.0, share, stage + 1)
        drawn = {f"person {i}": route.assign(f"person {i}") for i in range(20_000)}
        for arm in ("canary", "control"):
            assert sum(its[1] == arm for its in drawn.values()) / 20_000 == pytest.approx(share, abs=0.01)
        assert {(arm, p) for _, arm, p in drawn.values()} == {
            ("canary", share), ("control", share), ("live", 1 - 2 * share)
        }  # fmt: skip
        assert all(drawn[person][1] == arm for person, arm in arms.items())
        arms = {person: its[1] for person, its in drawn.items() if its[1] != "live"}
        if stage < 2:
            policy.does(next_stage(policy.state, held, "quiet", 4.0 + stage))
    assert policy.state.canary is not None
    assert policy.state.canary.reason == "Stage 3 of 3, 25% of traffic: quiet."
    with pytest.raises(TransitionRefused, match="last stage"):
        next_stage(policy.state, policy.state.canary, "", 9.0)


STEPS = ("candidate", "gate", "reject", "canary", "next stage", "promote", "roll back", "roll back live", "veto")


@given(st.lists(st.sampled_from(STEPS), max_size=40))
def test_whatever_happens_one_is_live_one_is_canary_and_the_log_tells_it_all(steps: list[str]) -> None:
    policy = Policy()
    names = itertools.count()
    for now, step in enumerate(steps):
        try:
            _do(policy, step, f"a{next(names)}", float(now))
        except TransitionRefused:
            continue
        state = policy.state
        assert len(state.among(S.CANARY)) <= 1
        assert len(state.among(S.LIVE)) <= 1
        assert len(state.among(S.CANDIDATE)) <= 1
        assert state.route_now(0.0) is None  # the route is what the releases say
        assert (state.route.live if state.route else BASE) == state.live_adapter
        rebuilt = policy.rebuilt()
        assert rebuilt.releases == state.releases
        assert rebuilt.route == state.route
        assert rebuilt.orders == state.orders
    epochs = [change.route.epoch for change in policy.changes if change.route is not None]
    assert epochs == list(range(1, len(epochs) + 1))


def _do(policy: Policy, step: str, name: str, now: float) -> None:
    state = policy.state
    if step == "candidate":
        policy.does(candidate(state, adapter(name), now))
    elif step in ("gate", "reject") and state.waiting is not None:
        policy.does((gated if step == "gate" else rejected)(state.waiting, step, now, {}))
    elif step == "canary" and state.gated is not None:
        policy.does(start_canary(state, state.gated, PLAN.model_copy(update={"stages": (0.05, 0.25)}), now))
    elif step == "next stage" and state.canary is not None:
        policy.does(next_stage(state, state.canary, step, now))
    elif step == "promote":
        policy.does(orders.promoted(state, command(CommandKind.PROMOTE, without_evidence=True), now))
    elif step == "roll back" and state.canary is not None:
        policy.does(roll_back(state, state.canary, step, now, {}))
    elif step == "roll back live":
        policy.does(orders.rolled_back(state, command(CommandKind.ROLLBACK, live=True), now))
    elif step == "veto" and state.releases:
        policy.does(orders.vetoed(state, command(CommandKind.VETO, release=next(reversed(state.releases))), now))
