"""Asks judges behind OpenAI-compatible endpoints: from memory where it was asked before, within the day's budget, a
few at a time, each for so long. Whatever goes wrong is no opinion, by a name; nothing raises for what a judge does.

::

    asked before ──▶ its answer           day's budget spent ──▶ over_budget
    FAILED times in a row without a reply ──▶ resting, for REST seconds
    else TRIES questions, each counted before it is sent ──▶ opinion, refused, nonsense │ down, slow, declined
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import aiohttp

from reward.declaration import JudgeDeclaration
from reward.judging import Opinion, Question, agreed
from reward.ledger import Ledger

AT_ONCE = 8  # questions under way
TRIES = 2
FAILED = 4
REST = 60.0  # seconds
PATIENCE = 120.0  # seconds for all that is asked together
LARGEST = 1_000_000  # bytes of a reply
LASTING = (None, "refused", "nonsense")  # what the same question would be answered again


class Asked(NamedTuple):
    """``whose``: tenant and policy; ``day``: days since 1970, of event time."""

    whose: tuple[str, str]
    judge: JudgeDeclaration
    question: Question
    day: int


@dataclass
class Tally:
    """Of one judge since the start. ``seconds`` and ``tokens`` are of the ``replies``."""

    questions: int = 0
    remembered: int = 0
    opinions: int = 0
    replies: int = 0
    seconds: float = 0.0
    tokens: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    failed: int = 0  # questions in a row without a reply
    rests: float = 0.0  # until then, seconds of the monotonic clock
    plain: bool = False  # it does not take a schema


class Asker:
    """Used by one thread. ``tallies`` by (tenant, policy, judge's name). Raises sqlite3.Error where the disk fails."""

    def __init__(self, ledger: Ledger, patience: float = PATIENCE) -> None:
        self._ledger = ledger
        self._patience = patience
        self.tallies: dict[tuple[str, str, str], Tally] = {}

    def tally(self, whose: tuple[str, str], name: str) -> Tally:
        return self.tallies.setdefault((*whose, name), Tally())

    def ask(self, all: Sequence[Asked]) -> list[Opinion]:
        """The opinion on each, in order; a pair is asked in both orders. Takes ``patience`` seconds at most."""
        found = asyncio.run(self._all(all))
        for one, opinion in zip(all, found, strict=True):
            tally = self.tally(one.whose, one.judge.name)
            tally.opinions += opinion.value is not None
            if opinion.fault:
                tally.faults[opinion.fault] += 1
        return found

    async def _all(self, all: Sequence[Asked]) -> list[Opinion]:
        room = asyncio.Semaphore(AT_ONCE)
        connector = aiohttp.TCPConnector(limit=AT_ONCE)
        async with aiohttp.ClientSession(connector=connector) as session:
            tasks = [asyncio.create_task(self._answered(session, room, one)) for one in all]
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=self._patience)
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)
        return [Opinion(None, "late") if task.cancelled() else task.result() for task in tasks]

    async def _answered(self, session: aiohttp.ClientSession, room: asyncio.Semaphore, one: Asked) -> Opinion:
        async with room:
            first = await self._one(session, one)
            if one.question.second is None or first.value is None:
                return first
            return agreed(first, await self._one(session, one._replace(question=one.question.swapped)))

    async def _one(self, session: aiohttp.ClientSession, one: Asked) -> Opinion:
        tally = self.tally(one.whose, one.judge.name)
        judge = one.judge
        content = one.question.content(*one.whose, judge.name, judge.url, judge.model, judge.rubric)
        held = self._ledger.answer(content)
        if held is not None:
            tally.remembered += 1
            return Opinion(*held)
        opinion = Opinion(None, "down")
        for _ in range(TRIES):
            if time.monotonic() < tally.rests:
                return Opinion(None, "resting")
            if not self._ledger.spend("/".join((*one.whose, judge.name)), one.day, judge.per_day):
                return Opinion(None, "over_budget")
            opinion = await self._try(session, one, tally)
            if opinion.fault in LASTING:
                self._ledger.keep(content, *opinion)
                tally.failed = 0
                return opinion
            tally.failed += 1
            if tally.failed >= FAILED:
                tally.rests, tally.failed = time.monotonic() + REST, 0
        return opinion

    async def _try(self, session: aiohttp.ClientSession, one: Asked, tally: Tally) -> Opinion:
        judge = one.judge
        headers = {"Authorization": f"Bearer {judge.key_file.read_text().strip()}"} if judge.key_file else {}
        body = one.question.body(judge.model, judge.rubric, structured=not tally.plain)
        tally.questions += 1
        began = time.monotonic()
        try:
            async with session.post(
                f"{judge.url.rstrip('/')}/chat/completions",
                json=body,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=judge.timeout),
                allow_redirects=False,
            ) as answer:
                raw = await answer.content.read(LARGEST)
                while len(raw) < LARGEST and (more := await answer.content.read(LARGEST - len(raw))):
                    raw += more
        except TimeoutError:
            return Opinion(None, "slow")
        except (aiohttp.ClientError, OSError):
            return Opinion(None, "down")
        if answer.status != 200:
            tally.plain |= answer.status in (400, 422)  # asked once more without the schema
            return Opinion(None, "declined" if 400 <= answer.status < 500 and answer.status != 429 else "down")
        tally.replies += 1
        tally.seconds += time.monotonic() - began
        try:
            reply = json.loads(raw)
        except (ValueError, RecursionError):
            return Opinion(None, "nonsense")
        tally.tokens += _tokens(reply)
        return one.question.opinion(reply)


def _tokens(reply: object) -> int:
    usage = reply.get("usage") if isinstance(reply, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) and not isinstance(total, bool) and 0 <= total < 10**9 else 0
