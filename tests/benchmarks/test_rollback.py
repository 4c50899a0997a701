"""What the benchmark of rollbacks makes of the answers that it saw."""

from __future__ import annotations

import pytest

from benchmarks.rollback import Answer, Rollback, report, seen

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


def test_the_aim_is_the_slowest_of_all():
    rows, (aim,) = report([Rollback(0.2, 0.3, 0.25, 0.4), Rollback(0.3, 0.5, 1.2, 1.3)])
    assert (aim.got, aim.met) == (1.2, False)
    assert {"from … to": "command to the releaser's decision", "p50 ms": 250, "max ms": 300} in rows
