"""The gold questions put to an engine: which of the answers are measured."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

from everloop.errors import ServingError
from everloop.event import Message
from everloop.serving.base import Serving

from pipelines.gold import GoldItem
from services.releaser.questions import MEASURED, Questions, Tokens

TOPICS, EACH = 64, 5


class Echo:
    """Answers with the question, as one token of its number."""

    async def complete(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        asked = body["messages"][0]["content"]
        choice = {"message": {"content": asked}, "token_ids": [int(asked)], "finish_reason": "stop"}
        return {"choices": [choice], "prompt_token_ids": [1]}


def test_the_distance_to_the_base_is_measured_over_all_topics(tmp_path: Path) -> None:
    items = [
        GoldItem(
            id=str(i),
            prompt=(Message(role="user", content=str(i)),),
            answer="x",
            slice=f"topic {i // EACH}",
            split="gate",
        )
        for i in range(TOPICS * EACH)
    ]
    measured: list[int] = []

    async def measure(rows: list[Tokens]) -> list[float | None]:
        measured.extend(row.answer[0] for row in rows)
        return [float(row.answer[0]) for row in rows]

    questions = Questions(cast(Serving, Echo()), tmp_path)
    given = asyncio.run(questions.answers("a", items, 8, measure))
    assert len(measured) == MEASURED
    assert {items[i].slice for i in measured} == {item.slice for item in items}
    assert [one.kl for one in given] == [float(i) if i in measured else None for i in range(len(items))]


def test_few_answers_are_all_measured(tmp_path: Path) -> None:
    items = [
        GoldItem(id=str(i), prompt=(Message(role="user", content=str(i)),), answer="x", split="gate") for i in range(3)
    ]

    async def measure(rows: list[Tokens]) -> list[float | None]:
        return [0.5] * len(rows)

    given = asyncio.run(Questions(cast(Serving, Echo()), tmp_path).answers("a", items, 8, measure))
    assert [one.kl for one in given] == [0.5] * 3


class Broken(Echo):
    """An engine whose numbers are not finite with this adapter, but for the first question."""

    async def complete(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        if body["messages"][0]["content"] != "0":
            raise ServingError("the model's output is not finite", status=500, code="not_finite")
        return await super().complete(route, body)


def test_output_that_is_not_finite_is_a_wrong_answer_and_not_a_reason_to_ask_again(tmp_path: Path) -> None:
    items = [
        GoldItem(id=str(i), prompt=(Message(role="user", content=str(i)),), answer="x", split="gate") for i in range(3)
    ]

    async def measure(rows: list[Tokens]) -> list[float | None]:
        return [0.0 if row.answer else None for row in rows]

    given = asyncio.run(Questions(cast(Serving, Broken()), tmp_path).answers("a", items, 8, measure))
    assert [one.text for one in given] == ["0", "", ""]
    assert [one.kl for one in given] == [0.0, None, None]
