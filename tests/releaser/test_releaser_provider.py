"""A policy whose incumbent is a provider: the gate asks it, each question once; canary, rollback and words about it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from everloop.cli.main import main
from everloop.errors import ServingError
from everloop.run import CommandKind

from pipelines.gold import GoldItem
from services.releaser.bought import Bought
from tests.provider import KEY, StrictProvider
from tests.releaser.conftest import answering

Until = Callable[..., Any]
CANARY = {"share": 0.5, "margin": 0.15, "alpha": 0.1, "min_units": 20, "shadow": 0}


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictProvider]:
    """Answers 60% of the gold questions right, with more letters than an adapter has."""
    monkeypatch.setenv("PROVIDER_KEY_OF_THIS_TEST", KEY)
    made = StrictProvider()
    made.answer = knowing(0.6)
    yield made
    made.close()


def knowing(skill: float) -> Any:
    right = answering(skill)

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        text = right(body["messages"][-1]["content"])
        usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
        return web.json_response({"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage})

    return answer


def test_the_gate_compares_with_the_provider_and_pays_for_each_question_once(
    world: Callable[..., Any], start: Callable[[Any], Any], until: Until, other: StrictProvider
) -> None:
    """The base model is not asked at all, and lengths are compared in characters: their tokens are not ours."""
    w = world(provider=other.config(), canary=CANARY)
    w.gold(100)
    w.engine.right["tiny-k2"] = lambda question: "never asked"
    running = start(w)
    w.announce("worse", skill=0.3)
    until(lambda: w.state("worse") == "rejected")
    gate = w.newest("worse").evidence["gate"]
    assert gate["against"] == "provider"
    assert (gate["gold"]["incumbent"], gate["gold"]["candidate"]) == (pytest.approx(0.6), pytest.approx(0.3))
    before, after, *_ = gate["behaviour"]["length"]
    assert 3 < before < 5
    assert 3 < after < 5
    assert len(other.asked) == 100
    assert {(body["temperature"], body["max_completion_tokens"]) for body in other.asked} == {(0.0, 8)}
    w.announce("better", skill=0.9)
    until(lambda: w.state("better") == "canary")
    assert len(other.asked) == 100, "kept from the first time"
    assert w.newest("better").evidence["gate"]["gold"]["incumbent"] == pytest.approx(0.6)
    assert w.newest("better").evidence["gate"]["kl"]["known"] > 0
    assert running.policy()["live"]["adapter"] == "provider"
    assert running.policy()["provider"]["role"] == "incumbent"

    w.traffic(400, {"canary": 0.7, "control": 0.6})
    until(lambda: w.state("better") == "live")
    until(lambda: running.policy()["live"]["previous"] == "provider")
    order = w.order(CommandKind.ROLLBACK)
    until(lambda: running.answer(order))
    assert running.answer(order)["says"].endswith("live is the provider (gpt-of-this-test)")
    assert w.live() == "base", "the route's word for nobody's adapter"


def test_a_fallback_is_not_what_a_candidate_is_compared_with(
    world: Callable[..., Any], start: Callable[[Any], Any], until: Until, other: StrictProvider
) -> None:
    w = world(provider=other.config("fallback"))
    w.gold(60)
    w.knows("tiny-k2", 0.2)
    running = start(w)
    w.announce("a", skill=0.9)
    until(lambda: w.state("a") == "canary")
    assert w.newest("a").evidence["gate"]["gold"]["incumbent"] == pytest.approx(0.2)
    assert other.asked == []
    assert running.policy()["live"]["adapter"] == "base"


def test_compare_asks_the_provider_by_its_name(
    world: Callable[..., Any],
    other: StrictProvider,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w = world()
    w.gold(40)
    w.knows("tiny-k2", 0.2)
    its = ", ".join(f"{name} = {value!r}" for name, value in other.config().items())
    config = w.home.root / "everloop.toml"
    config.write_text(f"[tenants.default.policies.assistant]\nbase = 'tiny-k2'\nprovider = {{{its}}}\n")
    monkeypatch.setenv("EVERLOOP_CONFIG", str(config))
    monkeypatch.setenv("EVERLOOP_HOME", str(w.home.root))
    monkeypatch.setenv("EVERLOOP_SERVING__URL", f"http://127.0.0.1:{w.engine.port}")
    assert main(["compare", "base", "provider", "--json"]) == 0
    base, provider = json.loads(capsys.readouterr().out)["adapters"]
    assert (base["accuracy"], provider["accuracy"]) == (pytest.approx(0.2), pytest.approx(0.6))
    assert (base["adapter"], provider["adapter"], provider["kl"]) == ("base", "provider", None)
    assert 3 < provider["characters"] < 5
    config.write_text('[tenants.default.policies.assistant]\nbase = "tiny-k2"\n')
    assert main(["compare", "base", "provider"]) == 2
    assert "has no provider" in capsys.readouterr().err


def items(count: int) -> list[GoldItem]:
    return [GoldItem.of(f"question {i} about card", "card", split="gate") for i in range(count)]


class Limited:
    """A provider that stops after so many answers, and takes no temperature."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.answered: list[str] = []

    async def complete(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        if "temperature" in body:
            raise ServingError("Unsupported value: 'temperature' does not support 0.0", status=400)
        question = body["messages"][0]["content"]
        if question.startswith("question 7 "):
            raise ServingError("filtered", status=400, code="content_filter")
        if len(self.answered) == self.most:
            raise ServingError("out of credit", status=502)
        self.answered.append(question)
        return {"choices": [{"message": {"content": "card"}, "finish_reason": "length"}], "usage": None}


def test_what_was_answered_before_a_provider_stopped_is_not_asked_again(tmp_path: Path) -> None:
    provider: Any = Limited(5)
    with pytest.raises(ServingError, match="out of credit"):
        asyncio.run(Bought(provider, tmp_path, "p", 8).answers(items(10)))
    provider.most = 100
    given = asyncio.run(Bought(provider, tmp_path, "p", 8).answers(items(12)))
    assert len(provider.answered) == len(set(provider.answered)) == 11, "the filtered one gave none"
    assert [(one.text, one.finished) for one in given] == [("card", False)] * 7 + [("", True)] + [("card", False)] * 4
    (kept,) = tmp_path.glob("provider-*.jsonl")
    kept.write_text(kept.read_text()[:-5])  # as a crash leaves it
    again = asyncio.run(Bought(provider, tmp_path, "p", 8).answers(items(12)))
    assert again == given
    assert len(provider.answered) == 12
    assert asyncio.run(Bought(provider, tmp_path, "p", 8).answers(items(12))) == given
    assert len(provider.answered) == 12
    asyncio.run(Bought(provider, tmp_path, "another", 8).answers(items(2)))
    assert len(provider.answered) == 14, "another model's answers are its own"
