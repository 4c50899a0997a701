"""The shadow: what a candidate says to recent prompts beside what was said then; and what is foretold of a canary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from everloop.config import CanaryConfig
from everloop.episode import Episode, Turn
from everloop.errors import ServingError
from everloop.event import Call, Message
from everloop.feedback import Feedback
from everloop.release import CanaryPlan, Release

from services.gateway.replicas import Replicas
from services.releaser.examiner import Examiner
from services.releaser.power import Rates, forecast, seconds_until, told
from services.releaser.recent import summed
from services.releaser.residents import ENDS
from services.releaser.shadow import Shadow, judged
from services.releaser.traffic import AWAY

CONFIG = CanaryConfig()
TOOLS = ({"type": "function", "function": {"name": "route"}},)
NOTHING_WRONG = dict.fromkeys(("failed", "empty", "broken", "refusing", "asking_back"), 0)
BROKEN = {"tool_calls": [{"function": {"name": "route", "arguments": "{"}}]}


def asked(text: str = "card_arrival", **fields: Any) -> Call:
    output = Message(role="assistant", content=text)
    return Call(id="c", messages=(Message(role="user", content="hi"),), output=output, **fields)


def beside(answer: dict[str, Any] | None, call: Call, count: int) -> Shadow:
    return judged([(call, answer)] * count, CONFIG)


@pytest.mark.parametrize(
    ("answer", "call", "breach"),
    [
        ({"content": "card_lost"}, asked(), None),
        (None, asked(), "40 of 40 calls failed on recent prompts (0 when they were asked)"),
        ({"content": " "}, asked(), "40 of 40 answers were empty"),
        ({"content": " "}, asked(""), None),  # nobody could answer these
        (BROKEN, asked(tools=TOOLS), "40 of 40 answers had broken tool calls"),
        ({"content": "I'm sorry"}, asked("It is here"), "40 of 40 answers declined on recent prompts (0 when they"),
        ({"content": "Which do you mean?"}, asked("It is on its way"), "40 of 40 answers asked what was meant"),
        ({"content": "Which do you mean?"}, asked("Could you clarify?"), None),  # it was not plain to anybody
        ({"content": "card_arrival" * 2}, asked(), "1.9 times as long"),
    ],
)
def test_what_no_user_should_see(answer: dict[str, Any] | None, call: Call, breach: str | None) -> None:
    found = beside(answer, call, 40).breach
    assert (found is None) == (breach is None)
    assert breach is None or breach in str(found)


def test_a_few_prompts_are_no_evidence() -> None:
    assert beside(None, asked(), 6).breach is None
    assert beside(None, asked(), 7).breach is not None
    assert judged([], CONFIG) == Shadow(0, None, NOTHING_WRONG)


def days(people: int, episodes: int, length: float = 10.0) -> list[Episode]:
    """As many new people each day, who come so often, and all rate."""
    made = []
    for i in range(round(people * length)):
        for j in range(episodes):
            thumb = Feedback(id=f"f{i}-{j}", kind="thumb", value=1 if (i + j) % 3 else -1, time=1.0)
            at = i * 86_400 / people
            turn = Turn(call=asked())
            made.append(Episode(
                tenant="t", policy="p", id=f"e{i}-{j}", version=1, subject=f"s{i}", started=at, updated=at,
                turns=(turn,), feedback=(thumb,),
            ))  # fmt: skip
    return made


def test_the_forecast_is_of_the_test_in_use_at_this_traffic() -> None:
    lately = summed(days(200, 2), 10 * 86_400)
    plan = CanaryPlan(share=0.25)
    its = forecast(plan, lately)
    assert its["rated_units_a_day"] == pytest.approx(200, rel=0.01)
    units = its["margin"]["units"]
    assert its["margin"]["episodes"] == 2 * units
    assert its["margin"]["seconds"] == pytest.approx(units / 50 * 86_400, rel=0.01)
    assert its["small"]["units"] > 4 * units
    words = told(plan, its)
    assert f"no more than 5 points are lost takes about {units:,} rated people ({2 * units:,} rated episodes)" in words
    assert "days at your traffic, longer than the 7.0 days that it may take" in words
    assert "a 2-point drop takes about" in words
    staged = plan.model_copy(update={"stages": (0.01, 0.05, 0.25)})
    assert forecast(staged, lately)["margin"]["seconds"] > its["margin"]["seconds"] + 86_400
    assert seconds_until(staged, Rates(1.0, 1.0), units, have=units, stage=2) == 0


def test_where_nobody_rates_nothing_is_promised() -> None:
    its = forecast(CanaryPlan(), summed([], 100.0))
    assert its["margin"]["seconds"] is None
    assert "nobody knows how long" in told(CanaryPlan(), its)


def test_people_who_come_back_are_no_new_units() -> None:
    early = days(100, 1, length=2)
    again = [one.model_copy(update={"id": f"{one.id}x", "started": one.started + 8 * 86_400}) for one in early]
    assert summed([*early, *again], 10 * 86_400).rated_rate == 0


def test_a_candidate_that_says_nothing_is_stopped_before_any_user_sees_it(
    world: Callable[..., Any], start: Callable[[Any], Any], until: Callable[..., Any]
) -> None:
    w = world(canary={"share": 0.5, "margin": 0.15, "alpha": 0.1, "min_units": 20})
    w.gold()
    running = start(w)
    w.announce("a", skill=0.6)
    until(lambda: w.state("a") == "canary")
    assert "nobody knows how long" in w.newest("a").reason
    w.traffic(400, {"canary": 0.7, "control": 0.6})
    until(lambda: w.state("a") == "live")
    right = w.engine.right["a"]
    w.announce("silent", skill=1.0)
    knows = w.engine.right["silent"]
    w.engine.right["silent"] = lambda asked: knows(asked) if asked.startswith("question") else ""
    until(lambda: w.state("silent") == "rejected")
    assert "Rejected before any user saw it: 40 of 40 answers were empty" in w.newest("silent").reason
    assert w.newest("silent").evidence["shadow"]["empty"] == 40
    w.announce("good", skill=1.0)
    until(lambda: w.state("good") == "canary")
    assert "no more than 15 points are lost takes about" in w.newest("good").reason
    assert w.newest("good").evidence["shadow"] == {"prompts": 40, **NOTHING_WRONG}
    assert w.newest("good").evidence["power"]["margin"]["units"] > 20
    assert right("hi") == "card"
    assert running.policy()["live"]["adapter"] == "a"


def test_a_candidate_whose_questions_end_engines_again_and_again_is_stopped(
    world: Callable[..., Any], brought: list[Any]
) -> None:
    w = world()
    w.home.folder("adapters", "a")
    w.engine.ends_under = "a"
    examiner = Examiner(w.config, Replicas(w.config.serving.urls))
    examiner.start()
    release = Release(id="r", tenant="default", policy="assistant", adapter="a", uri="", time=1.0)
    lately = summed(days(30, 1), 10 * 86_400)
    for _ in range(ENDS):
        with pytest.raises(ServingError) as raised:
            examiner.ready(release, lambda: lately).result(30)
        assert raised.value.code in AWAY
        w.engine.stop()
        w.engine.start()
    ready = examiner.ready(release, lambda: lately).result(30)
    assert ready.shadow.breach == "engines ended while it answered, 3 times"
    assert examiner.examine(release).result(30).verdict == "fail"
    examiner.close()
