"""What happened, into the log: the events of a call, and the promise that they are durable.

Events are built as plain fields and sealed, without making a model of them: a test holds that they always are an
``Event``. A redaction hook sees the fields of each event before anything is stored; where it fails, nothing is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from everloop.errors import ConfigError, LogError
from everloop.event import Event
from everloop.log.base import NewRecord
from everloop.topics import EVENTS
from everloop.wire import BlobStore, seal
from pydantic import ValidationError

from services.gateway.answer import Answer, Choice
from services.gateway.ask import Ask
from services.gateway.metrics import Metrics
from services.gateway.refusals import Refused
from services.gateway.scribe import STALLED, Appends
from services.gateway.turns import Turn

logger = logging.getLogger(__name__)
Fields = dict[str, Any]
Waiting = list[tuple[Sequence[NewRecord], "asyncio.Future[None]"]]
LARGE = 131_072  # bytes of a request above which sealing may touch the disk and is done in a thread


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
    """Makes events durable. Used by the event loop; the log does its waiting in its own thread."""

    def __init__(
        self,
        log: Appends,
        blobs: BlobStore,
        inline_bytes: int,
        hook: Callable[[Fields], Fields] | None,
        metrics: Metrics,
    ) -> None:
        self._log = log
        self._blobs = blobs
        self._inline = inline_bytes
        self._hook = hook
        self._metrics = metrics
        self._waiting: Waiting = []
        self._busy = False
        self._handed = 0.0

    async def records(self, turn: Turn, ask: Ask, answer: Answer, error: str | None = None) -> list[NewRecord]:
        """The events of one request, sealed: one call each choice. Raises Refused (500) where redaction fails."""
        latency = time.monotonic() - turn.began
        events = [call_event(turn, ask, answer, choice, latency, error) for choice in answer.choices]
        return await self.sealed(events, {"request": turn.request}, turn.size)

    async def sealed(self, events: list[Fields], headers: dict[str, str], size: int) -> list[NewRecord]:
        """Redacted and sealed, ready to append. Large ones may go to the blob store: in a thread."""
        if size < LARGE:
            return [self._seal(event, headers) for event in events]
        return await asyncio.to_thread(lambda: [self._seal(event, headers) for event in events])

    def store(self, records: Sequence[NewRecord]) -> asyncio.Future[None]:
        """Resolves once the records are durable, else raises LogError (LogFull). Wait for it with a shield.

        What comes in while the log is busy goes to it together, as one append.
        """
        loop = asyncio.get_running_loop()
        stored: asyncio.Future[None] = loop.create_future()
        if self._busy and time.monotonic() - self._handed > STALLED:
            stored.set_exception(LogError(f"the log has given no answer for {STALLED:g} s; nothing was written"))
            return stored
        self._waiting.append((records, stored))
        if not self._busy:
            self._busy, self._handed = True, time.monotonic()
            loop.call_soon(self._hand_over)
        return stored

    async def stored(self, records: Sequence[NewRecord]) -> None:
        """Store, and return once durable. Raises LogError; a client that leaves meanwhile changes nothing."""
        await asyncio.shield(self.store(records))

    def store_later(self, records: Sequence[NewRecord]) -> None:
        """For what no answer waits on (a failed or abandoned call): what the log refuses is counted as dropped."""
        self.store(records).add_done_callback(lambda stored: self._count_lost(stored, len(records)))

    def _hand_over(self) -> None:
        """Give the log what waits, as one append; what comes meanwhile goes with the next."""
        waiting, self._waiting = self._waiting, []
        self._handed = time.monotonic()
        loop = asyncio.get_running_loop()
        records = [record for records, _ in waiting for record in records]
        self._metrics.captured(len(records), sum(len(record.value or b"") for record in records))
        try:
            done = self._log.append_soon(records)
        except LogError as error:
            self._settle(waiting, error)
            return
        done.add_done_callback(lambda done: self._tell(loop, waiting, done.exception()))

    def _tell(self, loop: asyncio.AbstractEventLoop, waiting: Waiting, error: BaseException | None) -> None:
        """Called in the log's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everybody who waited
            loop.call_soon_threadsafe(self._settle, waiting, error)

    def _settle(self, waiting: Waiting, error: BaseException | None) -> None:
        for _, stored in waiting:
            if error is None:
                stored.set_result(None)
            else:
                stored.set_exception(error)
        self._busy = bool(self._waiting)
        if self._busy:
            self._hand_over()

    def _count_lost(self, stored: asyncio.Future[None], records: int) -> None:
        error = stored.exception()
        if error is not None:
            self._metrics.dropped.inc(records)
            logger.error("%d events of unanswered calls could not be recorded: %s", records, error)

    def _seal(self, event: Fields, headers: dict[str, str]) -> NewRecord:
        if self._hook is not None:
            event = redact(event, self._hook)
        return NewRecord(
            EVENTS.name,
            f"{event['tenant']}/{event['episode']}",
            seal(event, self._blobs, self._inline),
            {"schema": "Event", "id": event["id"], **headers},
            event["time"],
        )


def call_event(turn: Turn, ask: Ask, answer: Answer, choice: Choice, latency: float, error: str | None) -> Fields:
    """The fields of the event of one choice: an ``Event`` with a ``Call``."""
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
            "model": turn.base,
            "sampling": ask.sampling,
            "tokens": None if error else answer.tokens(choice),
            "release": assignment.release,
            "arm": assignment.arm,
            "probability": assignment.probability,
            "latency": latency,
            "error": error,
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


def redact(event: Fields, hook: Callable[[Fields], Fields]) -> Fields:
    """The event as the hook leaves it.

    The hook gets a copy of its own, without token ids. Where it changed any word of a call, the ids go too: they
    spell the words that it took out.

    Raises:
        Refused: 500; the hook raised, returned no event, or changed whose event it is.
    """
    tokens = event["payload"].get("tokens")
    before = Event.model_validate({**event, "payload": {**event["payload"], "tokens": None}}).model_dump()
    try:
        after = Event.model_validate(hook(Event.model_validate(before).model_dump())).model_dump()
    except ValidationError as error:
        raise _unredacted(f"it returned what is no event: {error}") from error
    except Exception as error:  # whatever a hook of somebody else's does, nothing may be stored unredacted
        raise _unredacted(f"it raised {type(error).__name__}") from error
    if any(after[name] != before[name] for name in FIXED):
        raise _unredacted(f"it changed one of {', '.join(FIXED)}, which say whose event it is")
    if tokens is not None and after["payload"] == before["payload"]:
        after["payload"]["tokens"] = tokens
    return after


def _unredacted(why: str) -> Refused:
    logger.error("the redaction hook failed: %s", why)
    return Refused(
        500,
        f"The redaction hook (gateway.redact) failed: {why}. Nothing was recorded, and the answer is withheld. "
        "Mend the hook and start the gateway again, or send 'X-Everloop-Capture: off'.",
        "redaction_failed",
    )
