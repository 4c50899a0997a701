"""The stage before the first user: the candidate answers recent prompts, and nobody sees what it says.

Each answer stands beside the one that was given then, so a prompt that is hard for anybody blames nobody: where the
candidate's is wrong and the other was not, or the other way round, a fair coin is tossed if the adapter makes no
difference (McNemar's exact test, looked at once). Lengths are compared by the mean log ratio and its standard error.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from everloop.config import CanaryConfig, PolicyConfig
from everloop.errors import ServingError, UnknownAdapter
from everloop.event import Call
from everloop.serving.base import Answering
from scipy import stats

from pipelines.behaviour import asks_back, refuses
from pipelines.gate import TOLERANCE
from services.releaser.answers import is_broken, is_empty, length, text_of
from services.releaser.questions import patiently, plain
from services.releaser.traffic import AWAY, TOLD

AT_ONCE = 4  # users come first
CERTAINTY = 0.01
SAID = {"refusing": refuses, "asking_back": asks_back}
SAYS = TOLD | {"refusing": "answers declined", "asking_back": "answers asked what was meant"}
ERRORS = 3.0  # standard errors that a longer answer must be longer by


class Shadow(NamedTuple):
    """``breach``: why no user should see the candidate; None: nothing speaks against it."""

    prompts: int
    breach: str | None
    counts: dict[str, int]

    def numbers(self) -> dict[str, Any]:
        return {"prompts": self.prompts, **self.counts}


async def shadow(serving: Answering, adapter: str, calls: Sequence[Call], config: PolicyConfig) -> Shadow:
    """Ask, and compare. Raises ServingError where no engine answers: that says nothing of the candidate."""
    gate = asyncio.Semaphore(AT_ONCE)
    asked = [call for call in calls if not call.error][: config.canary.shadow]
    try:
        async with asyncio.TaskGroup() as group:  # where one fails the others are not asked: they may end engines too
            tasks = [group.create_task(_answer(serving, gate, adapter, call, config.max_tokens)) for call in asked]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    outputs = [task.result() for task in tasks]
    pairs = [(call, output) for call, output in zip(asked, outputs, strict=True) if output != REFUSED]
    return judged(pairs, config.canary)


REFUSED: dict[str, Any] = {"refused": True}
"""The engine would not take this request from any model."""


async def _answer(
    serving: Answering, gate: asyncio.Semaphore, adapter: str, call: Call, longest: int
) -> dict[str, Any] | None:
    """The message; None where the call failed."""
    sampling = call.sampling
    body: dict[str, Any] = {
        "model": adapter,
        "messages": [plain(message) for message in call.messages],
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens or longest,
    }
    if call.tools:
        body["tools"] = list(call.tools)
    async with gate:
        try:
            answer = await patiently(serving, "chat/completions", body)
        except ServingError as error:
            if isinstance(error, UnknownAdapter) or error.code in AWAY:
                raise
            return None if error.status >= 500 else REFUSED
    message: dict[str, Any] = answer["choices"][0]["message"]
    return message


def judged(pairs: Sequence[tuple[Call, dict[str, Any] | None]], config: CanaryConfig) -> Shadow:
    """What the candidate's answers are beside those that were given then."""
    limits = {"failed": config.max_error_share, "empty": config.max_empty_share, "broken": config.max_broken_share}
    counts, breach = dict.fromkeys((*limits, *SAID), 0), None
    for what in counts:
        wrong = [(_wrong(what, output, call), _wrong(what, plain(call.output), call)) for call, output in pairs]
        new, old = wrong.count((True, False)), wrong.count((False, True))
        counts[what], before = sum(now for now, _ in wrong), sum(then for _, then in wrong)
        most = limits[what] * len(pairs) if what in limits else TOLERANCE * before
        sure = new > 0 and stats.binom.sf(new - 1, new + old, 0.5) < CERTAINTY
        if breach is None and sure and counts[what] > most:
            breach = f"{counts[what]} of {len(pairs)} {SAYS[what]} on recent prompts ({before} when they were asked)"
    return Shadow(len(pairs), breach or _longer(pairs, config.max_length_ratio), counts)


def _wrong(what: str, output: dict[str, Any] | None, call: Call) -> bool:
    if output is None or what == "failed":
        return output is None and what == "failed"
    if what in SAID:
        return SAID[what](text_of(output)) and not output.get("tool_calls")
    return is_empty(output) if what == "empty" else is_broken(output, call.tools)


def _longer(pairs: Sequence[tuple[Call, dict[str, Any] | None]], limit: float) -> str | None:
    both = [(output, plain(call.output)) for call, output in pairs if output is not None]
    said = [(new, old) for new, old in both if not is_empty(new) and not is_empty(old)]
    ratios = np.array([math.log1p(length(new)) - math.log1p(length(old)) for new, old in said])
    if len(ratios) < 20 or ratios.mean() <= max(math.log(limit), ERRORS * ratios.std(ddof=1) / math.sqrt(len(ratios))):
        return None
    return (
        f"its answers to recent prompts are {math.exp(ratios.mean()):.1f} times as long; at most {limit:g} is allowed"
    )
