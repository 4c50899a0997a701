"""The capacity page and the arithmetic behind it."""

from __future__ import annotations

import pytest
from everloop import wire
from everloop.event import Call, Event

from benchmarks import _costs, capacity
from benchmarks.capacity import PAGE, Figures, costs, fill, plan

US = dict.fromkeys(
    (
        "gateway: serving",
        "gateway: scribe",
        "assemble: call",
        "assemble: feedback",
        "broker: call taken and assembled",
        "broker: feedback taken and assembled",
        "broker: read by the archive",
        "score: call",
        "score: feedback",
        "archive",
        "archive: fold",
    ),
    1000.0,
)
SIZES = {"log: events": 6e3, "log: everloop-state-assemble": 1e3, "store: events": 1e3}
FIGURES = Figures(US, SIZES)


def test_the_page_says_what_the_script_computes_from_the_figures_that_are_kept():
    page = PAGE.read_text(encoding="utf-8")
    assert fill(page, Figures.read()) == page, "python -m benchmarks.capacity --page"


def test_a_cost_is_that_of_two_calls_and_a_fifth_of_a_word():
    ms = {one.step: one.ms for one in costs(FIGURES)}
    assert ms["gateway"] == pytest.approx(2.2)
    assert ms["assemble"] == pytest.approx(2.2)
    assert ms["archive"] == pytest.approx(4 * 2.2 * 2), "event, episode, trajectory and score, written and folded"
    assert ms["broker"] == pytest.approx(2.2 + 2.2 + 4 * 2.2)


def test_processes_partitions_and_brokers_grow_with_the_load():
    small, large = plan(FIGURES, 60), plan(FIGURES, 60_000)
    assert (small.assemblers, small.scorers, small.partitions, small.brokers, small.archives) == (1, 1, 4, 3, 1)
    assert large.assemblers == 4, "2.2 cores at 60%"
    assert large.partitions == 8
    assert large.archives == 30, "17.6 cores at 60%"
    assert large.brokers == 10, "13.2 cores, three replicas, four of each broker"
    assert large.cores == pytest.approx(1000 * small.cores)


def test_storage_counts_what_is_kept_and_not_the_state_that_is_compacted():
    a_day = plan(FIGURES, 60)
    assert a_day.log_gb_a_day == pytest.approx(3 * 86_400 * 6e3 / 1e9)
    assert a_day.store_gb_a_day == pytest.approx(86_400 * 1e3 / 1e9)
    assert a_day.state_gb == pytest.approx(3 * 7 * 86_400 * 1e3 / 1e9)


def test_a_page_without_a_place_for_a_table_is_refused():
    with pytest.raises(SystemExit, match="no place for the table 'costs'"):
        fill("nothing here", FIGURES)


def test_without_figures_it_says_how_to_get_them(tmp_path):
    with pytest.raises(SystemExit, match="--measure"):
        Figures.read(tmp_path / "capacity.json")


def test_other_rates_are_computed(capsys):
    assert capacity.main(["--episodes-per-minute", "2500"]) == 0
    assert "2,500" in capsys.readouterr().out


def test_what_is_measured_is_two_calls_of_256_tokens_and_a_thumb_for_each_episode():
    records = [*_costs.calls("x", 5), *_costs.thumbs("x", 5)]
    events = [wire.decode(Event, record.value or b"") for record in records]
    assert len({event.id for event in events}) == 15
    for number in range(5):
        its = [event.payload for event in events if event.episode == f"ep_x-{number}"]
        called = [one for one in its if isinstance(one, Call)]
        assert [len(one.tokens.completion) for one in called if one.tokens] == [256, 256]
        assert len(its) == 3


def test_fewer_than_some_episodes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        capacity.main(["--episodes-per-minute", "-5"])
    assert "takes a number above 0" in capsys.readouterr().err
