"""The reward service as a process: killed in the middle of an update, it ends where an undisturbed one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from everloop import wire
from everloop.episode import Episode, Turn
from everloop.event import Call, Message
from everloop.feedback import Feedback
from everloop.log import connect
from everloop.log.base import NewRecord
from everloop.run import RewardVersion
from everloop.score import Score

from services.state import StateStore

EPISODES = 400
THINGS = ("card", "loan", "exchange rate", "pin", "app", "fee")


def episodes():
    for i in range(EPISODES):
        asked, answered = THINGS[i % 6], THINGS[(i * 7 + i // 6) % 6]
        call = Call(
            id=f"c{i}",
            messages=(Message(role="user", content=f"I have a question about my {asked}, number {i % 40}"),),
            output=Message(role="assistant", content=f"{answered} desk"),
        )
        up = 1 if asked == answered else -1
        words = (Feedback(id=f"f{i}", kind="thumb", value=up, time=1.0, call=f"c{i}", rater="r"),) if i % 4 else ()
        yield Episode(
            tenant="default",
            policy="assistant",
            id=f"ep_{i}",
            version=1 + len(words),
            started=1.0,
            updated=float(i + 1),
            turns=(Turn(call=call, feedback=words),),
        )


def filled(home: Path) -> Path:
    home.mkdir()
    # One partition: how several interleave is part of what was read, and differs from run to run.
    log = connect(f"sqlite:///{home}/log.db", partitions=1)
    log.append([NewRecord("episodes", one.key, wire.encode(one), {}, one.updated) for one in episodes()])
    log.close()
    return home


def start(home: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "EVERLOOP_HOME": str(home),
        "EVERLOOP_LOG__PARTITIONS": "1",
        "EVERLOOP_SERVICES__REWARD_PORT": "0",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen([sys.executable, "-m", "services.scorer"], env=environment)


def get(home: Path, path: str) -> str | None:
    try:
        url = json.loads((home / "run" / "scorer.json").read_text())["url"]
        with urllib.request.urlopen(url + path, timeout=5) as answer:
            return answer.read().decode()
    except (OSError, ValueError):
        return None


def command(home: Path, *words: str) -> str:
    """What a command for this home says on stdout. It has to succeed."""
    environment = {**os.environ, "EVERLOOP_HOME": str(home), "EVERLOOP_LOG__PARTITIONS": "1"}
    done = subprocess.run(
        [Path(sys.executable).with_name("everloop"), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def finished(home: Path) -> dict | None:
    status = json.loads(get(home, "/status") or "{}")
    desks = status.get("rewards", {})
    done = status.get("score", {}).get("lag") == 0 and desks.get("default/assistant", {}).get("updates") == 300
    return status if done else None


def snapshots(home: Path) -> list[str]:
    root = home / "rewards" / "default" / "assistant"
    return [folder.name for folder in root.iterdir() if folder.name[0] != "."] if root.exists() else []


def state_of(home: Path) -> dict[str, bytes]:
    """What does not depend on how records fell into batches."""
    store = StateStore(home / "state" / "score.db")
    entries = {key: value for key, value in store.scan("") if not key.endswith("/desk")}
    store.close()
    return entries


def read(home: Path, topic: str, contract: type) -> dict[str, object]:
    log = connect(f"sqlite:///{home}/log.db", partitions=1)
    found = {}
    for record in log.read(topic, 0, 0, 10_000):
        one = wire.decode(contract, record.value)
        assert found.setdefault(record.headers["id"], one) == one, "a repeated record says the same"
    log.close()
    return found


@pytest.mark.processes
@pytest.mark.models
def test_killed_in_an_update_it_ends_as_an_undisturbed_one(tmp_path, until):
    calm, harried = filled(tmp_path / "calm"), filled(tmp_path / "harried")
    process = start(harried)
    # The batch is under way once its first snapshots are there, and nothing of it is committed yet.
    until(lambda: len(snapshots(harried)) >= 3, deadline=90, every=0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not any(state_of(harried)), "it was killed before the commit, or this test shows nothing"
    processes = [start(harried), start(calm)]
    try:
        until(lambda: finished(harried), deadline=120)
        status = until(lambda: finished(calm), deadline=120)
        metrics = get(calm, "/metrics") or ""
        assert get(calm, "/readyz") is not None
    finally:
        for process in processes:
            process.terminate()
        codes = [process.wait(timeout=20) for process in processes]
    assert codes == [0, 0]
    assert state_of(harried) == state_of(calm)
    assert sorted(snapshots(harried)) == sorted(snapshots(calm))
    assert read(harried, "scores", Score) == read(calm, "scores", Score)
    assert len(read(calm, "scores", Score)) == EPISODES
    assert read(harried, "reward-versions", RewardVersion) == read(calm, "reward-versions", RewardVersion)
    assert not {"signals", "judge"} & status.keys(), "no policy declares a check or a judge: nobody reads for them"
    desk = status["rewards"]["default/assistant"]
    assert desk["auc"] > 0.8
    assert f'everloop_reward_updates_total{{policy="default/assistant"}} {desk["updates"]}.0' in metrics
    weight = desk["sources"]["thumb"]["up"]
    assert (
        f'everloop_reward_source_weight{{direction="up",policy="default/assistant",source="thumb"}} {weight}' in metrics
    )
    assert f'everloop_reward_success_estimate{{policy="default/assistant"}} {desk["success_estimate"]}' in metrics
    assert f'everloop_reward_auc{{policy="default/assistant"}} {desk["auc"]}' in metrics


@pytest.mark.processes
@pytest.mark.models
def test_a_rollback_is_answered_obeyed_and_still_holds_after_a_kill(tmp_path, until):
    home = filled(tmp_path / "home")
    process = start(home)
    try:
        until(lambda: finished(home), deadline=120)
        told = command(home, "reward", "rollback", "--reason", "it likes lists")
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = start(home)
        desk = until(lambda: finished(home), deadline=120)["rewards"]["default/assistant"]
    finally:
        process.terminate()
        process.wait(timeout=20)
    assert f"{desk['version']} scores, and is kept until 'everloop reward resume'" in told
    assert desk["pinned"].endswith("it likes lists")
    assert "it likes lists" in command(home, "reward", "list")
