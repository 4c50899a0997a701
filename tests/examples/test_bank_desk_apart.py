"""The demo's report is of messages that nothing else has: not the base's prior, the gate, nor what is captured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from openai import OpenAI

from examples.bank_desk import data, demo
from examples.bank_desk.loop import Stage, Standing

SENT = 300
NOW = Standing(Stage.GATHERING, "base", None, None, None, None, None, None, 0)


class Gateway:
    """Answers every question, and keeps apart what it would capture and what a header keeps out."""

    def __init__(self) -> None:
        self.captured: set[str] = set()
        self.kept_out: set[str] = set()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        text = json.loads(request.content)["messages"][-1]["content"]
        off = request.headers.get("X-Everloop-Capture") == "off"
        (self.kept_out if off else self.captured).add(text)
        message = {"role": "assistant", "content": "card_arrival"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return httpx.Response(
            200, json={"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        )


class NoPlatform:
    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> NoPlatform:
        return self

    def __exit__(self, *_: object) -> None: ...

    def stop(self) -> None: ...

    def status(self, service: str) -> dict[str, Any]:
        return {}

    def start(self) -> SimpleNamespace:
        return SimpleNamespace(url="http://127.0.0.1:9/v1", key="ek_test")


def test_the_report_is_in_nothing_that_is_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Gateway()
    client = OpenAI(
        base_url="http://127.0.0.1:9/v1",
        api_key="ek_test",
        http_client=httpx.Client(transport=httpx.MockTransport(gateway)),
    )
    given: dict[str, set[str]] = {}
    monkeypatch.setattr(demo, "OpenAI", lambda **_: client)
    monkeypatch.setattr(demo, "Platform", NoPlatform)
    monkeypatch.setattr(demo.everloop, "give_feedback", lambda **_: None)
    monkeypatch.setattr(demo, "everloop_command", lambda *_, **__: "")
    monkeypatch.setattr(demo, "build_base", lambda base, prior, *_: given.update(prior={one.text for one in prior}))
    desk = data.load(None, tmp_path, 0, {})

    def loop(self: demo.Demo, platform: Any, traffic: Any, client: Any) -> Standing:
        traffic.send(SENT)
        return NOW

    monkeypatch.setattr(demo.Demo, "_loop", loop)
    demo.Demo(desk, tmp_path / "home", tmp_path, 500, 0, "sqlite:///log.db", "embedded", lambda _: None).run()
    report = {message.text for message in desk.report}
    gold = {json.loads(line)["text"] for line in (tmp_path / "home/gate.jsonl").read_text().splitlines()}
    assert gateway.captured == {message.text for message in desk.stream[:SENT]}
    assert report <= gateway.kept_out
    assert given["prior"]
    assert gold
    for part in (given["prior"], gold, gateway.captured):
        assert not report & part
