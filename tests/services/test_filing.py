"""The archive's process says that it lives, also while the log is away."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from everloop.errors import LogError

from services.assembler import filing


class AwayAtFirst:
    """A stream whose log does not answer the first few times."""

    handled = 7

    def __init__(self, times: int, ended: threading.Event) -> None:
        self._times, self._ended = times, ended

    def status(self) -> dict[str, Any]:
        self._times -= 1
        if self._times >= 0:
            raise LogError("no broker answers")
        self._ended.set()
        return {"lag": 0}

    def trouble(self) -> str | None:
        return None


class Folds:
    def status(self) -> dict[str, Any]:
        return {"folded": 0}


def test_a_log_that_is_away_does_not_make_it_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(filing, "SAY_EVERY", 0.001)
    ended = threading.Event()
    filing._tell(AwayAtFirst(3, ended), Folds(), ended)  # type: ignore[arg-type]
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said == [{"trouble": None}] * 3 + [
        {"archive": {"lag": 0, "records": 7}, "compaction": {"folded": 0}, "trouble": None}
    ]
