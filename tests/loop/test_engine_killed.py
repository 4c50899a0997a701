"""The engine is killed while it answers: no client takes a part for the whole, and the loop goes on by itself."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

pytestmark = [pytest.mark.processes, pytest.mark.models, pytest.mark.mlflow]
POLICY = """
[tenants.default.policies.assistant]
base = "{base}"
max_tokens = 180
"""
ASKED: dict[str, Any] = {"model": "assistant", "messages": [{"role": "user", "content": "hello there"}]}
COUNT = "select count(distinct call) as calls from turns"


def outcome(client: openai.OpenAI, *, stream: bool) -> str:
    """'whole', 'part' (an end that nothing explains), or what the client was told."""
    try:
        if not stream:
            return "whole" if client.chat.completions.create(**ASKED).choices[0].finish_reason else "part"
        reasons = [
            c.finish_reason for chunk in client.chat.completions.create(**ASKED, stream=True) for c in chunk.choices
        ]
        return "whole" if reasons and reasons[-1] else "part"
    except openai.APIStatusError as error:
        return f"status {error.status_code}"
    except openai.APIError as error:  # an error event in the stream
        return f"event {error}" if type(error) is openai.APIError else f"lost {error!r}"


class Customers:
    """One that reads streams and one that does not, without pause; what came of each request, by when it was sent."""

    def __init__(self, client: openai.OpenAI) -> None:
        self.came: list[tuple[float, str]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(client, stream)) for stream in (True, False)]
        for thread in self._threads:
            thread.start()

    def _ask(self, client: openai.OpenAI, stream: bool) -> None:
        while not self._stop.is_set():
            sent = time.monotonic()
            self.came.append((sent, outcome(client, stream=stream)))
            time.sleep(0.01)  # a refusal comes at once: not thousands of them

    def end(self) -> set[str]:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        return {what for _, what in self.came}


def version(client: openai.OpenAI) -> str:
    """Who answers; empty: nobody."""
    try:
        raw = client.chat.completions.with_raw_response.create(**ASKED, max_tokens=4)
    except openai.APIError:
        return ""
    return str(raw.headers["X-Everloop-Policy-Version"])


def test_no_client_takes_a_part_for_the_whole_and_the_loop_goes_on(
    up: Callable[[str], Any], untrained: Path, adapter: Path, until: Callable[..., Any]
) -> None:
    platform = up(POLICY.format(base=untrained))
    client = platform.client()
    platform.does("release", "register", str(adapter))
    reason = ("--without-evidence", "--reason", "for this test")
    until(lambda: platform.tries("release", "promote", *reason)[0] == 0, deadline=60, every=1.0)
    until(lambda: version(client) == adapter.name, deadline=60, every=0.2)
    customers = Customers(client)
    until(lambda: len(customers.came) >= 4, deadline=60)
    before = platform.status("engine")["pid"]
    os.kill(before, signal.SIGKILL)
    until(lambda: platform.status("engine").get("pid", before) != before, deadline=120, every=0.2)
    until(lambda: version(client) == adapter.name, deadline=60, every=0.2)
    told = customers.end()
    assert told - {"whole"}, "it was killed between two answers: nothing was seen"
    assert not {one for one in told if one == "part" or one.startswith("lost")}
    assert all(one.startswith(("whole", "event", "status 5")) for one in told)
    known = platform.rows(COUNT)[0]["calls"]
    for _ in range(3):
        assert outcome(client, stream=False) == "whole"
    until(lambda: platform.rows(COUNT)[0]["calls"] >= known + 3, deadline=60, every=1.0)
