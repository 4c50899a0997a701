"""A seeded bad adapter that gate and shadow let through is stopped by a guard, after how many requests is printed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from everloop.event import Message

TOOLS = ({"type": "function", "function": {"name": "route"}},)
CALLED = {"id": "1", "type": "function", "function": {"name": "route", "arguments": "{topic: card}"}}
CANARY = {"share": 0.5, "margin": 0.05, "min_units": 50}


def said(text: str | None = None, **fields: Any) -> Message:
    return Message(role="assistant", content=text, **fields)


@pytest.mark.parametrize(
    ("what", "says", "reason", "most"),
    [
        ("answers nothing", {"output": said("")}, "answers were empty", 20),
        ("fails", {"output": said(), "error": "its numbers are not finite", "error_code": "x"}, "calls failed", 20),
        ("breaks tool calls", {"output": said(tool_calls=[CALLED]), "tools": TOOLS}, "broken tool calls", 30),
        ("talks twice as long", {"output": said("card card card")}, "times as long", 60),
    ],
)
def test_a_bad_adapter_is_stopped_by_a_guard(
    what: str,
    says: dict[str, Any],
    reason: str,
    most: int,
    world: Callable[..., Any],
    start: Callable[[Any], Any],
    until: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    w = world(canary=CANARY)
    w.gold()
    start(w)
    w.announce("a")
    until(lambda: w.state("a") == "canary")
    affected = first = 0
    while w.state("a") == "canary" and first < 400:
        affected += w.traffic(6, {"canary": 0.6, "control": 0.6}, first=first, says=says)
        first += 6
        time.sleep(0.5)  # the releaser looks four times a second
    until(lambda: w.state("a") == "rolled_back")
    with capsys.disabled():
        print(f"\nan adapter that {what}: stopped after {affected} requests")
    assert affected <= most
    assert reason in w.newest("a").reason
    assert w.live() == "base"


def test_an_engine_that_is_away_ends_no_canary(
    world: Callable[..., Any], start: Callable[[Any], Any], until: Callable[..., Any]
) -> None:
    w = world(canary=CANARY)
    w.gold()
    running = start(w)
    w.announce("a")
    until(lambda: w.state("a") == "canary")
    away = {"error": "no engine answers", "error_code": "engine_unavailable", "output": said()}
    w.traffic(100, {}, says=away)
    w.traffic(60, {}, first=200)
    until(lambda: (running.policy().get("in_progress") or {}).get("arms", {}).get("control", {}).get("calls", 0) > 60)
    assert w.state("a") == "canary"
