"""Who is asked for one answer, one after the other, and who answers in the place of an engine that does not.

::

    the version assigned ──not held──▶ the live one ──not held──▶ the base model, or the provider that is incumbent
        └────────── no engine answers, or none in time: before the first token ──▶ the provider, of either role
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from everloop.errors import ServingError, UnknownAdapter
from everloop.event import PROVIDER
from everloop.serving.base import LOST, Answering, Route

from services.gateway import foreign
from services.gateway.ask import Ask
from services.gateway.provider import Provider

AWAY = frozenset(
    {"engine_unavailable", "engine_timeout", "overloaded", LOST}
)  # what an engine says, or nobody, in its place


@dataclass(slots=True)
class Aside:
    """What the provider would be asked: the request as it came, neither explored nor with the record's own wishes.

    ``unfit``: why it cannot be asked this; None: it can.
    """

    provider: Provider
    body: dict[str, Any]
    sampling: dict[str, Any]
    unfit: str | None


def aside(provider: Provider | None, ask: Ask) -> Aside | None:
    """Of a request that nothing was changed in yet; None: the policy has no provider."""
    if provider is None:
        return None
    return Aside(provider, dict(ask.body), dict(ask.sampling), foreign.unfit(ask.route, ask.body))


class Tries:
    """The versions of one answer, in turn, until one answers: iterate, and say what :meth:`failed`."""

    def __init__(self, versions: list[str]) -> None:
        self._versions = versions
        self._at = ""
        self._away: ServingError | None = None

    def __iter__(self) -> Iterator[str]:
        for version in self._versions:
            if self._away is None or version == PROVIDER:
                self._at = version
                yield version

    def failed(self, error: ServingError) -> None:
        """The one that was asked did not begin to answer. Raises ServingError where nobody else is asked."""
        if self._at == PROVIDER:
            raise error if self._away is None else _neither(self._away, error)
        if isinstance(error, UnknownAdapter):
            return
        later = self._versions[self._versions.index(self._at) + 1 :]
        if error.code not in AWAY or PROVIDER not in later:
            raise error
        self._away = error


def _neither(engine: ServingError, provider: ServingError) -> ServingError:
    """The engine's error, which tells what this request failed by, with the provider's words beside it."""
    engine.args = (f"{engine}; in its place, {provider}",)
    return engine


class Patient:
    """An engine that must answer, or begin its stream, within some seconds, since somebody else could answer."""

    def __init__(self, serving: Answering, seconds: float) -> None:
        self._serving = serving
        self._seconds = seconds

    async def complete(self, route: Route, body: dict[str, Any]) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._seconds):
                return await self._serving.complete(route, body)
        except TimeoutError:
            raise self._late() from None

    async def stream(self, route: Route, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        stream = self._serving.stream(route, body)
        try:
            try:
                async with asyncio.timeout(self._seconds):
                    first = await anext(stream, None)
            except TimeoutError:
                raise self._late() from None
            if first is not None:
                yield first
                async for chunk in stream:
                    yield chunk
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    def _late(self) -> ServingError:
        return ServingError(f"the engine gave nothing within {self._seconds:g} s", status=504, code="engine_timeout")
