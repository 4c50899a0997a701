"""Events as the log takes them: what the engine said of tokens packed, the fields sealed.

Done where the log is written, in the scribe's process: the gateway's event loop hands events over as they are.
Log-probabilities may come as the engine's own JSON, which spells every token out (text, bytes, alternatives); the
record needs one number a token, and finds it without making an object of each.
"""

from __future__ import annotations

import errno
import math
import re
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import orjson
from everloop.config import Config
from everloop.errors import LogError, LogFull
from everloop.home import Home
from everloop.log.base import NewRecord, Position
from everloop.topics import EVENTS
from everloop.wire import BlobStore, seal

Fields = dict[str, Any]
HEADROOM = 4096  # bytes of a record that are not its body
# The only key of a token's that ends in b; inside a word a quote is escaped. What it takes too much is no number.
LOGPROB = re.compile(rb'b":([^,]+)')


class Sampled(NamedTuple):
    """What an engine said of the tokens of one answer.

    ``prompt`` and ``completion``: ids, or the JSON list of them. ``logprobs``: one number each sampled token, or the
    JSON list that they stand in, an object each token.
    ``agreed``: the engine's own counts are those of the ids. ``raw``: before temperature and truncation, where the
    engine gives them; else none.
    """

    prompt: list[int] | bytes
    completion: list[int] | bytes
    logprobs: list[float] | bytes
    agreed: bool
    raw: list[float] = []


class Unsealed(NamedTuple):
    """One event on its way to the log. ``sampled`` are a call's tokens, which its fields do not have yet."""

    event: Fields
    headers: dict[str, str] = {}
    sampled: Sampled | None = None

    def plain(self) -> tuple[Any, ...]:
        """As MessagePack takes it, and ``Unsealed(*plain)`` has it back."""
        event, headers, sampled = self
        return event, headers, None if sampled is None else tuple(sampled)


class Takes(Protocol):
    """The part of a log, or of a spool before one, that is needed here."""

    def append_soon(self, records: Sequence[NewRecord]) -> Future[list[Position]]: ...


class SealedLog:
    """A log that takes events: seals each, and appends it. Thread-safe."""

    def __init__(self, log: Takes, blobs: BlobStore, inline_bytes: int) -> None:
        self._log = log
        self._blobs = blobs
        self._inline = inline_bytes

    def append_soon(self, events: Sequence[Unsealed]) -> Future[int]:
        """As the log's; the future has the bytes of the records. Raises LogError (LogFull, RecordTooLarge).

        Blocks for the disk where an event is so large that it goes to the blob store.
        """
        try:
            records = [self._sealed(*event) for event in events]
        except OSError as error:
            no_room = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (LogFull if no_room else LogError)(f"the blob store failed: {error}; nothing was written") from error
        size = sum(len(record.value or b"") for record in records)
        durable: Future[int] = Future()
        self._log.append_soon(records).add_done_callback(lambda written: _pass_on(written, durable, size))
        return durable

    def _sealed(self, event: Fields, headers: dict[str, str], sampled: Sequence[Any] | None) -> NewRecord:
        if sampled is not None:
            event["payload"]["tokens"] = tokens(Sampled(*sampled))
        return NewRecord(
            EVENTS.name,
            f"{event['tenant']}/{event['episode']}",
            seal(event, self._blobs, self._inline),
            {"schema": "Event", "id": event["id"], **headers},
            event["time"],
        )


def _pass_on(written: Future[list[Position]], durable: Future[int], size: int) -> None:
    error = written.exception()
    if error is None:
        durable.set_result(size)
    else:
        durable.set_exception(error)


def sealed_log(config: Config, home: Home, log: Takes) -> SealedLog:
    """The installation's log, or the spool before it, as one that takes events."""
    return SealedLog(log, home.blobs, min(config.log.inline_bytes, config.log.max_record_bytes - HEADROOM))


def tokens(sampled: Sampled) -> Fields | None:
    """Fields of ``everloop.event.CallTokens``; None where the engine gave no ids, or none that can be any.

    ``checked`` says whether ids, log-probabilities and the engine's own counts agree: there is no tokenizer here to
    ask whether the ids say the text, which the trainer does (``trainer.gather.says``).
    """
    if not sampled.completion:
        return None
    try:
        ids = _ids(sampled.completion)
        numbers = _numbers(sampled.logprobs, len(ids))
        prompt, completion = _packed("i", _ids(sampled.prompt)), _packed("i", ids)
        logprobs = _packed("f", numbers)
        raw = _packed("f", sampled.raw) if sampled.raw else None
    except (struct.error, TypeError, OverflowError, orjson.JSONDecodeError):
        return None
    whole = bool(prompt) and len(numbers) == len(ids) and math.isfinite(sum(numbers))
    return {
        "prompt": prompt,
        "completion": completion,
        "logprobs": logprobs,
        "raw_logprobs": raw,
        "mode": "processed",
        "checked": whole and sampled.agreed,
        "routed_experts": None,
    }


def _ids(given: list[int] | bytes) -> list[int]:
    return orjson.loads(given) if isinstance(given, bytes) else given


def _numbers(logprobs: list[float] | bytes, count: int) -> list[float]:
    """One number each token. What cannot be found the short way is parsed; what cannot be parsed are none."""
    if not isinstance(logprobs, bytes):
        return logprobs
    ways: tuple[Callable[[bytes], list[float]], ...] = (_found, _parsed)
    for way in ways:
        try:
            numbers = way(logprobs)
        except (orjson.JSONDecodeError, KeyError):
            continue
        if len(numbers) == count:
            return numbers
    return []


def _found(content: bytes) -> list[float]:
    return orjson.loads(b"[%b]" % b",".join(LOGPROB.findall(content)))  # type: ignore[no-any-return]


def _parsed(content: bytes) -> list[float]:
    return [token["logprob"] for token in orjson.loads(content)]


def _packed(kind: str, numbers: list[Any]) -> bytes:
    """Numbers as the contract has them on the wire: little-endian, 32 bits each."""
    return struct.pack(f"<{len(numbers)}{kind}", *numbers)
