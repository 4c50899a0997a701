"""An operator's day: an adapter made elsewhere goes live and is taken back under traffic, to an orderly end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.processes, pytest.mark.models, pytest.mark.mlflow]
POLICY = """
[tenants.default.policies.assistant]
base = "{base}"
max_tokens = 8
[tenants.default.policies.assistant.train]
min_scored = 4000
[tenants.default.policies.assistant.reward]
snapshot_every = 1
"""


class Answer(NamedTuple):
    sent: float
    came: float
    version: str


def ask(client: Any) -> Answer:
    sent = time.monotonic()
    asked = {"model": "assistant", "messages": [{"role": "user", "content": "hello there"}]}
    raw = client.chat.completions.with_raw_response.create(**asked)
    return Answer(sent, time.monotonic(), str(raw.headers["X-Everloop-Policy-Version"]))


@contextmanager
def traffic(client: Any) -> Iterator[list[Answer]]:
    """Two clients that ask without pause meanwhile; what was answered so far."""
    answers: list[Answer] = []
    stop = threading.Event()

    def on() -> None:
        while not stop.is_set():
            answers.append(ask(client))

    threads = [threading.Thread(target=on) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def rate(platform: Any, who: str, value: int, until: Callable[..., Any]) -> str:
    """The answer to a question that its customer rated, once the reward model has learned from it."""
    client, before = platform.client(), learned(platform).get("updates", 0)
    asked = [{"role": "user", "content": f"{who} asks"}]
    answer = client.chat.completions.create(model="assistant", messages=asked, user=who)
    client.post("/feedback", body={"response_id": answer.id, "kind": "thumb", "value": value}, cast_to=object)
    until(lambda: learned(platform).get("updates", 0) > before, 60, every=0.2)
    return str(answer.choices[0].message.content)


def learned(platform: Any) -> dict[str, Any]:
    return dict(platform.status("scorer").get("rewards", {}).get("default/assistant", {}))


def is_compared(platform: Any, adapter: str) -> None:
    platform.does("gold", "add", "where is my card", "card_arrival", "--split", "gate")
    told = platform.does("compare", "base", adapter[:10], "--json")  # its progress on stderr is before it
    compared = json.loads(told.splitlines()[-1])
    base, other = compared["adapters"]
    assert (compared["items"], base["adapter"], other["adapter"]) == (1, "base", adapter)
    assert other["kl"] > 0.001


def is_exported(platform: Any, adapter: str, liked: str, folder: Path, until: Callable[..., Any]) -> None:
    filed = "select count(thumb) thumbs, count(distinct policy_version) versions from turns"
    until(lambda: platform.rows(filed) == [{"thumbs": 2, "versions": 2}], 60, every=0.5)
    told = platform.does("export", str(folder), "--format", "parquet", "--format", "sft")
    assert f"hash {json.loads((folder / 'manifest.json').read_text())['hash']}" in told
    versions = pq.read_table(folder / "turns.parquet").column("policy_version").to_pylist()
    assert set(versions) == {"base", adapter}
    (example,) = (folder / "sft.jsonl").read_text().splitlines()
    assert json.loads(example)["completion"] == [{"role": "assistant", "content": liked}]


def is_scored_again(platform: Any) -> None:
    """What an earlier version of the reward model scored: at least the question that was rated first."""
    told = platform.does("replay", "--reward")
    made = re.search(rf"default/assistant: (\d+) scores by reward model {learned(platform)['version']}", told)
    assert made, told
    assert int(made[1]) > 0


def waits_for(platform: Any) -> list[int]:
    """The numbers in what 'status' says of the next run."""
    sentence = r"next run +waits for (\d+) more scored episodes \((\d+) of (\d+) are there\)"
    return [int(number) for found in re.findall(sentence, platform.does("status")) for number in found]


def children(of: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(of)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def test_an_operator_s_day(
    up: Callable[[str], Any], untrained: Path, adapter: Path, tmp_path: Path, until: Callable[..., Any]
) -> None:
    platform = up(POLICY.format(base=untrained))
    client = platform.client()
    assert set(platform.ready["services"]) == {"gateway", "engine", "assembler", "scorer", "learner", "releaser"}
    assert ask(client).version == "base"
    status, told = platform.tries("up")
    assert status == 2
    assert "already runs" in told

    assert adapter.name in platform.does("release", "register", str(adapter), "--reason", "made by hand")
    until(lambda: "50 are needed" in platform.does("status"), 60, every=0.5)
    status, told = platform.tries("release", "promote", adapter.name[:10])
    assert status == 1
    assert "no gate verdict and no canary" in told
    word = ("--without-evidence", "--reason", "I looked at it")
    assert "is live" in platform.does("release", "promote", adapter.name[:10], *word)
    until(lambda: "on a person's word" in platform.does("status"), 60, every=0.5)
    assert "gate none, canary none" in platform.does("release", "list")
    until(lambda: ask(client).version == adapter.name)

    os.kill(platform.status("releaser")["pid"], signal.SIGKILL)  # it comes back by itself, and takes the next order
    assert ask(client).version == adapter.name
    with traffic(client) as answers:
        until(lambda: len(answers) > 5)
        ordered = platform.orders("release", "rollback", "--timeout", "60")
        until(lambda: sum(answer.version == "base" for answer in answers) > 30, 60)
        assert ordered.wait(60) == 0
    back = min(answer.came for answer in answers if answer.version == "base")
    assert {answer.version for answer in answers if answer.sent > back} == {"base"}
    assert "rolled_back" in platform.does("release", "list")

    liked = rate(platform, "anna", 1, until)
    rate(platform, "bob", -1, until)
    is_compared(platform, adapter.name)
    is_exported(platform, adapter.name, liked, tmp_path / "exported", until)
    is_scored_again(platform)
    more, there, needed = until(lambda: waits_for(platform), 60, every=0.5)
    assert more + there == needed == 4000

    services = children(platform.process.pid)
    assert len(services) == 6
    platform.process.send_signal(signal.SIGINT)
    assert (
        platform.process.wait(timeout=60) == 0
    )  # that the drain ends in time: tests/supervisor, by a clock of its own
    left = [path.name for path in (platform.home / "run").glob("*.json")]
    assert not left, "killed: who stops by itself withdraws its announcement"
    assert not [pid for pid in services if Path(f"/proc/{pid}").exists()]
