"""What the benchmark of recoveries makes of the calls that it saw."""

from __future__ import annotations

import pytest

from benchmarks import recovery
from benchmarks.recovery import Acknowledged, Recovered, check, recovered, report

KILLED = 100.0


def test_the_slowest_partition_counts_and_what_was_acknowledged_before_the_kill_does_not():
    calls = [
        Acknowledged("before", 0, 99.9),
        Acknowledged("a", 0, 100.5),
        Acknowledged("b", 1, 100.6),
        Acknowledged("elsewhere", 2, 100.7),
        Acknowledged("after", 0, 112.0),
    ]
    handled = {"before": 100.1, "a": 104.0, "b": 106.5, "elsewhere": 100.8, "after": 112.1}
    found = recovered(calls, handled, KILLED, {0, 1})
    assert found.first == 6.5
    assert found.backlog == 6.5, "the last that waited for longer than a second"
    assert found.silence == pytest.approx(11.3)


def test_the_backlog_ends_with_the_last_that_waited():
    calls = [Acknowledged("a", 0, 100.5), Acknowledged("b", 0, 103.0), Acknowledged("c", 0, 108.0)]
    found = recovered(calls, {"a": 104.0, "b": 107.0, "c": 108.9}, KILLED, {0})
    assert (found.first, found.backlog) == (4.0, 7.0)


def test_a_call_that_is_missing_in_the_store_or_there_twice_fails_the_run(monkeypatch: pytest.MonkeyPatch):
    class Stored:
        def __init__(self, *calls: str) -> None:
            self.calls = calls

        def rows(self, query: str) -> list[dict[str, str]]:
            return [{"call": call} for call in self.calls]

    calls = [Acknowledged("a", 0, 0.0)]
    assert check(Stored("a", "not acknowledged"), calls) == 2
    with pytest.raises(SystemExit, match="1 calls are in the store twice"):
        check(Stored("a", "a"), calls)
    monkeypatch.setattr(recovery, "DEADLINE", 0.0)
    with pytest.raises(SystemExit, match="the store's last call did not come"):
        check(Stored("b"), calls)


def test_aims_are_of_the_worst_try():
    tries = [Recovered(7.0, 8.0, 0.1), Recovered(13.0, 14.0, 0.2), Recovered(9.0, 9.0, 0.1)]
    rows, aims = report(dict.fromkeys(recovery.KINDS, tries))
    assert (rows[0]["first median s"], rows[0]["worst first s"], rows[0]["tries"]) == (9.0, 13.0, 3)
    assert [one.met for one in aims] == [False, False, True]
