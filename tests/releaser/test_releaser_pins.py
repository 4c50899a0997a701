"""Adapters that are asked for by name: loaded beside what users are answered by, never in its place."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from everloop.config import Config
from everloop.errors import AdapterRefused, RegistryError
from everloop.names import Checkpoint, Checkpoints, Pin, PinState
from everloop.run import CommandKind
from everloop.topics import CHECKPOINTS, PINS

from services.releaser.porter import Porter

Start = Callable[[Any], Any]
Until = Callable[..., Any]


def ask(world: Any, adapter: str, id: str = "", **fields: Any) -> str:
    its = {"tenant": "default", "policy": "assistant", "time": time.time(), **fields}
    pin = Pin(id=id or f"pin-{adapter}-{time.monotonic_ns()}", adapter=adapter, **its)
    world.append(PINS, pin)
    return pin.id


def answers(world: Any, id: str) -> list[Pin]:
    return [pin for pin in world.read(PINS, Pin) if pin.id == id and pin.state is not PinState.ASKED]


def answer(world: Any, until: Until, id: str) -> tuple[str, str]:
    (pin,) = until(lambda: answers(world, id))
    return pin.state.value, pin.reason


def places(world: Any, count: int, keep: str = "10m") -> None:
    fields = {**world.fields, "serving": {**world.fields["serving"], "resident_adapters": count, "keep_pinned": keep}}
    world.config = Config.model_validate(fields)


def paused(world: Any, start: Start, until: Until) -> Any:
    """A releaser that examines no candidates."""
    running = start(world)
    order = world.order(CommandKind.PAUSE)
    until(lambda: running.answer(order))
    return running


def promoted(world: Any, until: Until, *names: str) -> None:
    """Each of these goes live in turn, on a person's word."""
    for name in names:
        world.announce(name, files=False)
        until(lambda name=name: world.state(name) == "candidate")
        world.order(CommandKind.PROMOTE, release=name, reason="for this test", without_evidence=True)
        until(lambda name=name: world.live() == name)


@pytest.fixture
def files(world: Callable[..., Any], home: Any, brought: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``bring`` does to each adapter: nothing, or it raises what is set here."""
    refuses: dict[str, Exception] = {}

    async def asked(self: Porter, do: str, **arguments: Any) -> None:
        brought.append({"do": do, **arguments})
        if arguments.get("adapter") in refuses:
            raise refuses[arguments["adapter"]]
        if do == "bring":
            home.folder("adapters", arguments["adapter"])

    monkeypatch.setattr(Porter, "ask", asked)
    return refuses


def test_an_adapter_is_checked_and_loaded_before_any_gate(
    world: Any, start: Start, until: Until, files: Any, brought: list[dict[str, Any]]
) -> None:
    here = world()
    running = paused(here, start, until)
    here.announce("aaaa", files=False)
    until(lambda: here.state("aaaa") == "candidate")
    asked = ask(here, "aaaa")
    assert answer(here, until, asked) == ("held", "")
    assert [one["adapter"] for one in brought if one["do"] == "bring"] == ["aaaa"]
    assert "aaaa" in here.engine.adapters
    assert here.state("aaaa") == "candidate"
    assert here.live() == "base"
    until(lambda: running.policy().get("pinned"))
    (shown,) = running.policy()["pinned"]
    assert (shown["adapter"], shown["until"] > time.time() + 500) == ("aaaa", True)
    assert answer(here, until, ask(here, "aaaa")) == ("held", "")
    assert len([one for one in brought if one["do"] == "bring"]) == 1, "what is held is not fetched again"


def test_what_is_pinned_comes_back_to_an_engine_that_was_restarted(
    world: Any, start: Start, until: Until, files: Any
) -> None:
    here = world()
    start(here)
    here.announce("aaaa", files=False)
    assert answer(here, until, ask(here, "aaaa")) == ("held", "")
    here.engine.stop()
    here.engine.start()
    until(lambda: "aaaa" in here.engine.adapters)


def test_a_checkpoint_is_fetched_from_its_run(
    world: Any, start: Start, until: Until, files: Any, brought: list[dict[str, Any]]
) -> None:
    here = world()
    start(here)
    kept = (Checkpoint(step=10, adapter="cccc"),)
    its = {"tenant": "default", "policy": "assistant", "time": 1.0}
    here.append(CHECKPOINTS, Checkpoints(run="run_1", kept=kept, **its))
    assert answer(here, until, ask(here, "cccc")) == ("held", "")
    (bring,) = [one for one in brought if one["do"] == "bring"]
    assert (bring["adapter"], bring["uri"]) == ("cccc", "everloop://run_1/checkpoints/10")
    assert here.releases() == [], "it is no candidate"


def test_what_is_nobodys_or_anothers_is_refused(world: Any, start: Start, until: Until, files: Any) -> None:
    here = world()
    start(here)
    here.announce("aaaa", files=False)
    for id in (ask(here, "0000"), ask(here, "aaaa", policy="other"), ask(here, "aaaa", tenant="other")):
        state, reason = answer(here, until, id)
        assert state == "refused"
        assert "no such adapter" in reason


def test_bad_files_are_refused_and_a_registry_that_is_away_is_not_their_fault(
    world: Any, start: Start, until: Until, files: Any
) -> None:
    here = world()
    start(here)
    for name in ("aaaa", "bbbb"):
        here.announce(name, files=False)
    files |= {"aaaa": AdapterRefused("holds NaN"), "bbbb": RegistryError("nobody answers")}
    assert answer(here, until, ask(here, "aaaa")) == ("refused", "holds NaN")
    assert answer(here, until, ask(here, "bbbb")) == ("failed", "nobody answers")
    assert here.engine.adapters == {}
    del files["bbbb"]
    assert answer(here, until, ask(here, "bbbb")) == ("held", "")


def test_what_answers_users_keeps_its_place_and_the_pin_used_longest_ago_gives_way(
    world: Any, start: Start, until: Until, files: Any
) -> None:
    here = world()
    places(here, 3)
    paused(here, start, until)
    promoted(here, until, "live")
    for name in ("p1", "p2", "p3"):
        here.announce(name, files=False)
    until(lambda: here.state("p3") == "candidate")
    assert [answer(here, until, ask(here, name)) for name in ("p1", "p2", "p1")] == [("held", "")] * 3
    assert set(here.engine.adapters) == {"live", "p1", "p2"}
    assert answer(here, until, ask(here, "p3")) == ("held", "")
    assert set(here.engine.adapters) == {"live", "p1", "p3"}, "p1 was asked for after p2"
    promoted(here, until, "next")  # and its way back: only one place is left
    until(lambda: {"live", "next"} <= set(here.engine.adapters))
    assert set(here.engine.adapters) == {"live", "next", "p3"}


def test_without_a_place_a_pin_is_told_so(world: Any, start: Start, until: Until, files: Any) -> None:
    here = world()
    places(here, 2)
    paused(here, start, until)
    promoted(here, until, "old", "live")
    here.announce("aaaa", files=False)
    state, reason = answer(here, until, ask(here, "aaaa"))
    assert state == "full"
    assert "2 places (serving.resident_adapters)" in reason
    assert answer(here, until, ask(here, "old")) == ("held", ""), "what is there anyway needs no place"
    assert set(here.engine.adapters) == {"old", "live"}


def test_a_pin_that_nobody_uses_ends_and_one_in_use_outlives_a_restart(
    world: Any, start: Start, until: Until, files: Any
) -> None:
    here = world()
    places(here, 3, keep="3s")
    running = paused(here, start, until)
    for name in ("aaaa", "bbbb"):
        here.announce(name, files=False)
        assert answer(here, until, ask(here, name)) == ("held", "")
    until(lambda: running.policy().get("pinned"))
    until(lambda: not running.policy()["pinned"])
    assert set(here.engine.adapters) == {"aaaa", "bbbb"}, "its place is not needed yet"
    kept = ask(here, "aaaa")
    assert answer(here, until, kept) == ("held", "")
    running.end()
    here.engine.stop()
    here.engine.start()
    start(here)
    until(lambda: "aaaa" in here.engine.adapters)
    assert set(here.engine.adapters) == {"aaaa"}
    assert len(answers(here, kept)) == 1, "it was answered before"
