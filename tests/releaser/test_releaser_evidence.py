"""What an order alone promotes, and what only a person's word does; and that a release says which it was."""

from __future__ import annotations

from typing import Any

import pytest
from everloop.errors import TransitionRefused
from everloop.event import BASE
from everloop.release import CanaryPlan, Release, ReleaseState
from everloop.run import Command, CommandKind

from services.releaser import orders
from services.releaser.evidence import lacking, told
from services.releaser.state import PolicyState

PASSED = {"gold": {"passed": True, "says": "gold +3.0 points"}, "against": BASE}
ENOUGH = {"canary": {"units": 60}, "control": {"units": 55}, "low": -0.02}


def release(state: ReleaseState, **evidence: Any) -> Release:
    plan = CanaryPlan(min_units=50, margin=0.05)
    return Release(
        id="rel_a", tenant="t", policy="p", adapter="a", uri="u", state=state, plan=plan, evidence=evidence, time=1.0
    )


def promoted(held: Release, seen: dict[str, dict[str, Any]] | None = None, **arguments: Any) -> Release:
    state = PolicyState("t", "p", {held.id: held})
    named = {"release": held.id, **arguments}
    order = Command(id="cmd", kind=CommandKind.PROMOTE, tenant="t", policy="p", arguments=named, by="ann", time=2.0)
    return orders.promoted(state, order, 3.0, seen).releases[-1]


@pytest.mark.parametrize(
    ("evidence", "missing"),
    [
        ({}, ["no gate verdict", "no canary"]),
        ({"gate": PASSED}, ["no canary"]),
        ({"gate": {"gold": {"passed": False}}, "canary": ENOUGH}, ["a gate that it did not pass"]),
        ({"canary": ENOUGH}, ["no gate verdict"]),
        ({"gate": PASSED, "canary": {**ENOUGH, "low": -0.06}}, ["a canary that is not decided"]),
        ({"gate": PASSED, "canary": {**ENOUGH, "control": {"units": 49}}}, ["a canary that is not decided"]),
        ({"gate": PASSED, "canary": {"canary": {"units": 90}}}, ["a canary that is not decided"]),
        ({"gate": PASSED, "canary": ENOUGH}, []),
    ],
)
def test_what_is_missing_is_refused_by_name_and_kept_where_it_is_overridden(
    evidence: dict[str, Any], missing: list[str]
) -> None:
    held = release(ReleaseState.RETIRED, **evidence)
    assert lacking(held) == missing
    if not missing:
        assert promoted(held).reason == "Promoted by ann."
        return
    with pytest.raises(TransitionRefused) as refused:
        promoted(held)
    assert " and ".join(missing) in str(refused.value)
    assert "everloop release promote rel_a --without-evidence --reason" in str(refused.value)
    live = promoted(held, without_evidence=True, reason="I looked at it.")
    assert live.state is ReleaseState.LIVE
    assert live.reason == f"Promoted without evidence ({', '.join(missing)}) by ann: I looked at it."
    assert lacking(live) == missing


def test_a_canary_that_runs_speaks_for_its_own_release_alone_and_is_kept() -> None:
    held = release(ReleaseState.CANARY, gate=PASSED)
    with pytest.raises(TransitionRefused, match="a canary that is not decided"):
        promoted(held, {"rel_other": {"canary": ENOUGH}})
    live = promoted(held, {"rel_a": {"canary": ENOUGH}})
    assert (live.reason, live.evidence["canary"]) == ("Promoted by ann.", ENOUGH)
    assert told(live) == "gate passed, canary passed"


def test_what_has_ended_or_is_live_is_refused_for_that_and_not_for_evidence() -> None:
    for state, why in ((ReleaseState.REJECTED, "it has ended"), (ReleaseState.LIVE, "live already")):
        with pytest.raises(TransitionRefused, match=why):
            promoted(release(state))


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (release(ReleaseState.CANDIDATE), "gate none, canary none"),
        (release(ReleaseState.REJECTED, gate={"gold": {"passed": False}}), "gate failed, canary none"),
        (release(ReleaseState.CANARY, gate=PASSED), "gate passed, canary runs"),
        (release(ReleaseState.ROLLED_BACK, gate=PASSED, canary={**ENOUGH, "low": -0.2}), "gate passed, canary failed"),
        (release(ReleaseState.LIVE, canary={**ENOUGH, "low": -0.2}), "gate none, canary undecided"),
    ],
)
def test_a_list_tells_what_stands_behind_a_release(held: Release, words: str) -> None:
    assert told(held) == words
