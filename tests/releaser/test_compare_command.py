"""'everloop compare' says how far it is on stderr, and its result alone on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from everloop.cli.main import main

from services.commands import compare


def test_progress_is_on_stderr_and_the_result_on_stdout(
    world: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world()
    w.gold(100)
    w.knows("tiny-k2", 0.5)
    w.engine.delay = 0.05
    monkeypatch.setattr(compare, "EVERY", 0.0)
    (w.home.root / "everloop.toml").write_text('[tenants.default.policies.assistant]\nbase = "tiny-k2"\n')
    monkeypatch.setenv("EVERLOOP_CONFIG", str(w.home.root / "everloop.toml"))
    monkeypatch.setenv("EVERLOOP_HOME", str(w.home.root))
    monkeypatch.setenv("EVERLOOP_SERVING__URL", f"http://127.0.0.1:{w.engine.port}")
    assert main(["compare", "base", "base", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["items"] == 100
    lines = err.splitlines()
    assert lines[0].startswith("1 of 2, base: asking 100 gate items")
    assert any("of 100 answered" in line for line in lines[1:-1])
    assert lines[-1].startswith("2 of 2, base: done")
