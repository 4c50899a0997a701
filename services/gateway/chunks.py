"""Chat's chunks as server-sent events, as they are."""

from __future__ import annotations

from typing import Any, Protocol

import orjson

from services.gateway.ask import Ask
from services.gateway.refusals import Refused, error_fields
from services.gateway.response_events import Events

DONE = b"data: [DONE]\n\n"


class Spelled(Protocol):
    """A stream's form: the bytes of each chunk, of what comes after the last, and of an error in their stead."""

    def chunk(self, shown: dict[str, Any]) -> bytes: ...

    def last(self, usage: dict[str, Any]) -> bytes:
        """``usage`` is chat's chunk that says how much was used."""
        ...

    def failed(self, refused: Refused) -> bytes:
        """So that clients raise: a bare end would look like an answer."""
        ...


class Chunks:
    """The form of ``/v1/chat/completions`` and ``/v1/completions``."""

    def __init__(self, wants_usage: bool) -> None:
        self._wants_usage = wants_usage

    def chunk(self, shown: dict[str, Any]) -> bytes:
        return b"data: " + orjson.dumps(shown) + b"\n\n"

    def last(self, usage: dict[str, Any]) -> bytes:
        return (self.chunk(usage) if self._wants_usage else b"") + DONE

    def failed(self, refused: Refused) -> bytes:
        return self.chunk({"error": error_fields(refused.status, refused.message, refused.code, refused.param)})


def spelled(ask: Ask, id: str) -> Spelled:
    """The form that a request asks for; ``id`` is its answer's."""
    return Chunks(ask.wants_usage) if ask.echo is None else Events(ask, id)
