"""Reading where the loop stands, and what the demo sends because of it."""

from __future__ import annotations

from typing import Any

import pytest

from examples.bank_desk.loop import (
    BREATH,
    CHUNK,
    SERVICES,
    TRICKLE,
    Aim,
    Next,
    Sent,
    Stage,
    Standing,
    plan,
    reward_told,
    since,
    standing,
)


def statuses(releases: dict[str, Any] | None, **others: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {name: {} for name in SERVICES} | others
    if releases is not None:
        policy = {"live": {"adapter": "base"}, "in_progress": None, "waiting": [], "last_decision": None, **releases}
        found["releaser"] = {"policies": {"bank/desk": policy}}
    return found


def at(stage: Stage, backlog: int = 0) -> Standing:
    return Standing(stage, "base", None, None, None, None, None, None, backlog)


def decided(state: str, **evidence: Any) -> dict[str, Any]:
    return {"release": "rel_1", "adapter": "abc", "state": state, "reason": "Because.", "evidence": evidence}


def test_nothing_is_known_while_the_releaser_is_silent() -> None:
    assert standing("bank/desk", statuses(None)) is None


@pytest.mark.parametrize(
    ("said", "learning", "stage"),
    [
        ({}, {}, Stage.GATHERING),
        ({}, {"running": {"run": "run_1"}}, Stage.TRAINING),
        ({"waiting": [decided("candidate")]}, {}, Stage.EXAMINING),
        ({}, {"last_run": {"state": "published", "adapter": "abc"}}, Stage.EXAMINING),  # the releaser has yet to see it
        ({"live": {"adapter": "abc"}}, {"last_run": {"state": "published", "adapter": "abc"}}, Stage.GATHERING),
        (
            {"last_decision": decided("rejected")},
            {"last_run": {"state": "published", "adapter": "abc"}},
            Stage.GATHERING,
        ),
        ({"in_progress": decided("gated")}, {}, Stage.EXAMINING),
        ({"in_progress": decided("canary")}, {"running": {"run": "run_2"}}, Stage.CANARY),
    ],
)
def test_the_stage_follows_what_is_under_way(said: dict[str, Any], learning: dict[str, Any], stage: Stage) -> None:
    found = standing("bank/desk", statuses(said, learner={"policies": {"bank/desk": learning}}))
    assert found is not None
    assert found.stage is stage


def test_numbers_come_from_their_services() -> None:
    found = standing(
        "bank/desk",
        statuses(
            {},
            learner={"policies": {"bank/desk": {"last_run": {"id": "run_1", "metrics": {"steps": 12.0, "kl": 0.5}}}}},
            scorer={"rewards": {"bank/desk": {"auc": 0.9, "calibration_error": 0.05}}, "score": {"lag": 3}},
            assembler={"assemble": {"lag": 4}},
        ),
    )
    assert found is not None
    assert found[3:] == (0.9, 0.05, 12, 0.5, "run_1", 7)


def test_the_reward_model_is_told_in_two_lines() -> None:
    its = {
        "version": "0123456789abcdef",
        "auc": 0.8712,
        "calibration_error": None,
        "labels": 1602,
        "snapshots_refused": 7,
        "snapshots_waited": 2,
        "poison": {"quarantined": {"duplicate": 3}},
        "drift": "how answers are rated has changed 1x",
        "frozen": True,
    }
    model, guards = reward_told(its, paused=True)
    assert model == (
        "Reward model 01234567: AUC 0.871, calibration error not known yet on 1,602 labels; 7 of its versions were "
        "refused, 2 waited for labels"
    )
    assert guards == (
        "Guards: words held: 3 x duplicate; drift: how answers are rated has changed 1x; opinions are kept from "
        "training for now; training is paused"
    )
    assert reward_told({})[1] == "Guards: none had to act"


def test_a_run_goes_on_while_the_learner_is_away() -> None:
    training, back = at(Stage.TRAINING), at(Stage.GATHERING)
    assert since(training, back).stage is Stage.TRAINING
    assert since(training._replace(ended="run_1"), back).stage is Stage.TRAINING
    assert since(training._replace(ended="run_1"), back._replace(ended="run_2")).stage is Stage.GATHERING
    assert since(at(Stage.CANARY), back).stage is Stage.GATHERING


@pytest.mark.parametrize(
    ("state", "evidence", "gate", "canary"),
    [
        ("live", {"gate": {}, "canary": {}}, "passed", "promoted"),
        ("rolled_back", {"gate": {}, "canary": {}}, "passed", "rolled back"),
        ("rejected", {"gate": {}}, "refused", ""),
    ],
)
def test_a_decision_says_who_made_it(state: str, evidence: dict[str, Any], gate: str, canary: str) -> None:
    found = standing("bank/desk", statuses({"last_decision": decided(state, **evidence)}))
    assert found is not None
    assert found.decision is not None
    assert (found.decision.gate, found.decision.canary) == (gate, canary)


@pytest.mark.parametrize(
    ("now", "sent", "promoted", "then"),
    [
        (at(Stage.GATHERING), Sent(0, 0, 0), 0, Next(CHUNK)),
        (at(Stage.GATHERING, backlog=900), Sent(600, 600, 600), 0, Next(0, BREATH / 4)),  # faster than it is scored
        (at(Stage.GATHERING), Sent(1000, 1000, 1000), 0, Next(TRICKLE, BREATH)),  # enough for a run, which must begin
        (at(Stage.GATHERING), Sent(2990, 900, 900), 0, Next(10)),
        (at(Stage.GATHERING), Sent(3000, 900, 900), 0, Next(done=True)),
        (at(Stage.TRAINING), Sent(1000, 0, 0), 0, Next(TRICKLE, BREATH)),
        (at(Stage.TRAINING), Sent(1200, 200, 200), 0, Next(0, BREATH)),  # enough: the rest is for the canary
        (at(Stage.TRAINING), Sent(3000, 0, 0), 0, Next(TRICKLE, BREATH)),  # nothing promoted yet: give it a chance
        (at(Stage.TRAINING), Sent(3000, 0, 0), 1, Next(done=True)),
        (at(Stage.CANARY), Sent(3000, 800, 500), 1, Next(CHUNK)),  # a canary without messages decides nothing
        (at(Stage.CANARY), Sent(3750, 800, 500), 1, Next(done=True)),
        (at(Stage.CANARY), Sent(3750, 800, 500), 0, Next(CHUNK)),
        (at(Stage.EXAMINING), Sent(4800, 800, 9), 0, Next(done=True)),
    ],
)
def test_messages_come_where_somebody_waits_for_them(now: Standing, sent: Sent, promoted: int, then: Next) -> None:
    assert plan(now, sent, Aim(3000, 1000), promoted) == then
