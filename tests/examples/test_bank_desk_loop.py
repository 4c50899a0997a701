"""Reading where the loop stands, and what the demo sends because of it."""

from __future__ import annotations

from typing import Any

import pytest

from examples.bank_desk.loop import BREATH, CHUNK, TRICKLE, Next, Stage, plan, standing


def releaser(**said: Any) -> dict[str, Any]:
    policy = {"live": {"adapter": "base"}, "in_progress": None, "waiting": [], "last_decision": None, **said}
    return {"policies": {"bank/desk": policy}}


def decided(state: str, **evidence: Any) -> dict[str, Any]:
    return {"release": "rel_1", "adapter": "abc", "state": state, "reason": "Because.", "evidence": evidence}


def test_nothing_is_known_while_the_releaser_is_silent() -> None:
    assert standing("bank/desk", {}, {}, {}) is None


@pytest.mark.parametrize(
    ("said", "running", "stage"),
    [
        ({}, None, Stage.GATHERING),
        ({}, {"run": "run_1"}, Stage.TRAINING),
        ({"waiting": [decided("candidate")]}, {"run": "run_1"}, Stage.EXAMINING),
        ({"in_progress": decided("gated")}, None, Stage.EXAMINING),
        ({"in_progress": decided("canary")}, {"run": "run_2"}, Stage.CANARY),
    ],
)
def test_the_stage_follows_what_is_under_way(said: dict[str, Any], running: Any, stage: Stage) -> None:
    found = standing("bank/desk", releaser(**said), {"policies": {"bank/desk": {"running": running}}}, {})
    assert found is not None
    assert (found.stage, found.live, found.auc) == (stage, "base", None)


@pytest.mark.parametrize(
    ("state", "evidence", "gate", "canary"),
    [
        ("live", {"gate": {}, "canary": {}}, "passed", "promoted"),
        ("rolled_back", {"gate": {}, "canary": {}}, "passed", "rolled back"),
        ("rejected", {"gate": {}}, "refused", ""),
    ],
)
def test_a_decision_says_who_made_it(state: str, evidence: dict[str, Any], gate: str, canary: str) -> None:
    found = standing("bank/desk", releaser(last_decision=decided(state, **evidence)), {}, {})
    assert found is not None
    assert found.decision is not None
    assert (found.decision.gate, found.decision.canary) == (gate, canary)


@pytest.mark.parametrize(
    ("stage", "sent", "in_stage", "promoted", "then"),
    [
        (Stage.GATHERING, 0, 0, 0, Next(CHUNK)),
        (Stage.GATHERING, 2990, 900, 0, Next(10)),
        (Stage.GATHERING, 3000, 900, 0, Next(done=True)),
        (Stage.TRAINING, 700, 0, 0, Next(TRICKLE, BREATH)),
        (Stage.TRAINING, 900, 200, 0, Next(0, BREATH)),  # enough: the rest is for the canary
        (Stage.TRAINING, 3000, 0, 0, Next(TRICKLE, BREATH)),  # nothing promoted yet: give it a chance
        (Stage.TRAINING, 3000, 0, 1, Next(done=True)),
        (Stage.CANARY, 3000, 500, 1, Next(CHUNK)),  # a canary without messages decides nothing
        (Stage.CANARY, 3750, 500, 1, Next(done=True)),
        (Stage.EXAMINING, 3750, 9, 0, Next(done=True)),
    ],
)
def test_messages_come_where_somebody_waits_for_them(
    stage: Stage, sent: int, in_stage: int, promoted: int, then: Next
) -> None:
    assert plan(stage, sent, in_stage, 3000, promoted) == then
