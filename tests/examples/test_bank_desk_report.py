"""The demo's arithmetic and what it shows: gain, verdict, table, plot, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.bank_desk.data import Message
from examples.bank_desk.measure import Gain, Measured, measure, paired_bootstrap
from examples.bank_desk.report import Outcome, Promotion, as_json, plot, table


def outcome(right_after: int = 60, promoted: int = 1) -> Outcome:
    before = tuple(i < 40 for i in range(100))
    after = tuple(i < right_after for i in range(100))
    return Outcome(
        data="the built-in desk",
        messages=3000,
        measured=(Measured(0, "base", before), Measured(3000, "abc", after)),
        gain=paired_bootstrap(before, after),
        corrected=20,
        corrected_then_right=0.9,
        promoted=tuple(Promotion(f"hash{i}" * 5, 1000 * (i + 1)) for i in range(promoted)),
        rejected=1,
        thumbs_up=900,
        thumbs_down=900,
        seconds={"base": 20.0, "loop": 200.04},
    )


def test_the_bootstrap_is_paired() -> None:
    one_better = paired_bootstrap([True] * 50 + [False] * 50, [True] * 60 + [False] * 40)
    assert one_better.mean == pytest.approx(0.1)
    assert 0.03 < one_better.low < one_better.mean < one_better.high < 0.17
    assert paired_bootstrap([True, False] * 50, [True, False] * 50) == Gain(0.0, 0.0, 0.0)
    assert paired_bootstrap([False] * 9, [True] * 9) == Gain(1.0, 1.0, 1.0)
    unpaired = paired_bootstrap([True] * 50 + [False] * 50, [False] * 40 + [True] * 60)
    assert unpaired.low < 0 < unpaired.high


def test_the_interval_matches_the_binomial() -> None:
    """One differing message in four, all better: the share drawn is binomial, with standard error 0.0217."""
    gain = paired_bootstrap([False] * 400, [True] * 100 + [False] * 300)
    assert gain.low == pytest.approx(0.25 - 1.96 * 0.0217, abs=0.004)
    assert gain.high == pytest.approx(0.25 + 1.96 * 0.0217, abs=0.004)


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_other_messages_are_no_pair(before: list[bool], after: list[bool]) -> None:
    with pytest.raises(ValueError, match="same messages"):
        paired_bootstrap(before, after)


def test_measuring_is_exact_match_in_order() -> None:
    held_out = [Message("one", "a"), Message("two", "b"), Message("three", "c")]
    assert measure({"one": "a", "two": "B", "three": "c"}.__getitem__, held_out, workers=2) == (True, False, True)


def test_the_verdict_says_what_failed() -> None:
    assert outcome().trouble is None
    assert "no release was promoted" in str(outcome(promoted=0).trouble)
    assert "nothing improved for certain" in str(outcome(right_after=40).trouble)
    assert "-5.0 points" in str(outcome(right_after=35).trouble)


def test_json_has_what_scripts_read() -> None:
    found = json.loads(json.dumps(as_json(outcome())))
    expected = {
        "data": "the built-in desk",
        "messages": 3000,
        "accuracy_before": 0.4,
        "accuracy_after": 0.6,
        "corrected_then_right": 0.9,
        "releases_promoted": 1,
        "releases_rejected": 1,
        "seconds": 220.0,
    }
    assert {name: found[name] for name in expected} == expected


def test_table_and_plot_are_made(tmp_path: Path) -> None:
    assert "40.0% of 100 held-out" in table(outcome())
    assert "+20.0 points" in table(outcome())
    path = plot(outcome(promoted=3), tmp_path / "new" / "demo.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
