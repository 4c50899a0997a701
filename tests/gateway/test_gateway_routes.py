"""Which version answers: routes, arms, stickiness, fallbacks and pins."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from everloop.errors import LogError, LogRefused
from everloop.home import Home
from everloop.log.base import NewRecord
from everloop.log.embedded import EmbeddedLog
from everloop.release import Adapter, Route
from everloop.wire import encode

from services.gateway.routes import Routes

A, B = "aaaa1111", "bbbb2222"


async def served(bench: Any, text: str = "hi", **more: Any) -> tuple[str, str]:
    _, _, headers = await bench.chat(text, **more)
    return headers["X-Everloop-Policy-Version"], headers["X-Everloop-Arm"]


async def test_the_base_answers_before_the_first_route(bench: Any) -> None:
    assert await served(bench) == ("base", "live")


async def test_units_fall_on_arms_as_the_route_says_and_stay(bench: Any) -> None:
    bench.engine.held |= {A, B}
    bench.route(1, live=A, canary=B, share=0.25, release="r1", uris={A: "", B: ""})
    arms = {}
    for at in range(40):
        arms[at] = await served(bench, X_Everloop_Subject=f"user-{at}")
    assert {version for version, arm in arms.values() if arm == "canary"} == {B}
    assert {version for version, arm in arms.values() if arm != "canary"} == {A}
    assert {arm for _, arm in arms.values()} == {"live", "control", "canary"}
    for at in range(5):
        assert await served(bench, f"again {at}", X_Everloop_Subject=f"user-{at}") == arms[at]
    route = bench.gateway.routes.get("bank", "assistant")
    for event in bench.events():
        call = event.payload
        assert (call.policy_version, call.arm, call.probability) == route.assign(event.subject)
        assert call.release == "r1"


async def test_an_episode_keeps_its_version_until_that_is_withdrawn(bench: Any) -> None:
    bench.engine.held |= {A, B}
    bench.route(1, live=A, uris={A: ""})
    mine = {"X_Everloop_Episode": "trip"}
    assert await served(bench, **mine) == (A, "live")
    bench.route(2, live=B, uris={A: "", B: ""})
    assert await served(bench, **mine) == (A, "live"), "still resident: the episode goes on as it began"
    assert await served(bench, X_Everloop_Episode="another") == (B, "live")
    bench.route(3, live="base", uris={})
    assert await served(bench, **mine) == ("base", "live"), "rolled back: everybody moves at once"


async def test_a_share_that_grows_moves_nobody_who_takes_part_and_no_episode_that_goes_on(bench: Any) -> None:
    bench.engine.held |= {A, B}
    taking_part: dict[str, tuple[str, str]] = {}
    trips: set[str] = set()
    for epoch, share in enumerate((0.05, 0.25, 0.5), 1):
        bench.route(epoch, live=A, canary=B, share=share, release="r1", uris={A: "", B: ""})
        for person in (f"user-{at}" for at in range(60)):
            now = await served(bench, f"new {epoch}", X_Everloop_Subject=person)
            assert now == taking_part.get(person, now)
            if now[1] != "live":
                taking_part[person] = now
            elif epoch == 1:
                trips.add(person)
                assert await served(bench, X_Everloop_Subject=person, X_Everloop_Episode=f"trip of {person}") == now
        for person in trips:
            on = {"X_Everloop_Subject": person, "X_Everloop_Episode": f"trip of {person}"}
            assert await served(bench, "and then", **on) == (A, "live"), "it began outside the canary"
    assert len(taking_part) == 60  # at a half everybody does
    assert len(trips) > 40


async def test_an_older_epoch_changes_nothing(bench: Any) -> None:
    bench.engine.held |= {A}
    bench.route(5, live=A)
    bench.route(4, live="base")
    assert await served(bench) == (A, "live")


async def test_a_canary_that_is_not_loaded_is_answered_by_live_and_recorded_so(bench: Any) -> None:
    bench.engine.held |= {A}
    bench.route(1, live=A, canary=B, share=0.5, release="r1", uris={A: "", B: ""})
    for at in range(10):
        version, _ = await served(bench, X_Everloop_Subject=f"user-{at}")
        assert version == A
    assert "canary" in {event.payload.arm for event in bench.events()}
    assert {event.payload.policy_version for event in bench.events()} == {A}
    assert {event.payload.error for event in bench.events()} == {None}
    bench.engine.held.discard(A)
    stream = await bench.client().chat.completions.create(
        model="assistant", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    assert [chunk async for chunk in stream]
    assert bench.events()[-1].payload.policy_version == "base"
    bench.engine.held.clear()
    status, said, _ = await bench.chat()
    assert (status, said["error"]["code"]) == (503, "engine_unavailable")


async def test_routes_are_followed_within_100_ms(bench: Any) -> None:
    stop = threading.Event()
    following = threading.Thread(target=bench.gateway.routes.follow, args=(stop,))
    following.start()
    try:
        route = Route(tenant="bank", policy="assistant", epoch=1, live=A, time=1.0)
        for attempt in range(3):  # the machine may be busy: the best of three must be in time
            route = route.model_copy(update={"epoch": attempt + 1})
            bench.log.append([NewRecord("routes", route.key, encode(route))])
            appended = time.monotonic()
            async with asyncio.timeout(30):
                while (held := bench.gateway.routes.get("bank", "assistant")) is None or held.epoch <= attempt:
                    await asyncio.sleep(0.002)
            if time.monotonic() - appended < 0.1:
                return
        pytest.fail("three routes in a row took longer than 100 ms")
    finally:
        stop.set()
        following.join()


async def test_a_route_that_cannot_be_read_is_passed_over(bench: Any) -> None:
    bench.log.append([NewRecord("routes", "bank/assistant", b"\xc1garbage"), NewRecord("routes", "x/y", None)])
    bench.engine.held |= {A}
    bench.route(1, live=A)
    assert await served(bench) == (A, "live")


async def test_a_researcher_may_pin_a_version_of_the_policy(bench: Any) -> None:
    research = bench.new_key(scope="research")
    bench.engine.held |= {A, B}
    bench.route(1, live=A)
    made = {"policy": "assistant", "base": "tiny", "run": "r", "batch": "b", "uri": "", "rank": 8, "targets": ()}
    for hash, tenant in ((B, "bank"), ("cccc3333", "airline")):
        adapter = Adapter(hash=hash, tenant=tenant, time=1.0, **made)
        bench.log.append([NewRecord("adapters", adapter.key, encode(adapter))])
    bench.gateway.routes.catch_up()
    for model, version in (("assistant@base", "base"), ("assistant@bbbb", B), (f"assistant@{A}", A)):
        assert await served(bench, model=model, key=research) == (version, "live")
    for model in ("assistant@cccc3333", "assistant@", "assistant@zzz", "writer@bbbb"):
        status, said, _ = await bench.chat(model=model, key=research)
        assert (status, said["error"]["code"]) == (404, "model_not_found"), model
    status, said, _ = await bench.chat(model="assistant@base")
    assert (status, said["error"]["code"]) == (403, "insufficient_scope")


async def test_what_is_not_recorded_takes_no_part_in_a_canary(bench: Any) -> None:
    bench.engine.held |= {A, B}
    bench.route(1, live=A, canary=B, share=0.5, release="r1", uris={A: "", B: ""})
    for at in range(8):
        _, _, headers = await bench.chat(X_Everloop_Subject=f"user-{at}", X_Everloop_Capture="off")
        assert headers["X-Everloop-Policy-Version"] == A


class Away:
    """A log that gives one error to every question."""

    def __init__(self, error: LogError) -> None:
        self.error = error

    def partitions(self, topic: str) -> int:
        raise self.error


def test_a_start_without_the_log_goes_on_with_the_routes_that_were_read_last(home: Home, tmp_path: Path) -> None:
    log, kept = EmbeddedLog(tmp_path / "log.db"), tmp_path / "routes.json"
    blobs = home.blobs
    with pytest.raises(LogError, match="nobody"):
        Routes(Away(LogError("nobody answers")), blobs, kept).begin()
    seen = Routes(log, blobs, kept)
    seen.begin()
    nothing = Routes(Away(LogError("nobody answers")), blobs, kept)
    nothing.begin()
    assert nothing.live("bank", "assistant") == "base", "that there is no route is known too"
    route = Route(tenant="bank", policy="assistant", epoch=3, live=A, canary=B, share=0.25, time=1.0, release="r1")
    made = {"policy": "assistant", "base": "tiny", "run": "r", "batch": "b", "uri": "", "rank": 8, "targets": ()}
    adapter = Adapter(hash="cccc3333", tenant="bank", time=1.0, **made)
    log.append([NewRecord("routes", route.key, encode(route)), NewRecord("adapters", adapter.key, encode(adapter))])
    seen.catch_up()
    assert seen.age() < 60
    log.close()
    again = Routes(Away(LogError("nobody answers")), blobs, kept)
    again.begin()
    assert again.get("bank", "assistant") == route
    assert again.versions("bank", "assistant") == {A, B, "cccc3333"}
    assert "nobody answers" in again.trouble
    assert again.unready is None
    assert again.age() == math.inf
    refused = Routes(Away(LogRefused("the password is wrong")), blobs, kept)
    refused.begin()
    assert "password" in refused.unready, "a person has to act"
    kept.write_text("{")
    with pytest.raises(LogError, match="nobody"):
        Routes(Away(LogError("nobody answers")), blobs, kept).begin()
