"""The gold questions, put to an engine: greedy answers of one model, many at once, and their distance to the base.

An answer to a question never changes for an adapter (its name is its content), so answers are kept in the home and
an incumbent is asked once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everloop.errors import Overloaded, ServingError
from everloop.event import Message
from everloop.serving.base import Serving

from pipelines.gate import Given
from pipelines.gold import GoldItem

AT_ONCE = 64
MEASURED = 128  # answers whose distance to the base is measured
TRIES = 8


class Questions:
    """Asks one engine. ``folder`` keeps the answers."""

    def __init__(self, serving: Serving, folder: Path) -> None:
        self._serving = serving
        self._folder = folder
        self._asked: dict[str, list[Given]] = {}

    async def answers(
        self, model: str, base: str, items: Sequence[GoldItem], max_tokens: int, *, kept_as: str | None = None
    ) -> list[Given]:
        """What ``model`` answers at temperature 0, in the order of the items.

        ``base``: the base's name at the engine; where it is another model, some answers carry their KL to it.
        ``kept_as``: the name under which the answers are kept; None: only until this process ends.

        Raises ServingError where the engine does not answer, after patience with a full queue.
        """
        asked = hashlib.sha256("\n".join([str(max_tokens), *(item.id for item in items)]).encode()).hexdigest()[:16]
        if kept_as is None:
            name = f"{model}-{asked}"
            if name not in self._asked:
                self._asked[name] = await self._ask_all(model, base, items, max_tokens)
            return self._asked[name]
        kept = self._folder / f"{kept_as}-{asked}.json"
        if not kept.exists():
            _write(kept, json.dumps(await self._ask_all(model, base, items, max_tokens)))
        return [Given(*row) for row in json.loads(kept.read_text())]

    async def _ask_all(self, model: str, base: str, items: Sequence[GoldItem], max_tokens: int) -> list[Given]:
        gate = asyncio.Semaphore(AT_ONCE)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._answer(gate, model, base, item, max_tokens, measured=index < MEASURED))
                    for index, item in enumerate(items)
                ]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answer(
        self, gate: asyncio.Semaphore, model: str, base: str, item: GoldItem, max_tokens: int, *, measured: bool
    ) -> Given:
        body = {
            "model": model,
            "messages": [_plain(message) for message in item.prompt],
            "temperature": 0.0,
            "max_tokens": max_tokens,
            "return_token_ids": True,
        }
        async with gate:
            answer = await self._patiently("chat/completions", body)
            choice = answer["choices"][0]
            ids = choice.get("token_ids") or []
            kl = None
            if measured and model != base and ids:
                kl = await self._distance(model, base, answer.get("prompt_token_ids") or [], ids)
        length = len(ids) or answer.get("usage", {}).get("completion_tokens", 0)
        text = choice["message"].get("content") or ""
        return Given(text, length, choice.get("finish_reason") != "length", kl)

    async def _distance(self, model: str, base: str, prompt: list[int], ids: list[int]) -> float | None:
        """Mean over the answer's tokens of log p - log p_base, in nats: the k1 estimate of the KL divergence at the
        greedy answer (Schulman, "Approximating KL Divergence", 2020). None where the engine scores no given tokens.
        """
        own, its = await self._logprobs(model, prompt, ids), await self._logprobs(base, prompt, ids)
        if own is None or its is None:
            return None
        distance = sum(a - b for a, b in zip(own, its, strict=True)) / len(ids)
        return distance if math.isfinite(distance) else math.inf

    async def _logprobs(self, model: str, prompt: list[int], ids: list[int]) -> list[float] | None:
        """Log-probabilities of given tokens after a prompt, by vLLM's ``prompt_logprobs``."""
        body = {"model": model, "prompt": prompt + ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        try:
            answer = await self._patiently("completions", body)
        except ServingError as error:
            if error.status == 400:
                return None
            raise
        rows = answer["choices"][0].get("prompt_logprobs") or answer.get("prompt_logprobs") or []
        if len(rows) < len(prompt) + len(ids):
            return None
        return [
            _logprob_of(row, token) for row, token in zip(rows[len(prompt) : len(prompt) + len(ids)], ids, strict=True)
        ]

    async def _patiently(self, route: Any, body: dict[str, Any]) -> dict[str, Any]:
        for attempt in range(TRIES):
            try:
                return await self._serving.complete(route, body)
            except Overloaded as error:
                if attempt == TRIES - 1:
                    raise
                await asyncio.sleep(error.retry_after * (attempt + 1) / 2)
        raise AssertionError("the loop returns or raises")


def _logprob_of(row: Any, token: int) -> float:
    entry = row[str(token)]
    return float(entry["logprob"] if isinstance(entry, dict) else entry)


def _plain(message: Message) -> dict[str, Any]:
    return message.model_dump(exclude_none=True)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)
