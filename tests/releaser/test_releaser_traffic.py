"""What a canary's traffic adds up to: units, arms, duplicates, and the hard guards."""

from __future__ import annotations

from typing import Any

import pytest
from everloop.config import CanaryConfig
from everloop.episode import Episode, Turn
from everloop.event import Call, Message
from everloop.feedback import Feedback
from everloop.serving.base import LOST
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sequential import arm
from services.releaser.answers import is_broken, is_empty
from services.releaser.traffic import ARMS, Traffic, success

CONFIG = CanaryConfig()


def call(id: str, arm: str = "canary", release: str | None = "r", **fields: Any) -> Call:
    fields.setdefault("output", Message(role="assistant", content="card_arrival"))
    return Call(id=id, messages=(Message(role="user", content="hi"),), arm=arm, release=release, **fields)


def thumb(value: float, call: str | None = None, id: str = "f", time: float = 1.0) -> Feedback:
    return Feedback(id=id, kind="thumb", value=value, call=call, time=time)


def episode(id: str, *turns: Turn, version: int = 1, subject: str | None = None, **fields: Any) -> Episode:
    return Episode(
        tenant="t", policy="p", id=id, version=version, subject=subject, started=1.0, updated=2.0, turns=turns, **fields
    )


def rated(id: str, value: float, arm: str = "canary", subject: str | None = None, version: int = 1) -> Episode:
    turn = Turn(call=call(f"c{id}", arm), feedback=(thumb(value),))
    return episode(id, turn, subject=subject, version=version)


def test_a_person_counts_once_however_much_they_talk() -> None:
    traffic = Traffic("r")
    for i in range(9):
        traffic.take_episode(rated(f"e{i}", 1.0, subject="loud"))
    traffic.take_episode(rated("q", -1.0, subject="quiet"))
    traffic.take_episode(rated("n1", 1.0, "control"))
    traffic.take_episode(rated("n2", 1.0, "control"))  # nobody: each episode is a unit
    canary, control = traffic.arms()
    assert (canary.units, canary.mean) == (2, 0.5)
    assert control.units == 2


def test_newer_versions_replace_older_ones_in_any_order() -> None:
    traffic = Traffic("r")
    assert traffic.take_episode(rated("e", 1.0, version=2))
    assert not traffic.take_episode(rated("e", -1.0, version=1))
    assert not traffic.take_episode(rated("e", -1.0, version=2))
    assert traffic.arms()[0].mean == 1.0
    assert traffic.take_episode(rated("e", -1.0, version=3))
    assert traffic.arms()[0].mean == 0.0


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 4), st.sampled_from([-1.0, 1.0, None]), st.sampled_from(ARMS)),
        max_size=60,
    )
)
def test_the_running_sums_are_those_of_the_newest_versions(told: list[tuple[int, int, float | None, str]]) -> None:
    """Versions in any order, ratings given, changed and taken back: as if only the newest had ever come."""
    traffic, newest = Traffic("r"), {}
    for number, version, value, arm_name in told:
        turn = Turn(call=call(f"c{number}", arm_name), feedback=() if value is None else (thumb(value),))
        if traffic.take_episode(episode(f"e{number}", turn, version=version, subject=f"p{number % 3}")):
            newest[number] = arm_name, value
    for name, summary in zip(ARMS, traffic.arms(), strict=True):
        people: dict[int, list[float]] = {}
        for number, (arm_name, value) in newest.items():
            if arm_name == name and value is not None:
                people.setdefault(number % 3, []).append((value + 1) / 2)
        expected = arm([sum(values) / len(values) for values in people.values()])
        assert (summary.units, summary.variance) == (expected.units, pytest.approx(expected.variance))
        assert summary.mean == pytest.approx(expected.mean, nan_ok=True)
        assert traffic.assigned()[name] == sum(arm_name == name for arm_name, _ in newest.values())


def test_only_this_release_s_traffic_counts() -> None:
    traffic = Traffic("r")
    other = episode("o", Turn(call=call("c1", release="other"), feedback=(thumb(1),)))
    live = episode("l", Turn(call=call("c2", arm="live", release="r"), feedback=(thumb(1),)))
    made_up = episode("s", Turn(call=call("c3"), feedback=(thumb(1),)), synthetic=True)
    assert not any(map(traffic.take_episode, (other, live, made_up)))
    mixed = episode(
        "m",
        Turn(call=call("before", release=None, arm="live"), feedback=(thumb(-1, "before"),)),
        Turn(call=call("after"), feedback=(thumb(1, "after"),)),
    )
    assert traffic.take_episode(mixed)
    assert traffic.arms()[0].mean == 1.0  # the thumb from before the canary is not its doing


def test_an_unrated_episode_is_assigned_but_no_unit() -> None:
    traffic = Traffic("r")
    traffic.take_episode(episode("e", Turn(call=call("c"))))
    assert traffic.assigned() == {"canary": 1, "control": 0}
    assert traffic.arms()[0].units == 0


def test_success_is_the_mean_of_thumbs_ratings_and_outcomes() -> None:
    outcome = Feedback(id="o", kind="outcome", value=0.5, time=1.0)
    words = Feedback(id="w", kind="comment", text="hm", time=1.0)
    assert success([thumb(1), outcome, words]) == 0.75
    assert success([words]) is None


@pytest.mark.parametrize(
    ("output", "empty"),
    [
        ({"content": "x"}, False),
        ({"content": " \n"}, True),
        ({"content": None}, True),
        ({"content": None, "tool_calls": [{"id": "1"}]}, False),
        ({"content": [{"type": "text", "text": "x"}]}, False),
        ({}, True),
    ],
)
def test_what_counts_as_empty(output: dict[str, Any], empty: bool) -> None:
    assert is_empty(output) is empty


TOOLS = ({"type": "function", "function": {"name": "route"}},)
BROKEN = {"id": "1", "type": "function", "function": {"name": "route", "arguments": '{"topic": '}}


def calls(traffic: Traffic, arm: str, good: int, **others: int) -> None:
    failed, empty, cancelled = (others.get(name, 0) for name in ("failed", "empty", "cancelled"))
    made: list[Call] = []
    for i in range(others.get("broken", 0)):
        output = Message(role="assistant", tool_calls=[BROKEN])
        made.append(call(f"{arm}b{i}", arm, tools=TOOLS, output=output, finish_reason="tool_calls"))
    for i in range(others.get("long", 0)):
        made.append(call(f"{arm}l{i}", arm, output=Message(role="assistant", content="card_arrival" * 5)))
    for i in range(others.get("away", 0)):
        made.append(call(f"{arm}a{i}", arm, error="no engine answers", error_code="engine_unavailable"))
    for i in range(good):
        made.append(call(f"{arm}g{i}", arm))
    for i in range(failed):
        made.append(call(f"{arm}f{i}", arm, error="the engine's numbers are not finite"))
    for i in range(empty):
        made.append(call(f"{arm}e{i}", arm, output=Message(role="assistant", content="")))
    for i in range(cancelled):
        made.append(call(f"{arm}x{i}", arm, error="client disconnected", finish_reason="cancelled"))
    for one in [*made, *made]:  # every record twice: it counts once
        traffic.take_call(one.model_dump(), unit=one.id, began=0.0)


@pytest.mark.parametrize(
    ("canary", "control", "breached"),
    [
        ({"good": 0, "failed": 5}, {"good": 5}, "calls failed"),
        ({"good": 100, "failed": 20}, {"good": 120}, "calls failed"),
        ({"good": 50, "empty": 30}, {"good": 80}, "answers were empty"),
        ({"good": 99, "failed": 1}, {"good": 100}, None),  # one failure is no evidence
        ({"good": 0, "failed": 20}, {"good": 0, "failed": 20}, None),  # the engine's trouble, not the adapter's
        ({"good": 60, "failed": 40}, {"good": 60, "failed": 40}, None),
        ({"good": 10, "cancelled": 50}, {"good": 10}, None),  # clients that leave are nobody's failure
        ({"good": 0}, {"good": 0}, None),
        ({"good": 200, "broken": 30}, {"good": 230}, "broken tool calls"),
        ({"good": 200, "broken": 30}, {"good": 200, "broken": 30}, None),
        ({"good": 60, "long": 60}, {"good": 120}, "times as long"),
        ({"good": 20, "away": 200}, {"good": 20}, None),  # no engine answered: no adapter did this
    ],
)
def test_guards_blame_the_adapter_alone(canary: dict[str, int], control: dict[str, int], breached: str | None) -> None:
    traffic = Traffic("r")
    calls(traffic, "canary", **canary)
    calls(traffic, "control", **control)
    found = traffic.breach(CONFIG)
    assert (found is None) == (breached is None)
    if breached is not None:
        assert breached in str(found)


def test_one_person_with_hard_questions_is_no_evidence_however_many_they_ask() -> None:
    traffic = Traffic("r")
    calls(traffic, "canary", 60)
    calls(traffic, "control", 60)
    for i in range(500):
        failing = call(f"loud{i}", error="the engine's numbers are not finite")
        traffic.take_call(failing.model_dump(), unit="loud", began=0.0)
    assert traffic.breach(CONFIG) is None


def test_a_unit_is_of_the_stage_that_it_came_in_whatever_comes_later() -> None:
    def talk(id: str, probability: float, arm: str, subject: str, value: float) -> Episode:
        turn = Turn(call=call(id, arm, probability=probability), feedback=(thumb(value),))
        return episode(f"e{id}", turn, subject=subject)

    told = [
        talk("1", 0.01, "canary", "ann", 1.0), talk("2", 0.05, "canary", "ann", -1.0),
        talk("3", 0.05, "canary", "bob", 1.0), talk("4", 0.05, "control", "cyd", 1.0),
    ]  # fmt: skip
    for order in (told, told[::-1]):
        traffic = Traffic("r", (0.01, 0.05))
        assert all(map(traffic.take_episode, order))
        (first, nobody), (second, other) = traffic.stages()
        assert (first.units, first.mean, nobody.units) == (1, 0.5, 0)
        assert (second.units, second.mean, other.units) == (1, 1.0, 1)
        assert [traffic.came(stage) for stage in (0, 1)] == [(1, 0), (1, 1)]
        assert traffic.numbers()["stages"][0]["canary"] == {"came": 1, "units": 1, "mean": 0.5}


@pytest.mark.parametrize(
    ("output", "broken"),
    [
        ({"content": "hello"}, False),
        ({"tool_calls": [{"function": {"name": "route", "arguments": '{"topic": "card"}'}}]}, False),
        ({"tool_calls": [{"function": {"name": "route", "arguments": ""}}]}, False),
        ({"tool_calls": [{"function": {"name": "route", "arguments": "[1]"}}]}, True),
        ({"tool_calls": [{"function": {"name": "rout", "arguments": "{}"}}]}, True),
        ({"tool_calls": [BROKEN]}, True),
        ({"content": '<tool_call>{"name": "route", '}, True),
    ],
)
def test_what_counts_as_a_broken_tool_call(output: dict[str, Any], broken: bool) -> None:
    assert is_broken(output, TOOLS) is broken


def test_answers_of_what_is_live_in_the_adapter_s_place_are_told_apart() -> None:
    traffic = Traffic("r", adapter="a1")
    assert traffic.reached() == 1.0
    for i, version in enumerate(["a1", "a1", "a1", "base"]):
        traffic.take_call(call(f"c{i}", policy_version=version).model_dump(), unit=f"p{i}", began=0.0)
    traffic.take_call(call("failed", policy_version="base", error="the engine broke").model_dump(), unit="q", began=0.0)
    traffic.take_call(call("control", "control", policy_version="base").model_dump(), unit="r", began=0.0)
    assert traffic.reached() == 0.75


def lost(traffic: Traffic, arm: str, name: str, began: float, latency: float = 1.0) -> None:
    """An answer that ended with its engine."""
    broken = call(f"{arm}-{name}", arm, error="it ended", error_code=LOST, finish_reason="error", latency=latency)
    for _ in range(2):
        traffic.take_call(broken.model_dump(), unit=name, began=began)


def test_the_end_of_an_engine_is_no_failure_of_the_adapter_however_many_answers_it_broke_off() -> None:
    traffic = Traffic("r", adapter="a")
    calls(traffic, "control", 30)
    for i in range(40):
        lost(traffic, "canary", f"p{i}", began=1000.0 - i, latency=float(i))  # all at the same time
    assert traffic.breach(CanaryConfig()) is None
    assert traffic.numbers()["canary"]["calls"] == traffic.numbers()["canary"]["failed"] == 0
    assert traffic.numbers()["engines_ended"] == {"canary": 1, "control": 0}


def test_an_adapter_under_which_engines_end_again_and_again_is_blamed() -> None:
    traffic = Traffic("r", adapter="a")
    for i in range(8):
        lost(traffic, "canary", f"p{i}", began=60.0 * i)
    assert traffic.breach(CanaryConfig()) is None
    lost(traffic, "canary", "p9", began=60.0 * 9)
    assert "9 times engines ended under calls of the canary alone" in (traffic.breach(CanaryConfig()) or "")
    for i in range(8):
        lost(traffic, "control", f"q{i}", began=60.0 * i + 5)  # read later, though it was then
    assert traffic.breach(CanaryConfig()) is None
    assert traffic.numbers()["engines_ended"] == {"canary": 1, "control": 0}


def test_what_a_provider_answered_in_an_engines_place_says_nothing_of_the_adapter() -> None:
    traffic = Traffic("r", adapter="a")
    stand_in = {"policy_version": "provider", "instead_of": "a"}
    for at in range(6):
        assert traffic.take_call(call(f"own{at}", policy_version="a").model_dump(), f"u{at}", 0.0)
    assert traffic.reached() == 1.0
    said = Message(role="assistant", content="")  # empty: a guard would see it
    for at in range(4):
        assert not traffic.take_call(call(f"other{at}", output=said, **stand_in).model_dump(), f"v{at}", 0.0)
    assert traffic.reached() == pytest.approx(0.6), "it is not promoted on what others answered"
    numbers = traffic.numbers()
    assert (numbers["canary"]["calls"], numbers["canary"]["empty"], numbers["stood_in"]) == (6, 0, 4)
    assert not traffic.take_call(call("other0", output=said, **stand_in).model_dump(), "v0", 0.0), "counted once"
    assert traffic.reached() == pytest.approx(0.6)

    bad, good = (Turn(call=call("c1", **stand_in), feedback=(thumb(v),)) for v in (-1.0, 1.0))
    own = Turn(call=call("c2", policy_version="a"), feedback=(thumb(1.0),))
    traffic.take_episode(episode("all theirs", bad))
    traffic.take_episode(episode("mixed", good, own))
    assert traffic.arms()[0].units == 0, "neither for nor against it"
    assert traffic.came(0) == (2, 0), "they came all the same"
    traffic.take_episode(episode("its own", own))
    assert (traffic.arms()[0].units, traffic.arms()[0].mean) == (1, 1.0)


def test_an_incumbent_providers_answers_are_the_control() -> None:
    traffic = Traffic("r", adapter="a")
    answer = call("c", "control", policy_version="provider")
    assert traffic.take_call(answer.model_dump(), "u", 0.0)
    traffic.take_episode(episode("e", Turn(call=answer, feedback=(thumb(1.0),))))
    assert (traffic.arms()[1].units, traffic.numbers()["control"]["calls"]) == (1, 1)
    assert not traffic.take_call(
        call("d", "control", policy_version="provider", error="away", error_code="provider_unavailable").model_dump(),
        "u",
        0.0,
    )
