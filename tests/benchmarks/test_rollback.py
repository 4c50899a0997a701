"""What the benchmark of rollbacks makes of the answers that it saw."""

from __future__ import annotations

import pytest

from benchmarks import _spoiled
from benchmarks._guards import Stopped, stopped, trip
from benchmarks._traffic import Answer
from benchmarks.rollback import Rollback, report, seen

BEFORE, WITHDRAWN = "a", "b"


def test_first_and_last_are_told_apart_from_what_was_under_way():
    answers = [
        Answer(9.0, 9.1, WITHDRAWN),
        Answer(10.2, 10.3, BEFORE),
        Answer(10.1, 10.5, WITHDRAWN),  # sent before anybody could know
        Answer(10.6, 10.7, BEFORE),
    ]
    assert seen(answers, WITHDRAWN, BEFORE, 9.0) == (10.3, 10.5)


def test_an_answer_of_what_was_withdrawn_fails_the_benchmark():
    answers = [Answer(10.0, 10.1, BEFORE), Answer(10.2, 10.3, WITHDRAWN)]
    with pytest.raises(SystemExit, match="1 requests after the rollback"):
        seen(answers, WITHDRAWN, BEFORE, 9.0)


def canary(version: str, how: str | None, at: float) -> Answer:
    """One answer to one person: of the canary's adapter (bad in one way) or of its control."""
    output = _spoiled.message(how, _spoiled.TOPIC, True, True)
    arm = "canary" if version == WITHDRAWN else "control"
    return Answer(at - 0.01, at, version, arm, f"call_{at}", f"person-{at}", output)


@pytest.mark.parametrize("how", _spoiled.KINDS)
def test_the_trip_is_the_answer_by_which_the_guard_is_sure(how: str):
    answers = [canary(WITHDRAWN if at % 2 else BEFORE, how if at % 2 else None, float(at)) for at in range(400)]
    at = trip(answers, WITHDRAWN)
    assert at is not None
    assert 4 <= at < 200
    assert trip([one for one in answers if one.came < at], WITHDRAWN) is None
    made = stopped([one for one in answers if one.came < at + 10], WITHDRAWN, how, "a guard", at + 0.2)
    assert (made.kind, made.decided) == (how, pytest.approx(0.2))
    assert made.affected == sum(one.version == WITHDRAWN for one in answers if one.came < at + 10)
    assert made.after == sum(one.version == WITHDRAWN and at < one.sent for one in answers if one.came < at + 10)
    assert 0 < made.asked < made.answered < 10


def test_an_adapter_that_does_nothing_wrong_trips_no_guard():
    answers = [canary(WITHDRAWN if at % 2 else BEFORE, None, float(at)) for at in range(400)]
    assert trip(answers, WITHDRAWN) is None
    with pytest.raises(SystemExit, match="trip no guard"):
        stopped(answers, WITHDRAWN, "does nothing", "a guard", 1.0)


def test_the_aims_are_the_slowest_of_all():
    by_guard = [
        Stopped("answers nothing", "a guard", 0.2, 0.25, 0.3, 9, 2),
        Stopped("answers nothing", "a guard", 0.3, 0.4, 0.6, 21, 5),
    ]
    rows, (command, guard) = report([Rollback(0.2, 0.3, 0.25, 0.4), Rollback(0.3, 0.5, 1.2, 1.3)], by_guard)
    assert (command.got, command.met) == (1.2, False)
    assert (guard.got, guard.met) == (0.6, True)
    assert {"from … to": "command to the releaser's decision", "p50 ms": 250, "max ms": 300} in rows
    affected = {"requests p50": 15, "max": 21, "sent after the trip": 5}
    assert {"from … to": "affected by an adapter that answers nothing", **affected} in rows
