"""The reward service killed while judges are being asked: nothing is lost, and hardly anything is asked twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.episode import Episode, Turn
from everloop.event import Call, Event, FeedbackGiven, Message
from everloop.log import connect
from everloop.log.base import NewRecord

from reward.asking import AT_ONCE
from tests.judge import Judge, grade

pytestmark = pytest.mark.processes
EPISODES, DAY_HAS = 40, 48
BEFORE = 13  # questions that are answered before the kill


def filled(home: Path, judge: Judge) -> Path:
    home.mkdir()
    (home / "reward.toml").write_text(judge.declared(per_day=DAY_HAS, timeout=60.0))
    policy = f'[tenants.default.policies.assistant.reward]\ndeclaration = "{home}/reward.toml"\n'
    (home / "everloop.toml").write_text(policy)
    log = connect(f"sqlite:///{home}/log.db", partitions=1)
    for i in range(EPISODES):
        asked, output = Message(role="user", content=f"Where is it, {i}?"), Message(role="assistant", content="card")
        turn = Turn(call=Call(id=f"c{i}", messages=(asked,), output=output))
        one = Episode(
            tenant="default", policy="assistant", id=f"ep_{i}", version=1, started=1, updated=1, turns=(turn,)
        )
        log.append([NewRecord("episodes", one.key, wire.encode(one), {}, one.updated)])
    log.close()
    return home


def environment(home: Path) -> dict[str, str]:
    settings = {"HOME": str(home), "CONFIG": str(home / "everloop.toml"), "LOG__PARTITIONS": "1"}
    settings |= {"SERVICES__REWARD_PORT": "0"}
    ours = {f"EVERLOOP_{name}": value for name, value in settings.items()}
    return {**os.environ, **ours, "OMP_NUM_THREADS": "1"}


def start(home: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "services.scorer"], env=environment(home))


def status(home: Path) -> dict[str, Any]:
    try:
        url = json.loads((home / "run" / "scorer.json").read_text())["url"]
        with urllib.request.urlopen(f"{url}/status", timeout=5) as answer:
            return dict(json.load(answer))
    except (OSError, ValueError):
        return {}


def judged(home: Path) -> list[str]:
    """The call of each word in the log."""
    log = connect(f"sqlite:///{home}/log.db", partitions=1)
    events = [wire.decode(Event, record.value or b"") for record in log.read("events", 0, 0, 10_000)]
    log.close()
    words = {one.id: one.payload.feedback for one in events if isinstance(one.payload, FeedbackGiven)}
    assert {word.source for word in words.values()} <= {"judge:j"}
    return [str(word.call) for word in words.values()]


def test_killed_among_questions_it_asks_again_only_those_that_were_under_way(
    tmp_path: Path, judge: Judge, until: Callable[..., Any]
) -> None:
    go_on, turn = threading.Event(), threading.Lock()
    answered: list[str] = []

    def say(asked: dict[str, Any]) -> str:
        with turn:
            held = len(answered) >= BEFORE and not go_on.is_set()
            if not held:
                answered.append(asked["asked"])
        if held:
            go_on.wait(60)
        return grade(asked)

    judge.say = say
    home = filled(tmp_path / "home", judge)
    process = start(home)
    until(lambda: len(judge.asked) >= BEFORE + AT_ONCE, deadline=60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert judged(home) == [], "it was killed before the commit, or this test shows nothing"
    go_on.set()
    process = start(home)
    try:
        until(lambda: len(judged(home)) == EPISODES, deadline=60, every=0.1)
        said = until(lambda: (its := status(home)).get("judge", {}).get("lag") == 0 and its, deadline=30)
        asked = [sys.executable, "-m", "everloop.cli.main", "status"]
        told = subprocess.run(asked, env=environment(home), capture_output=True, text=True, timeout=120).stdout
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0
    assert f"looked at     judge:j {EPISODES} words" in told
    times = Counter(json.loads(body["messages"][1]["content"])["asked"] for body in judge.asked)
    assert len(times) == EPISODES, "no episode is lost"
    assert max(times.values()) == 2
    assert sum(count - 1 for count in times.values()) <= AT_ONCE
    assert len(judge.asked) <= DAY_HAS
    assert sorted(judged(home)) == sorted(f"c{i}" for i in range(EPISODES))
    assert said["judges"]["default/assistant"]["judges"]["judge:j"]["remembered"] >= BEFORE
