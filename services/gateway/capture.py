"""What happened, into the log: the events of a call, and the promise that they are durable.

Events are built as plain fields, without making a model of them: a test holds that they always are an ``Event``. A
redaction hook sees the fields of each event before anything is stored; where it fails, nothing is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import ormsgpack
from everloop.errors import ConfigError, LogError
from everloop.event import Event
from pydantic import ValidationError

from services.gateway.answer import Answer, Choice
from services.gateway.ask import Ask
from services.gateway.metrics import Metrics
from services.gateway.refusals import Refused
from services.gateway.scribe import STALLED, Appends
from services.gateway.sealing import Fields, Unsealed
from services.gateway.trace import CURRENT
from services.gateway.turns import Turn

logger = logging.getLogger(__name__)
Waiting = list[tuple[Sequence[Unsealed], "asyncio.Future[None]"]]
LARGE = 131_072  # bytes of a request above which redaction is done in a thread
AHEAD = 2


def choice_call(call: str, index: int) -> str:
    """The call id of the n-th answer to a request; the first has the call id that the response id encodes."""
    if index == 0:
        return call
    return "call_" + hashlib.blake2b(f"{call}/{index}".encode(), digest_size=8).hexdigest()


def load_hook(name: str | None) -> Callable[[Fields], Fields] | None:
    """The redaction hook 'module:function'. Raises ConfigError where there is none of that name."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        hook = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"gateway.redact = {name!r} cannot be loaded: {error}; write it as 'module:function'"
        ) from None
    if not callable(hook):
        raise ConfigError(f"gateway.redact = {name!r} is not a function")
    return hook  # type: ignore[no-any-return]


class Capture:
    """Makes events durable. Used by the event loop; the log does its waiting elsewhere.

    ::

        store ─▶ waiting ──at most AHEAD appends under way──▶ log ─▶ durable: the futures of that append resolve

    What comes in while that many are under way goes to the log together, as one append: the next is being sealed
    while the last one waits for the disk.
    """

    def __init__(self, log: Appends, hook: Callable[[Fields], Fields] | None, metrics: Metrics) -> None:
        self._log = log
        self._hook = hook
        self._metrics = metrics
        self._waiting: Waiting = []
        self._under_way: deque[float] = deque()  # when each was handed over, the oldest first
        self._due = False

    async def calls(
        self, turn: Turn, ask: Ask, answer: Answer, error: str | None = None, code: str | None = None
    ) -> list[Unsealed]:
        """The events of one request: one call each choice. Raises Refused (500) where redaction fails."""
        latency = time.monotonic() - turn.began
        headers = {"request": turn.request}
        events = [
            Unsealed(
                call_event(turn, ask, answer, choice, latency, error, code),
                headers,
                None if error else answer.sampled(choice),
            )
            for choice in answer.choices
        ]
        trace = CURRENT.get()
        if trace is not None:
            trace.captured(turn, ask, answer, code)
            for event in events:
                event.event["payload"]["trace"] = trace.id
        return await self.redacted(events, turn.size)

    async def redacted(self, events: list[Unsealed], size: int) -> list[Unsealed]:
        """The events as the hook leaves them; of requests of many bytes (``size``), in a thread."""
        hook = self._hook
        if hook is None:
            return events
        if size < LARGE:
            return [redact(event, hook) for event in events]
        return await asyncio.to_thread(lambda: [redact(event, hook) for event in events])

    def store(self, events: Sequence[Unsealed]) -> asyncio.Future[None]:
        """Resolves once the events are durable, else raises LogError (LogFull). Wait for it with a shield."""
        loop = asyncio.get_running_loop()
        stored: asyncio.Future[None] = loop.create_future()
        if self._under_way and time.monotonic() - self._under_way[0] > STALLED:
            stored.set_exception(LogError(f"the log has given no answer for {STALLED:g} s; nothing was written"))
            return stored
        self._waiting.append((events, stored))
        trace = CURRENT.get()
        if trace is not None:
            trace.storing(stored)
        if not self._due and len(self._under_way) < AHEAD:
            self._due = True
            loop.call_soon(self._hand_over)  # what else comes in this round of the loop goes with it
        return stored

    async def stored(self, events: Sequence[Unsealed]) -> None:
        """Store, and return once durable. Raises LogError; a client that leaves meanwhile changes nothing."""
        await asyncio.shield(self.store(events))

    def store_later(self, events: Sequence[Unsealed]) -> None:
        """For what no answer waits on (a failed or abandoned call): what the log refuses is counted as dropped."""
        self.store(events).add_done_callback(lambda stored: self._count_lost(stored, len(events)))

    async def drained(self) -> None:
        """Return once all that came in is durable or refused; a log that gives no answer is not waited for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STALLED):
                while self._waiting or self._under_way:
                    await asyncio.sleep(0.01)

    def _hand_over(self) -> None:
        """Give the log what waits, as one append."""
        self._due = False
        waiting, self._waiting = self._waiting, []
        self._under_way.append(time.monotonic())
        loop = asyncio.get_running_loop()
        events = [event for events, _ in waiting for event in events]
        try:
            done = self._log.append_soon(events)
        except Exception as error:  # whatever it is, somebody waits for the outcome
            done = Future()
            done.set_exception(error)
        done.add_done_callback(lambda done: self._tell(loop, waiting, done))

    def _tell(self, loop: asyncio.AbstractEventLoop, waiting: Waiting, done: Future[int]) -> None:
        """Called in the log's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everybody who waited
            loop.call_soon_threadsafe(self._settle, waiting, done)

    def _settle(self, waiting: Waiting, done: Future[int]) -> None:
        self._under_way.popleft()
        error = done.exception()
        if error is None:
            self._metrics.captured(sum(len(events) for events, _ in waiting), done.result())
        for _, stored in waiting:
            if error is None:
                stored.set_result(None)
            else:
                stored.set_exception(error)
        if self._waiting and not self._due:
            self._hand_over()

    def _count_lost(self, stored: asyncio.Future[None], records: int) -> None:
        error = stored.exception()
        if error is not None:
            self._metrics.dropped.inc(records)
            logger.error("%d events of unanswered calls could not be recorded: %s", records, error)


def call_event(
    turn: Turn,
    ask: Ask,
    answer: Answer,
    choice: Choice,
    latency: float,
    error: str | None,
    code: str | None = None,
) -> Fields:
    """The fields of the event of one choice: an ``Event`` with a ``Call``, its tokens still to come."""
    call = choice_call(turn.call, choice.index)
    assignment = turn.assignment
    return event_fields(
        turn.tenant,
        turn.policy,
        turn.episode,
        "ev_" + call,
        turn.started,
        {
            "kind": "call",
            "id": call,
            "messages": ask.messages,
            "output": choice.message,
            "tools": ask.tools,
            "finish_reason": choice.finish_reason,
            "choice": choice.index,
            "policy_version": turn.served,
            "instead_of": turn.instead_of,
            "model": turn.model,
            "sampling": ask.sampling,
            "tokens": None,
            "release": assignment.release,
            "arm": assignment.arm,
            "probability": assignment.probability,
            "pinned": turn.pinned,
            "latency": latency,
            "error": error,
            "error_code": code,
            "trace": None,
        },
        subject=turn.subject,
        seq=turn.seq,
    )


def event_fields(
    tenant: str,
    policy: str,
    episode: str,
    id: str,
    time: float,
    payload: Fields,
    subject: str | None = None,
    seq: int | None = None,
) -> Fields:
    return {
        "schema_version": 1,
        "id": id,
        "tenant": tenant,
        "policy": policy,
        "episode": episode,
        "subject": subject,
        "seq": seq,
        "time": time,
        "synthetic": False,
        "payload": payload,
    }


FIXED = ("schema_version", "id", "tenant", "policy", "episode")


def redact(unsealed: Unsealed, hook: Callable[[Fields], Fields]) -> Unsealed:
    """The event as the hook leaves it.

    The hook gets a copy of its own, without token ids. Where it changed any word of a call, the ids go too: they
    spell the words that it took out.

    Raises:
        Refused: 500; the hook raised, returned no event, or changed whose event it is.
    """
    event, headers, sampled = unsealed
    tokens = event["payload"].get("tokens")
    before = Event.model_validate({**event, "payload": {**event["payload"], "tokens": None}}).model_dump()
    try:
        after = Event.model_validate(hook(Event.model_validate(before).model_dump())).model_dump()
    except ValidationError as error:
        raise _unredacted(f"it returned what is no event: {error}") from error
    except Exception as error:  # whatever a hook of somebody else's does, nothing may be stored unredacted
        raise _unredacted(f"it raised {type(error).__name__}") from error
    try:
        ormsgpack.packb(after)
    except TypeError as error:  # else it would fail with whatever is stored beside it
        raise _unredacted(f"it returned a value that cannot be stored: {error}") from error
    if any(after[name] != before[name] for name in FIXED):
        raise _unredacted(f"it changed one of {', '.join(FIXED)}, which say whose event it is")
    if after["payload"] != before["payload"]:
        return Unsealed(after, headers)
    if tokens is not None:
        after["payload"]["tokens"] = tokens
    return Unsealed(after, headers, sampled)


def _unredacted(why: str) -> Refused:
    logger.error("the redaction hook failed: %s", why)
    return Refused(
        500,
        f"The redaction hook (gateway.redact) failed: {why}. Nothing was recorded, and the answer is withheld. "
        "Mend the hook and start the gateway again, or send 'X-Everloop-Capture: off'.",
        "redaction_failed",
    )
