"""The releaser on a real log with a small engine: gates, canaries, orders, restarts. The files process is left out."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from typing import Any

import pytest
from everloop.errors import RegistryError
from everloop.log.sqlite import retention
from everloop.release import Release, ReleaseState, Route
from everloop.run import Command, CommandKind
from everloop.topics import COMMANDS, EPISODES, EVENTS, PAUSES, RELEASES, ROUTES

from services.releaser.porter import Porter

CANARY = {"share": 0.5, "margin": 0.15, "alpha": 0.1, "min_units": 20}


Until = Callable[..., Any]
Start = Callable[[Any], Any]
MakeWorld = Callable[..., Any]


def test_a_better_adapter_goes_live_by_gate_and_canary(world: MakeWorld, start: Start, until: Until) -> None:
    w = world(canary=CANARY)
    w.gold()
    running = start(w)
    w.announce("a", skill=0.8)
    until(lambda: w.state("a") == "canary")
    route = w.route()
    assert (route.live, route.canary, route.share) == ("base", "a", 0.5)
    assert "a" in w.engine.adapters
    assert w.engine.adapters["a"] <= route.time  # resident before any route names it
    w.traffic(400, {"canary": 0.7, "control": 0.6})
    until(lambda: w.state("a") == "live")
    assert w.live() == "a"
    released = w.newest("a")
    assert "not inferior" in released.reason
    assert released.evidence["gate"]["gold"]["gain"] > 0.5
    assert released.evidence["canary"]["canary"]["units"] > 20
    assert released.evidence["gate"]["kl"]["mean"] == pytest.approx(0.3)
    assert released.plan.margin == 0.15
    until(lambda: running.policy().get("live", {}).get("adapter") == "a")


def test_the_canary_alone_takes_back_what_the_gate_let_through(world: MakeWorld, start: Start, until: Until) -> None:
    """Right on every gold question, and harmful to people: only they can tell."""
    w = world(canary=CANARY)
    w.gold()
    start(w)
    w.announce("good", skill=0.7)
    until(lambda: w.state("good") == "canary")
    w.traffic(400, {"canary": 0.65, "control": 0.6})
    until(lambda: w.state("good") == "live")
    w.announce("harmful", skill=1.0)
    until(lambda: w.state("harmful") == "canary")
    assert w.newest("harmful").evidence["gate"]["gold"]["passed"]
    w.traffic(400, {"canary": 0.3, "control": 0.65}, first=1000)
    until(lambda: w.state("harmful") == "rolled_back")
    assert "worse" in w.newest("harmful").reason
    assert w.newest("harmful").evidence["canary"]["high"] < 0
    route = w.route()
    assert (route.live, route.canary, route.release) == ("good", None, None)


def test_a_worse_adapter_is_rejected_by_the_gate(world: MakeWorld, start: Start, until: Until) -> None:
    w = world()
    w.gold()
    w.engine.right["tiny-k2"] = lambda question: question.split()[-1]
    start(w)
    w.announce("a", skill=0.5)
    until(lambda: w.state("a") == "rejected")
    assert "gold" in w.newest("a").reason
    assert w.route() is None


def test_failures_end_a_canary_at_once(world: MakeWorld, start: Start, until: Until) -> None:
    w = world(canary=CANARY)
    w.gold()
    start(w)
    w.announce("a")
    until(lambda: w.state("a") == "canary")
    w.traffic(16, {}, error="the engine's numbers are not finite")
    until(lambda: w.state("a") == "rolled_back")
    assert "guard" in w.newest("a").reason
    assert w.route().canary is None


def test_the_share_grows_stage_by_stage_and_a_restart_goes_on_in_its_stage(
    world: MakeWorld, start: Start, until: Until
) -> None:
    stages = {"stages": [0.1, 0.5], "stage_units": 10, "stage_duration": "1s"}
    w = world(canary={**{key: value for key, value in CANARY.items() if key != "share"}, **stages})
    w.gold()
    running = start(w)
    w.announce("a")
    until(lambda: w.state("a") == "canary")
    assert w.route().share == 0.1
    w.traffic(60, {"canary": 0.6, "control": 0.6})
    until(lambda: "of 10 people" in str((running.policy().get("in_progress") or {}).get("waits")))
    w.traffic(200, {"canary": 0.6, "control": 0.6}, first=100)
    until(lambda: w.route().share == 0.5)
    assert "Stage 2 of 2, 50% of traffic: guards are quiet and no harm is shown" in w.newest("a").reason
    running.end()
    running = start(w)
    until(lambda: (running.policy().get("in_progress") or {}).get("stage") == 1)
    w.traffic(600, {"canary": 0.7, "control": 0.6}, first=300)
    until(lambda: w.state("a") == "live")
    first, second = w.newest("a").evidence["canary"]["stages"]
    assert (first["share"], second["share"]) == (0.1, 0.5)
    assert first["canary"]["came"] >= 10
    assert second["control"]["units"] > 100


def test_an_undecided_canary_leaves_the_incumbent(world: MakeWorld, start: Start, until: Until) -> None:
    w = world(canary={**CANARY, "margin": 0.01, "max_episodes": 100})
    w.gold()
    start(w)
    w.announce("a")
    until(lambda: w.state("a") == "canary")
    w.traffic(150, {"canary": 0.6, "control": 0.6})
    until(lambda: w.state("a") == "rolled_back")
    assert "undecided after its 100 episodes, so the incumbent stays" in w.newest("a").reason
    assert w.live() == "base"


def test_too_few_gold_items_wait_for_a_person(world: MakeWorld, start: Start, until: Until) -> None:
    w = world()
    w.gold(20)
    running = start(w)
    w.announce("a")
    waits = until(lambda: (running.policy().get("waiting") or [{}])[0].get("waits") or "")
    until(lambda: "Waits for a person" in running.policy()["waiting"][0]["waits"])
    assert "20 gold items, 50 are needed" in running.policy()["waiting"][0]["waits"], waits
    assert w.state("a") == "candidate"
    assert running.policy()["gold"] == {"items": 20, "needed": 50, "enough": False}
    command = w.order(CommandKind.PROMOTE, reason="I looked at it", without_evidence=True)
    until(lambda: w.state("a") == "live")
    assert [r.state for r in w.releases()] == ["candidate", "gated", "canary", "live"]
    assert w.newest("a").reason == ("Promoted without evidence (no gate verdict, no canary) by ann: I looked at it.")
    until(lambda: running.answer(command).get("done"))


def test_an_order_without_evidence_is_answered_before_anything_is_loaded(
    world: MakeWorld, start: Start, until: Until
) -> None:
    w = world()
    running = start(w)
    w.announce("a")
    order = w.order(CommandKind.PROMOTE, release="a")
    said = until(lambda: running.answer(order), 30)
    assert not said["done"]
    assert "no gate verdict and no canary" in said["says"]
    assert w.state("a") == "candidate"
    assert running.policy()["live"]["lacks"] == []
    w.order(CommandKind.PROMOTE, release="a", without_evidence=True, reason="I looked at it")
    until(lambda: w.live() == "a", 30)
    until(lambda: running.policy()["live"]["lacks"] == ["no gate verdict", "no canary"], 30)


def test_more_gold_lets_a_waiting_candidate_go_on(world: MakeWorld, start: Start, until: Until) -> None:
    w = world()
    w.gold(20)
    running = start(w)
    w.announce("a")
    until(lambda: "Waits" in str(running.policy().get("waiting")))
    w.gold(200)
    until(lambda: w.state("a") == "canary")


def test_a_rollback_does_not_wait_for_an_examination(world: MakeWorld, start: Start, until: Until) -> None:
    w = world()
    start(w)
    w.announce("a")
    w.order(CommandKind.PROMOTE, release="a", without_evidence=True)
    until(lambda: w.live() == "a")
    w.gold()
    w.engine.delay = 2.0
    asked = w.engine.asked
    w.announce("b")
    until(lambda: w.engine.asked > asked)
    w.order(CommandKind.ROLLBACK)
    until(lambda: w.live() == "base")
    assert w.state("a") == "rolled_back"
    assert w.state("b") == "candidate"


def test_orders_that_cannot_be_are_answered_in_words(world: MakeWorld, start: Start, until: Until) -> None:
    w = world()
    running = start(w)
    nothing = w.order(CommandKind.ROLLBACK)
    unknown = w.order(CommandKind.VETO, release="zzz")
    until(lambda: running.answer(nothing) and running.answer(unknown))
    assert "base model" in running.answer(nothing)["says"]
    assert "no release named 'zzz'" in running.answer(unknown)["says"]
    assert not running.answer(nothing)["done"]
    assert w.releases() == []


def test_a_pause_holds_canaries_back_and_survives_a_restart(world: MakeWorld, start: Start, until: Until) -> None:
    w = world()
    w.gold()
    w.order(CommandKind.PAUSE)
    running = start(w)
    w.announce("a")
    until(lambda: w.state("a") == "candidate")
    until(lambda: running.policy().get("paused"))
    running.end()
    second = start(w)
    until(lambda: second.policy().get("paused"))
    assert w.state("a") == "candidate"
    w.order(CommandKind.RESUME)
    until(lambda: w.state("a") == "canary")


def test_an_engine_that_comes_back_gets_its_adapters_again(world: MakeWorld, start: Start, until: Until) -> None:
    w = world()
    running = start(w)
    for name in ("a", "b"):
        w.announce(name)
        w.order(CommandKind.PROMOTE, release=name, without_evidence=True)
        until(lambda name=name: w.live() == name)
    w.engine.stop()
    until(lambda: running.examiner.residents.trouble is not None)
    w.engine.start()
    until(lambda: set(w.engine.adapters) == {"a", "b"})  # what is live, and the way back
    assert w.state("b") == "live"


def test_a_full_engine_drops_adapters_of_ended_releases(world: MakeWorld, start: Start, until: Until) -> None:
    w = world()
    start(w)
    w.engine.adapters["somebody else's"] = 0.0
    for name in "abcdefgh":
        w.announce(name)
        w.order(CommandKind.PROMOTE, release=name, without_evidence=True)
        until(lambda name=name: w.live() == name)
    assert {"g", "h", "somebody else's"} <= set(w.engine.adapters)
    assert len(w.engine.adapters) <= w.config.serving.resident_adapters


def test_a_registry_that_is_down_makes_candidates_wait(
    world: MakeWorld, start: Start, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world()
    down = [True]

    async def ask(self: Porter, do: str, **arguments: Any) -> None:
        if down[0]:
            raise RegistryError("the registry at http://127.0.0.1:9 does not answer")

    monkeypatch.setattr(Porter, "ask", ask)
    monkeypatch.setattr("services.releaser.releaser.LATER", 0.2)
    running = start(w)
    w.gold()
    w.announce("a")
    until(lambda: "does not answer" in str(running.policy().get("waiting")))
    assert w.state("a") == "candidate"
    down[0] = False
    until(lambda: w.state("a") == "canary")


def test_an_order_that_is_read_twice_is_done_once(world: MakeWorld, start: Start, until: Until) -> None:
    w = world()
    running = start(w)
    for name in ("a", "b"):
        w.announce(name)
        w.order(CommandKind.PROMOTE, release=name, without_evidence=True)
        until(lambda name=name: w.live() == name)
    command = w.order(CommandKind.ROLLBACK)
    until(lambda: w.live() == "a")
    w.append(COMMANDS, command)
    until(lambda: running.answer(command).get("says") == "done before")
    assert w.live() == "a"


def test_a_person_promotes_where_the_canary_may_not(world: MakeWorld, start: Start, until: Until) -> None:
    w = world(canary={**CANARY, "automatic": False})
    w.gold()
    running = start(w)
    w.announce("a")
    until(lambda: w.state("a") == "canary")
    w.traffic(400, {"canary": 0.8, "control": 0.6})
    until(lambda: "Waits for a person" in str((running.policy().get("in_progress") or {}).get("waits")))
    assert w.state("a") == "canary"
    progress = running.policy()["in_progress"]
    assert progress["interval"]["low"] > -0.15
    assert "rated units in the smaller arm" in progress["decides"]
    w.order(CommandKind.PROMOTE)
    until(lambda: w.state("a") == "live")
    assert w.newest("a").reason == "Promoted by ann."
    assert w.newest("a").evidence["canary"]["low"] > -0.15  # what the person saw is kept


def test_the_registry_s_alias_follows_what_is_live(
    world: MakeWorld, start: Start, until: Until, brought: list[dict[str, Any]]
) -> None:
    w = world()
    running = start(w)
    running.releaser.aliases._begins = running.releaser.aliases._mirror_at = 0.0
    adapter = w.announce("a")
    w.order(CommandKind.PROMOTE, release="a", without_evidence=True)
    until(lambda: {"do": "mirror", "tenant": "default", "policy": "assistant", "uri": adapter.uri} in brought)
    w.order(CommandKind.ROLLBACK)
    until(lambda: {"do": "mirror", "tenant": "default", "policy": "assistant", "uri": None} in brought)


def test_what_stands_outlives_the_log_s_retention(world: MakeWorld, start: Start, until: Until) -> None:
    """The live release, a pause, and that an adapter was rejected: all else in their topics was cut long ago."""
    w = world()
    live = Release(id="rel_live", tenant="default", policy="assistant", adapter="a", uri="u", time=1.0)
    for state in ("gated", "canary", "live"):
        w.append(RELEASES, live)
        live = live.to(ReleaseState(state), "Long ago.", 2.0)
    w.append(RELEASES, live)
    w.home.folder("adapters", "a")
    w.order(CommandKind.PAUSE)
    busy = Release(id="rel_busy", tenant="default", policy="other", adapter="b", uri="u", time=1.0)
    other = Command(id="c", kind=CommandKind.RESUME, tenant="default", policy="other", time=1.0)
    for _ in range(600):  # more than a block of the log, which goes as a whole
        w.append(RELEASES, busy)
        w.append(PAUSES, other)
    cut_all(w)
    assert len(w.releases()) < 300
    assert [r.state for r in w.releases() if r.id == "rel_live"] == ["live"]
    running = start(w)
    until(lambda: running.policy().get("paused"))
    assert running.policy()["live"]["adapter"] == "a"
    assert w.live() == "a"


def cut_all(w: Any) -> None:
    """What the log's retention does once everything in it is old."""
    connection = sqlite3.connect(w.home.root / "log.db")
    with connection:
        while retention.clean(connection, time.time() + 60.0):
            pass
    connection.close()


def test_a_verdict_waits_for_all_that_the_log_has(world: MakeWorld, start: Start, until: Until) -> None:
    """A releaser that was away finds a canary past its time, with evidence that it has not read: it reads first."""
    w = world(canary={**CANARY, "max_duration": "1s"})
    begins = {t.name: {str(p): 0 for p in range(w.log.partitions(t.name))} for t in (EVENTS, EPISODES)}
    release = Release(id="rel_c", tenant="default", policy="assistant", adapter="a", uri="u", time=1.0)
    canary = release.model_copy(
        update={"state": ReleaseState.CANARY, "plan": w.config.policy("default", "assistant").canary.plan(),
                "evidence": {"begins": begins}}
    )  # fmt: skip
    w.append(RELEASES, canary)
    w.append(ROUTES, Route(tenant="default", policy="assistant", epoch=1, release="rel_c", canary="a", share=0.5,
                           uris={"a": "u"}, time=1.0))  # fmt: skip
    w.traffic(3000, {"canary": 0.2, "control": 0.7})
    start(w)
    until(lambda: w.state("a") == "rolled_back", 30)
    assert "worse, the upper bound" in w.newest("a").reason
    assert w.newest("a").evidence["canary"]["canary"]["episodes"] > 1400


def test_what_passed_is_examined_again_where_something_else_went_live(
    world: MakeWorld, start: Start, until: Until
) -> None:
    w = world()
    first = start(w)
    w.announce("b", skill=1.0)
    w.order(CommandKind.PROMOTE, release="b", without_evidence=True)
    until(lambda: w.live() == "b")
    first.end()
    w.gold()
    w.knows("a", 0.5)
    w.home.folder("adapters", "a")
    passed = Release(id="rel_p", tenant="default", policy="assistant", adapter="a", uri="u", time=1.0)
    w.append(RELEASES, passed, passed.to(ReleaseState.GATED, "Passed: better than the base model.", 2.0))
    start(w)
    until(lambda: w.state("a") == "rejected")
    assert w.newest("a").evidence["gate"]["against"] == "b"
    assert w.live() == "b"


def test_a_candidate_is_compared_with_what_is_live_when_it_is_decided(
    world: MakeWorld, start: Start, until: Until
) -> None:
    w = world()
    start(w)
    w.announce("good", skill=1.0)
    w.order(CommandKind.PROMOTE, release="good", without_evidence=True)
    until(lambda: w.live() == "good")
    w.gold()
    w.engine.delay, asked = 0.3, w.engine.asked
    w.announce("middling", skill=0.5)
    until(lambda: w.engine.asked > asked)
    w.order(CommandKind.ROLLBACK)  # while it is compared with what goes now
    until(lambda: w.state("middling") == "canary", 30)
    assert w.newest("middling").evidence["gate"]["against"] == "base"


def test_a_freeze_holds_everything_but_rollbacks_and_survives_a_restart(
    world: MakeWorld, start: Start, until: Until
) -> None:
    w = world(canary=CANARY)
    w.gold()
    running = start(w)
    w.announce("a")
    until(lambda: w.state("a") == "canary")
    w.order(CommandKind.FREEZE, reason="holidays")
    until(lambda: "Frozen by ann: holidays" in str((running.policy() or {}).get("frozen")))
    w.order(CommandKind.PAUSE)
    w.order(CommandKind.RESUME)  # another order, which ends no freeze
    w.traffic(400, {"canary": 0.8, "control": 0.6})
    until(lambda: "Frozen by ann" in str((running.policy().get("in_progress") or {}).get("waits")))
    refused = w.order(CommandKind.PROMOTE, without_evidence=True, reason="now")
    until(lambda: running.answer(refused))
    assert "nothing is promoted: Frozen by ann: holidays" in running.answer(refused)["says"]
    running.end()
    running = start(w)
    until(lambda: "Frozen by ann" in str((running.policy().get("in_progress") or {}).get("waits")))
    w.order(CommandKind.ROLLBACK)
    until(lambda: w.state("a") == "rolled_back")
    w.announce("b")
    until(lambda: w.state("b") == "gated")
    until(lambda: "Frozen by ann" in str((running.policy().get("in_progress") or {}).get("waits")))
    w.order(CommandKind.UNFREEZE, reason="back")
    until(lambda: w.state("b") == "canary")
    assert running.policy()["frozen"] is None
