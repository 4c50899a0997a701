"""The gold questions, put to an engine: greedy answers of one model, many at once, and their distance to the base.

An answer to a question never changes for an adapter (its name is its content), so answers are kept in the home and
an incumbent is asked once.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from everloop.errors import Overloaded, ServingError
from everloop.event import Message
from everloop.serving.base import Answering, Route

from pipelines.gate import Given
from pipelines.gold import GoldItem

AT_ONCE = 64
MEASURED = 128  # answers whose distance to the base is measured
TRIES = 8
NOT_FINITE = "not_finite"  # the engine's word for weights that give no numbers


class Tokens(NamedTuple):
    """An answer as token ids, after its prompt's. Both empty where the engine gives none."""

    prompt: list[int]
    answer: list[int]


Measure = Callable[[list[Tokens]], Awaitable[list[float | None]]]
"""KL to the base of each answer, in nats a token; None: not known."""
Told = Callable[[int, int], None]
"""Given how many of how many questions are answered, after each."""


def ignored(done: int, of: int) -> None:
    """A :data:`Told` for whoever needs no progress."""


class Questions:
    """Asks the engines. ``folder`` keeps the answers."""

    def __init__(self, serving: Answering, folder: Path) -> None:
        self._serving = serving
        self._folder = folder
        self._asked: dict[str, list[Given]] = {}

    async def answers(
        self,
        model: str,
        items: Sequence[GoldItem],
        max_tokens: int,
        measure: Measure | None,
        told: Told = ignored,
    ) -> list[Given]:
        """What ``model`` answers at temperature 0, in the order of the items.

        ``measure`` gives some of the answers, evenly over all, their distance to the base. None: this *is* the base,
        and its answers are kept only until this process ends, since its weights may change under its name.

        Raises ServingError where the engine does not answer, after patience with a full queue.
        """
        asked = hashlib.sha256("\n".join([str(max_tokens), *(item.id for item in items)]).encode()).hexdigest()[:16]
        name = f"{model}-{asked}"
        if measure is None:
            if name not in self._asked:
                self._asked[name] = await self._ask_all(model, items, max_tokens, None, told)
            return self._asked[name]
        kept = self._folder / f"{name}.json"
        if not kept.exists():
            _write(kept, json.dumps(await self._ask_all(model, items, max_tokens, measure, told)))
        return [Given(*row) for row in json.loads(kept.read_text())]

    async def _ask_all(
        self, model: str, items: Sequence[GoldItem], max_tokens: int, measure: Measure | None, told: Told
    ) -> list[Given]:
        gate, count = asyncio.Semaphore(AT_ONCE), itertools.count(1)

        async def answered(item: GoldItem) -> tuple[Given, Tokens]:
            answer = await self._answer(gate, model, item, max_tokens)
            told(next(count), len(items))
            return answer

        try:
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(answered(item)) for item in items]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        answers = [task.result() for task in asked]
        if measure is None:
            return [given for given, _ in answers]
        at = spread(len(answers))
        distances = dict(zip(at, await measure([answers[i][1] for i in at]), strict=True))
        return [given._replace(kl=distances.get(i)) for i, (given, _) in enumerate(answers)]

    async def _answer(
        self, gate: asyncio.Semaphore, model: str, item: GoldItem, max_tokens: int
    ) -> tuple[Given, Tokens]:
        body = {
            "model": model,
            "messages": [plain(message) for message in item.prompt],
            "temperature": 0.0,
            "max_tokens": max_tokens,
            "return_token_ids": True,
        }
        async with gate:
            try:
                answer = await patiently(self._serving, "chat/completions", body)
            except ServingError as error:
                if error.code != NOT_FINITE:
                    raise
                return Given("", 0, False), Tokens([], [])  # the adapter's doing: asked again it says nothing either
        choice = answer["choices"][0]
        tokens = Tokens(answer.get("prompt_token_ids") or [], choice.get("token_ids") or [])
        length = len(tokens.answer) or answer.get("usage", {}).get("completion_tokens", 0)
        text = choice["message"].get("content") or ""
        return Given(text, length, choice.get("finish_reason") != "length"), tokens


def spread(many: int, most: int = MEASURED) -> list[int]:
    """Which of so many answers are measured: evenly over all, for gold items often lie topic by topic.

    Example: ``spread(6, most=3) == [0, 2, 4]``
    """
    return [i * many // most for i in range(most)] if many > most else list(range(many))


class Scored:
    """Distances by an engine that scores given tokens (vLLM's ``prompt_logprobs``): a :data:`Measure`.

    The mean over an answer's tokens of log p - log p_base: the k1 estimate of the KL divergence at the greedy answer
    (Schulman, "Approximating KL Divergence", 2020).
    """

    def __init__(self, serving: Answering, model: str, base: str) -> None:
        self._serving, self._model, self._base = serving, model, base

    async def __call__(self, rows: list[Tokens]) -> list[float | None]:
        return [await self._distance(row) for row in rows]

    async def _distance(self, row: Tokens) -> float | None:
        own, its = await self._logprobs(self._model, row), await self._logprobs(self._base, row)
        if not own or not its:
            return None
        distance = sum(a - b for a, b in zip(own, its, strict=True)) / len(own)
        return distance if math.isfinite(distance) else math.inf

    async def _logprobs(self, model: str, row: Tokens) -> list[float] | None:
        """Log-probabilities of the answer's tokens; None where the engine does not score."""
        tokens = row.prompt + row.answer
        body = {"model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        try:
            answer = await patiently(self._serving, "completions", body)
        except ServingError as error:
            if error.status == 400:
                return None
            raise
        said = answer["choices"][0].get("prompt_logprobs") or []
        if len(said) < len(tokens):
            return None
        pairs = zip(said[len(row.prompt) : len(tokens)], row.answer, strict=True)
        return [float(entry[str(token)]["logprob"]) for entry, token in pairs]


async def patiently(serving: Answering, route: Route, body: dict[str, Any]) -> dict[str, Any]:
    """An answer, after patience with a full queue. Raises ServingError."""
    for attempt in range(TRIES):
        try:
            return await serving.complete(route, body)
        except Overloaded as error:
            if attempt == TRIES - 1:
                raise
            await asyncio.sleep(error.retry_after * (attempt + 1) / 2)
    raise AssertionError("the loop returns or raises")


def plain(message: Message) -> dict[str, Any]:
    return message.model_dump(exclude_none=True)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)
