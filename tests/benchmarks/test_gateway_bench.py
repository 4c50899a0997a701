"""The benchmark of the gateway: what its stub answers, what it reads of wrk, and what it says beside another proxy."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import _litellm, _upstream
from benchmarks._wrk import Round, read
from benchmarks.gateway import aims_of
from services.gateway.http1 import Framing


def answered(body: dict[str, Any]) -> bytes:
    framing = Framing()
    framing.feed(_upstream._answer(b"POST /v1/chat/completions HTTP/1.1", _upstream._packed(body)))
    assert (framing.status, framing.done, framing.lasting) == (200, True, True)
    return framing.take()


@pytest.mark.parametrize("told", [True, False])
def test_the_stub_tells_of_tokens_who_asks_for_them(told: bool):
    asked = {"return_token_ids": True, "logprobs": True} if told else {}
    whole = json.loads(answered(asked))
    events = answered({**asked, "stream": True}).split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events[:-2]]
    (choice,) = whole["choices"]
    parts = [its for chunk in chunks for its in chunk["choices"]]
    assert "".join(part["delta"]["content"] for part in parts) == choice["message"]["content"]
    assert [name in choice for name in ("token_ids", "logprobs")] == [told, told]
    assert [name in parts[0] for name in ("token_ids", "logprobs")] == [told, told]
    assert whole["usage"] == chunks[-1]["usage"]


def test_a_refused_or_broken_answer_fails_the_run():
    good = {"requests": 100, "microseconds": 2_000_000, "refused": 0, "broken": 0, "p50": 1500.0, "p99": 9000.0}
    assert read("wrk says more above\n" + json.dumps(good)) == Round(100, 50.0, 1.5, 9.0)
    for wrong in ({"refused": 1}, {"broken": 1}, {"requests": 0}):
        with pytest.raises(SystemExit, match="not every request"):
            read(json.dumps(good | wrong))


def row(through: str, connections: int, rate: float, p50: float, p99: float) -> dict[str, Any]:
    head = {"answer": "whole", "connections": connections, "through": through}
    return head | {"requests/s": rate, "added p50 ms": p50, "added p99 ms": p99}


def test_aims_beside_another_proxy_are_ratios_at_16_connections():
    ours = [row("gateway", 1, 700, 0.9, 3), row("gateway", 16, 2700, 5, 10)]
    theirs = [row("LiteLLM", 1, 80, 10, 20), row("LiteLLM", 16, 100, 90, 200)]
    alone = {one.what: (one.got, one.met) for one in aims_of(ours)}
    assert alone == {"requests/s at 16 connections": (2700, False), "added p50 at 1 connection, ms": (0.9, True)}
    beside = {one.what: (one.got, one.met) for one in aims_of([*ours, *theirs])}
    assert beside["times LiteLLM's requests/s at 16 connections"] == (27.0, True)
    assert beside["part of LiteLLM's added p99 at 16 connections"] == (0.05, True)


def test_the_other_proxy_is_pinned_with_hashes_and_none_of_the_malicious_releases():
    assert _litellm.version() not in ("1.82.7", "1.82.8")
    lines = _litellm.LOCK.read_text().splitlines()
    pins = [at for at, line in enumerate(lines) if "==" in line]
    assert len(pins) > 50
    assert all(lines[at + 1].strip().startswith("--hash=sha256:") for at in pins)
    assert not [line for line in lines if "://" in line]
