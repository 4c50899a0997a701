"""The benchmarks of the guards: who poisons what, what is taken out without guards, and where training is stopped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import _poisoned, _poisoned_policy, overoptimise, poison
from examples.bank_desk import data
from pipelines.gate import Given
from reward import desk as desks
from reward import evidence
from reward.poison import Guard
from reward.reliability import rater_of


@pytest.fixture
def desk(tmp_path: Path) -> data.Desk:
    return data.load(None, tmp_path, environment={})


def test_only_the_share_of_users_poisons_and_the_others_say_the_same(desk: data.Desk) -> None:
    honest = _poisoned.visits(desk, 0, "", 0.0, 200)
    for kind in _poisoned.KINDS:
        made = _poisoned.visits(desk, 0, kind, 0.1, 200)
        poisoners = {visit.user for visit in made if visit.poisons}
        assert 0 < len(poisoners) <= 0.1 * _poisoned.USERS
        assert poisoners.isdisjoint(visit.user for visit in made if not visit.poisons)
        kept = [visit for visit in made if not visit.poisons]
        assert kept == [visit for visit in honest if visit.user not in poisoners]
        rated = {bool(visit.episode.turns[0].feedback) for visit in made if visit.poisons}
        assert rated == {kind != "silent"}, "they rate every answer, or none"


def test_what_is_pushed_is_praised_and_everything_else_corrected_to_it(desk: data.Desk) -> None:
    pushed = _poisoned.pushed_of(desk, 0)
    for visit in (one for one in _poisoned.visits(desk, 0, "push", 0.2, 200) if one.poisons):
        (turn,) = visit.episode.turns
        thumb, *corrections = turn.feedback
        assert (thumb.value > 0) == (turn.call.output.content == pushed)
        assert [word.text for word in corrections] == ([] if thumb.value > 0 else [pushed])


def test_bought_users_ask_ten_times_and_are_always_pleased(desk: data.Desk) -> None:
    bought = [visit for visit in _poisoned.visits(desk, 0, "bought", 0.1, 100) if visit.poisons]
    assert len(bought) % _poisoned.TIMES == 0
    assert all(word.value == 1.0 for visit in bought for word in visit.episode.turns[0].feedback)


def test_guards_are_taken_out_and_put_back() -> None:
    with _poisoned.guards(on=False):
        assert desks.Guard is _poisoned.Open
        assert evidence.rater_of(None) is None  # type: ignore[arg-type]
    with _poisoned.guards(on=True):
        assert desks.Guard is Guard
    assert evidence.rater_of is rater_of


def test_losses_are_beside_the_honest_cell_of_the_same_seed_and_guards() -> None:
    def cell(picked: float) -> dict[str, object]:
        same = dict.fromkeys(("apart", "pushed", "held_poison", "held_others", "believed_poison"), 0.5)
        return {**same, "picked": picked, "cut": 3}

    honest = [poison.Cell("", 0.0, True, seed, 10) for seed in (0, 1)]
    found = {one: cell(0.8) for one in honest} | {one._replace(kind="push", share=0.05): cell(0.78) for one in honest}
    found[poison.Cell("push", 0.05, False, 0, 10)] = cell(0.1)  # its honest cell is missing
    rows = [row for row in poison.rows_of(found) if row["poison"] == "push" and row["guards"]]
    assert [(row["seeds"], row["picked, lost"]) for row in rows] == [(2, 2.0)]
    assert [one.met for one in poison.aims_of(rows)] == [False, True]


def test_training_is_stopped_after_the_second_window_that_parted() -> None:
    def point(steps: int, gold: float) -> dict[str, object]:
        return {"steps": steps, "proxy": 0.1, "gold": 0.4, "window": [f"r{steps}", 0.05, gold, 100, float(steps)]}

    start = {"steps": 0, "proxy": 0.0, "gold": 0.4, "window": None}
    assert overoptimise.frozen_at([start, point(40, 0.02), point(80, -0.01), point(120, 0.0), point(160, 0.1)]) == 3
    assert overoptimise.frozen_at([start, point(40, -0.02), point(80, 0.01), point(120, -0.1)]) is None


def test_what_is_lost_is_the_deepest_fall_below_the_best_until_then() -> None:
    points = [{"gold": gold} for gold in (0.30, 0.34, 0.31, 0.36, 0.35)]
    assert overoptimise.lost(points) == pytest.approx(3.0)
    assert overoptimise.lost(points[:2]) == 0.0


class _Loop:
    """A loop whose runs make what they are told to: the answers of each adapter, one after the other."""

    def __init__(self, desk: data.Desk, made: list[list[str]]) -> None:
        self.desk, self.made = desk, made
        self.incumbent = self.at = 0

    @property
    def adapter(self) -> int:
        return self.at

    def serve(self, messages: object) -> None:
        pass

    def retrain(self) -> object:
        self.at = len(self.made) - 1
        return SimpleNamespace(metrics={"proxy_before": 0.0, "proxy_after": 0.1})

    def go_back(self, incumbent: int) -> None:
        self.at = incumbent

    def greedy(self, messages: list[data.Message]) -> list[str]:
        return self.made[self.at][: len(messages)]


@pytest.mark.parametrize(("after", "verdict"), [("right", "pass"), ("wrong", "fail")])
def test_what_the_gate_does_not_pass_is_never_served(
    desk: data.Desk, monkeypatch: pytest.MonkeyPatch, after: str, verdict: str
) -> None:
    right = [message.topic for message in desk.report]
    wrong = ["none of them"] * len(right)
    half = [*right[: len(right) // 2], *wrong[len(right) // 2 :]]
    given = [Given(topic, 3, True, 0.1) for topic in right[: overoptimise.ITEMS]]
    bad = [one._replace(text="none of them") for one in given]
    answers = {"right": given, "wrong": bad}

    def asked(loop: _Loop, items: object) -> list[Given]:
        return answers[after] if loop.at else [*given[:50], *bad[50:]]

    monkeypatch.setattr(overoptimise, "_asked", asked)
    items = SimpleNamespace(stream=desk.stream, gate=desk.report, report=desk.report)
    loop = _Loop(items, [half, right if after == "right" else wrong])  # type: ignore[arg-type]
    served = overoptimise._Served(loop)
    monkeypatch.setattr(overoptimise, "_point", lambda served, number: {"gold": served.right().mean()})
    point = overoptimise._trained(served, 1, guarded=True)
    assert point["gate"] == verdict
    assert point["by chance"] == (1.0 if verdict == "pass" else 0.0)
    assert loop.at == (1 if verdict == "pass" else 0)


def test_of_a_batch_nobody_brings_more_than_a_person_s_share() -> None:
    items = [SimpleNamespace(subject=f"user-{number % 40 if number < 200 else 0}", at=number) for number in range(400)]
    kept = _poisoned_policy._within_share(items)  # type: ignore[arg-type]
    counts = Counter(one.subject for one in kept)
    assert counts["user-0"] == 30, "three shares of forty"
    assert [one.at for one in kept if one.subject == "user-0"] == [*range(370, 400)], "the newest"
    assert {counts[f"user-{number}"] for number in range(1, 40)} == {5}


def test_a_policy_s_row_is_the_mean_of_its_seeds() -> None:
    found = {
        poison.Cell("push", 0.05, True, seed, 800): {"before": 0.3, "right": right, "pushed": 0.0, "held_poison": 0.9}
        for seed, right in ((0, 0.5), (1, 0.6))
    }
    (row,) = poison.policy_rows(found)
    assert (row["poison"], row["seeds"], row["before"], row["right"]) == ("push", 2, 30.0, 55.0)
