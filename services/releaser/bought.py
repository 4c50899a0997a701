"""The gold questions, put to a provider: each is paid for once.

An answer is kept the moment it comes, by what was asked and of whom, so a provider that stops in the middle, or a gold
set that grows, costs no answer twice. What a provider serves under a name may change unseen: delete the folder's
``provider-*.jsonl`` to ask anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everloop.errors import ServingError
from everloop.serving.base import Serving

from pipelines.gate import Given
from pipelines.gold import GoldItem
from services.releaser.questions import Told, ignored, patiently, plain

AT_ONCE = 8  # providers limit how much they are asked at a time
FILTERED = frozenset({"content_filter", "content_policy_violation"})  # a user would get no more than that either


class Bought:
    """Asks one provider. ``folder`` keeps the answers; ``who`` names address and model."""

    def __init__(self, serving: Serving, folder: Path, who: str, max_tokens: int) -> None:
        self._serving = serving
        self._max_tokens = max_tokens
        name = hashlib.sha256(f"{who}\0{max_tokens}".encode()).hexdigest()[:16]
        self._path = folder / f"provider-{name}.jsonl"
        self._tempered = True  # until it says that it takes no temperature

    async def answers(self, items: Sequence[GoldItem], told: Told = ignored) -> list[Given]:
        """At temperature 0, in the order of the items; distances to the base there are none. Raises ServingError."""
        kept = self._kept()
        missing = {_mark(item): item for item in items if _mark(item) not in kept}
        gate, count = asyncio.Semaphore(AT_ONCE), itertools.count(len(items) - len(missing) + 1)

        async def ask(mark: str, item: GoldItem) -> None:
            async with gate:
                kept[mark] = given = await self._answer(item)
            self._keep(mark, given)
            told(next(count), len(items))

        try:
            async with asyncio.TaskGroup() as group:
                for mark, item in missing.items():
                    group.create_task(ask(mark, item))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [kept[_mark(item)] for item in items]

    async def _answer(self, item: GoldItem) -> Given:
        body: dict[str, Any] = {
            "messages": [plain(message) for message in item.prompt],
            "max_tokens": self._max_tokens,
        }
        try:
            answer = await self._asked(body)
        except ServingError as error:
            if error.code not in FILTERED:
                raise
            return Given("", 0, True)
        choice = answer["choices"][0]
        text = choice["message"].get("content") or ""
        return Given(text, (answer["usage"] or {}).get("completion_tokens", 0), choice["finish_reason"] != "length")

    async def _asked(self, body: dict[str, Any]) -> dict[str, Any]:
        """Some models take no temperature, and say so: they are asked without."""
        if self._tempered:
            try:
                return await patiently(self._serving, "chat/completions", {**body, "temperature": 0.0})
            except ServingError as error:
                if error.status != 400 or "temperature" not in str(error):
                    raise
                self._tempered = False
        return await patiently(self._serving, "chat/completions", body)

    def _kept(self) -> dict[str, Given]:
        """A line that a crash cut short is asked again."""
        found: dict[str, Given] = {}
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    mark, *row = json.loads(line)
                    found[mark] = Given(*row)
                except (ValueError, TypeError):
                    continue
        return found

    def _keep(self, mark: str, given: Given) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            # on a line of its own also after one that a crash cut short
            file.write(f"\n{json.dumps([mark, given.text, given.tokens, given.finished])}")


def _mark(item: GoldItem) -> str:
    """What is asked, whatever the item is called."""
    return hashlib.sha256(json.dumps([plain(message) for message in item.prompt]).encode()).hexdigest()[:24]
