"""Asks judges behind OpenAI-compatible endpoints: from memory where it was asked before, within the day's budget, a
few at a time, each for so long. Whatever goes wrong is no opinion, by a name; nothing raises for what a judge does.

A critic is asked likewise. Where there is one answer alone it is first asked for another
(:func:`reward.judging.again`), and then which of the two is better.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
from everloop.event import Call

from reward.declaration import CriticDeclaration, JudgeDeclaration
from reward.judging import Opinion, Question, again, agreed, said_again
from reward.ledger import Ledger

AT_ONCE = 8  # questions under way
TRIES = 2
FAILED = 4
REST = 60.0  # seconds
PATIENCE = 120.0  # seconds for all that is asked together
LARGEST = 1_000_000  # bytes of a reply
CAPTURE = "X-Everloop-Capture"  # the gateway's header: what a critic is asked is no traffic
LASTING = (None, "refused", "nonsense")  # what the same question would be answered again


class Asked(NamedTuple):
    """``whose``: tenant and policy; ``day``: days since 1970, of event time. ``call``: the one to answer again where
    the question has one answer alone; None: that one is graded."""

    whose: tuple[str, str]
    judge: JudgeDeclaration | CriticDeclaration
    question: Question
    day: int
    call: Call | None = None

    @property
    def model(self) -> str:
        return self.judge.model or self.whose[1]

    def content(self, what: str) -> str:
        """A hash of the question, or of what else is asked, and of whom."""
        return self.question.content(
            what, *self.whose, self.judge.source, self.judge.url, self.model, self.judge.rubric
        )


SHOWN = 120  # characters of an endpoint's refusal


@dataclass
class Tally:
    """Of one judge or critic since the start. ``seconds`` and ``tokens`` are of the ``replies``."""

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
    trouble: str = ""  # why the newest question had no reply


class Asker:
    """Used by one thread. ``tallies`` by (tenant, policy, source). Raises sqlite3.Error where the disk fails."""

    def __init__(self, ledger: Ledger, patience: float = PATIENCE) -> None:
        self._ledger = ledger
        self._patience = patience
        self.tallies: dict[tuple[str, str, str], Tally] = {}

    def tally(self, one: Asked) -> Tally:
        return self.tallies.setdefault((*one.whose, one.judge.source), Tally())

    def ask(self, all: Sequence[Asked]) -> list[Opinion]:
        """The opinion on each, in order; a pair is asked in both orders. Takes ``patience`` seconds at most."""
        found = asyncio.run(self._all(all))
        for one, opinion in zip(all, found, strict=True):
            tally = self.tally(one)
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
            if one.call is not None:
                text, fault = await self._again(session, one, one.call)
                if not text or text == one.question.first:
                    return Opinion(None, fault)
                one = one._replace(question=one.question._replace(second=text))
            first = await self._one(session, one)
            if one.question.second is None or first.value is None:
                return first
            return agreed(first, await self._one(session, one._replace(question=one.question.swapped)))

    async def _one(self, session: aiohttp.ClientSession, one: Asked) -> Opinion:
        content = one.content("which")
        held = self._ledger.answer(content)
        if held is not None:
            self.tally(one).remembered += 1
            return Opinion(*held)
        body = lambda structured: one.question.body(one.model, one.judge.rubric, structured)  # noqa: E731
        reply = await self._tried(session, one, body)
        if isinstance(reply, str):
            return Opinion(None, reply)
        opinion = one.question.opinion(reply)
        self._ledger.keep(content, *opinion)
        return opinion

    async def _again(self, session: aiohttp.ClientSession, one: Asked, call: Call) -> tuple[str, str | None]:
        """Another answer to a call, and why there is none."""
        content = one.content("again")
        held = self._ledger.text(content)
        if held is not None:
            self.tally(one).remembered += 1
            return held, None
        reply = await self._tried(session, one, lambda _: again(one.model, call))
        if isinstance(reply, str):
            return "", reply
        text = said_again(reply)
        self._ledger.keep_text(content, text)
        return text, None if text else "nonsense"

    async def _tried(
        self, session: aiohttp.ClientSession, one: Asked, body: Callable[[bool], dict[str, Any]]
    ) -> dict[str, Any] | str:
        """The JSON of a reply to a question that was not asked before, or why there is none. ``body``: given whether
        with a schema."""
        tally, judge, fault = self.tally(one), one.judge, "down"
        for _ in range(TRIES):
            if time.monotonic() < tally.rests:
                return "resting"
            if not self._ledger.spend("/".join((*one.whose, judge.source)), one.day, judge.per_day):
                return "over_budget"
            reply = await self._post(session, judge, body(not tally.plain), tally)
            if not isinstance(reply, str):
                tally.failed = 0
                return reply
            fault = reply
            tally.failed += 1
            if tally.failed >= FAILED:
                tally.rests, tally.failed = time.monotonic() + REST, 0
        return fault

    async def _post(
        self,
        session: aiohttp.ClientSession,
        judge: JudgeDeclaration | CriticDeclaration,
        body: dict[str, Any],
        tally: Tally,
    ) -> dict[str, Any] | str:
        """One question: the reply, empty where it is no JSON object, or why there is none."""
        headers = {"Authorization": f"Bearer {judge.key_file.read_text().strip()}"} if judge.key_file else {}
        if isinstance(judge, CriticDeclaration):
            headers[CAPTURE] = "off"
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
            tally.trouble = f"{judge.url} did not reply in {judge.timeout:g} s"
            return "slow"
        except (aiohttp.ClientError, OSError) as error:
            tally.trouble = f"{judge.url}: {str(error) or type(error).__name__}"
            return "down"
        tally.trouble = "" if answer.status == 200 else f"{judge.url} answered {answer.status}: {_said(raw)}"
        if answer.status != 200:
            tally.plain |= answer.status in (400, 422)  # asked once more without the schema
            return "declined" if 400 <= answer.status < 500 and answer.status != 429 else "down"
        tally.replies += 1
        tally.seconds += time.monotonic() - began
        try:
            reply = json.loads(raw)
        except (ValueError, RecursionError):
            return {}
        tally.tokens += _tokens(reply)
        return reply if isinstance(reply, dict) else {}


def _said(raw: bytes) -> str:
    return " ".join(raw.decode("utf-8", "replace").split())[:SHOWN] or "nothing"


def _tokens(reply: object) -> int:
    usage = reply.get("usage") if isinstance(reply, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) and not isinstance(total, bool) and 0 <= total < 10**9 else 0
