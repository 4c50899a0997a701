"""The whole platform on a real broker: what was answered and rated is in the store, though the assembler is killed."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.broker.process import Broker

pytestmark = [pytest.mark.kafka, pytest.mark.processes, pytest.mark.models, pytest.mark.mlflow]
CONFIG = """
[log]
url = "kafka://{address}/{prefix}"
[tenants.default.policies.assistant]
base = "{base}"
max_tokens = 8
"""
KNOWN = "SELECT count(*) AS turns, count(DISTINCT call) AS calls, sum(thumb) AS thumbs FROM turns"
SCORED = "SELECT count(DISTINCT call) AS calls FROM scores WHERE source = 'feedback'"


def test_an_assembler_killed_with_its_state_loses_nothing(
    up: Callable[[str], Any], broker: Broker, untrained: Path, until: Callable[..., Any]
) -> None:
    text = CONFIG.format(address=broker.address, prefix=secrets.token_hex(6), base=untrained)
    platform = up(text)
    client = platform.client()

    def talk(times: int) -> None:
        for _ in range(times):
            asked = [{"role": "user", "content": "hello there"}]
            answer = client.chat.completions.create(model="assistant", messages=asked)
            said = {"response_id": answer.id, "kind": "thumb", "value": 1}
            client.post("/feedback", body=said, cast_to=object)

    talk(8)
    until(lambda: platform.rows(KNOWN) == [{"turns": 8, "calls": 8, "thumbs": 8}], deadline=60, every=1.0)
    os.kill(platform.status("assembler")["pid"], signal.SIGKILL)
    shutil.rmtree(platform.home / "state" / "assemble")
    talk(8)
    until(lambda: platform.rows(KNOWN) == [{"turns": 16, "calls": 16, "thumbs": 16}], deadline=60, every=1.0)
    until(lambda: platform.rows(SCORED) == [{"calls": 16}], deadline=60, every=1.0)
    assert "assembler" in platform.does("status")
    assert platform.status("assembler")["assemble"]["dead_letters"] == 0
    platform.end()
    assert platform.process.returncode == 0
