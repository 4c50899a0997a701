"""A policy whose incumbent is a provider: the gate asks it, each question once; canary, rollback and words about it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from everloop.errors import ServingError
from everloop.run import CommandKind

from pipelines.gold import GoldItem
from services.releaser.bought import Bought
from tests.provider import KEY, StrictProvider
from tests.releaser.conftest import CANARY_OF_PROVIDER, answering

Until = Callable[..., Any]


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
