"""The demo's arithmetic and what it shows: gain, verdict, rows, table, plot, JSON, and the command's exit status."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from everloop.cli.main import main
from openai import APIConnectionError

from examples.bank_desk import demo
from examples.bank_desk.data import Message
from examples.bank_desk.loop import Decision, Stage, Standing
from examples.bank_desk.measure import Gain, Measured, measure, paired_bootstrap
from examples.bank_desk.platform import PlatformFailed
from examples.bank_desk.report import KEYS, PROMOTED, REFUSED, Outcome, Release, as_json, draw, plot, table


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
        promoted=tuple(Release(f"hash{i}" * 5, 1000 * (i + 1)) for i in range(promoted)),
        refused=(Release("worse" * 5, 1500),),
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
        "closed": True,
        "trouble": None,
    }
    assert {name: found[name] for name in expected} == expected
    assert tuple(found) == KEYS


def test_the_table_has_both_measurements() -> None:
    assert "40.0% of 100 held-out" in table(outcome())
    assert "+20.0 points" in table(outcome())
    assert re.search("releases refused +1 ", table(outcome()))


def test_the_plot_marks_every_release(tmp_path: Path) -> None:
    (axes,) = draw(outcome(promoted=2)).axes
    marks = [(line.get_xdata()[0], line.get_color()) for line in axes.lines if line.get_linestyle() == "--"]
    assert sorted(marks) == [(1000, PROMOTED), (1500, REFUSED), (2000, PROMOTED)]
    assert {(mark.get_text(), mark.get_color()) for mark in axes.texts} == {
        ("release hash0has", PROMOTED),
        ("release hash1has", PROMOTED),
        ("refused worsewor", REFUSED),
    }
    curve = axes.lines[0]
    assert list(zip(curve.get_xdata(), curve.get_ydata(), strict=True)) == [(0, 40.0), (3000, 60.0), (3000, 60.0)]
    path = plot(outcome(), tmp_path / "new" / "demo.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_cycle_s_row_has_what_every_column_promises() -> None:
    served = SimpleNamespace(messages=2100, up=700, down=650, corrected={str(i): "a" for i in range(310)})
    decision = Decision("rel_1", "abc", "rolled_back", "Worse.", "passed", "rolled back")
    now = Standing(Stage.GATHERING, "0123456789abcdef", decision, 0.876, 0.043, 48, 0.0213, "run_1", 0)
    row = demo.cycle_line(3, now, decision, SimpleNamespace(served=served), 0.6125)
    begins = [found.start() for found in re.finditer(r"\S+", demo.COLUMNS)]
    cells = [row[begin:end].strip() for begin, end in zip(begins, [*begins[1:], None], strict=True)]
    assert dict(zip(demo.COLUMNS.split(), cells, strict=True)) == {
        "cycle": "3",
        "live": "01234567",
        "messages": "2100",
        "thumbs": "700/650",
        "corr": "310",
        "AUC": "0.88",
        "cal.err": "0.04",
        "steps": "48",
        "KL": "0.021",
        "gate": "passed",
        "canary": "rolled back",
        "held-out": "61.3%",
    }


Command = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def command(monkeypatch: Any, tmp_path: Path, capfd: Any) -> Iterator[Command]:
    """``everloop demo --json`` whose demo gives or raises this: its exit status, and its last line read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVERLOOP_DATA", raising=False)
    before = signal.getsignal(signal.SIGTERM)

    def ordered(became: Outcome | Exception, *words: str) -> tuple[int, dict[str, Any]]:
        def run(self: demo.Demo) -> Outcome:
            if isinstance(became, Exception):
                raise became
            return became

        monkeypatch.setattr(demo.Demo, "run", run)
        status = main(["demo", "--json", *words])
        return status, json.loads(capfd.readouterr().out.splitlines()[-1])

    yield ordered
    signal.signal(signal.SIGTERM, before)


def test_the_command_ends_well_where_the_loop_closed(command: Command) -> None:
    status, said = command(outcome())
    assert (status, said["closed"], said["trouble"]) == (0, True, None)


@pytest.mark.parametrize(
    ("became", "why"),
    [
        (outcome(right_after=40), "nothing improved for certain"),
        (outcome(promoted=0), "no release was promoted"),
        (PlatformFailed("the learner is gone"), "the learner is gone"),
        (APIConnectionError(request=httpx.Request("POST", "http://127.0.0.1/v1")), "the gateway does not answer"),
    ],
)
def test_the_command_fails_where_the_loop_did_not_close(
    command: Command, became: Outcome | Exception, why: str
) -> None:
    status, said = command(became)
    assert (status, said["closed"]) == (1, False)
    assert why in said["trouble"]
    assert tuple(said) == KEYS
    assert isinstance(became, Outcome) or {said[name] for name in KEYS[:-2]} == {None}


def test_the_command_fails_on_data_that_cannot_be_used(command: Command) -> None:
    status, said = command(outcome(), "--data", "none.csv")
    assert (status, said["closed"]) == (1, False)
    assert "none.csv cannot be read" in said["trouble"]
    assert tuple(said) == KEYS


def test_what_cannot_be_used_wipes_nothing(command: Command) -> None:
    Path(".everloop/demo").mkdir(parents=True)
    kept = Path(".everloop/demo/everloop.toml")
    kept.touch()
    status, said = command(outcome(), "--log", "kafak")
    assert (status, said["closed"]) == (1, False)
    assert "--log kafak" in said["trouble"]
    with demo._alone(Path(".everloop/demo")):
        status, said = command(outcome())
    assert (status, said["closed"]) == (1, False)
    assert "a demo runs in .everloop/demo already" in said["trouble"]
    assert kept.exists()
    assert command(outcome())[0] == 0
