"""A client's model calls joined to the current episode, by hooks on its HTTP client.

The hooks work with the openai client (sync and async), and with any ``httpx`` or ``httpx2`` client that another
framework is given. They add headers to POST requests to the gateway alone: another provider learns nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from everloop.capture.open_episode import OpenEpisode
from everloop.ids import unique

CURRENT: ContextVar[OpenEpisode | None] = ContextVar("everloop_episode", default=None)
_LAST: ContextVar[dict[str, str] | None] = ContextVar("everloop_last_call", default=None)
MARK = "X-Everloop-Episode"
EPISODE = "everloop_episode"  # in a request's extensions: the episode that it belongs to


class Hooks:
    """``gateway()`` gives the gateway's URL at the time of the call; ``failed`` is told of an error in a hook."""

    def __init__(self, gateway: Callable[[], str | None], failed: Callable[[Exception], None]) -> None:
        self._gateway = gateway
        self._failed = failed

    def add_to(self, client: Any) -> None:
        """Add both hooks to an openai client or an HTTP client, once. Raises TypeError for anything else."""
        http: Any = client if hasattr(client, "event_hooks") else getattr(client, "_client", None)
        if not hasattr(http, "event_hooks"):
            raise TypeError(f"wrap takes an openai client or an httpx client, not {type(client).__name__}")
        if any(getattr(hook, "__self__", None) is self for hook in http.event_hooks["request"]):
            return
        waits = inspect.iscoroutinefunction(http.send)
        before, after = (self.before_async, self.after_async) if waits else (self.before, self.after)
        hooks = http.event_hooks
        http.event_hooks = {
            "request": [*hooks["request"], before],
            "response": [*hooks["response"], after],
        }

    def before(self, request: Any) -> None:
        try:
            self._mark(request)
        except Exception as error:  # never the agent's problem
            self._failed(error)

    def after(self, response: Any) -> None:
        try:
            self._note(response)
        except Exception as error:
            self._failed(error)

    async def before_async(self, request: Any) -> None:
        self.before(request)

    async def after_async(self, response: Any) -> None:
        self.after(response)

    def _mark(self, request: Any) -> None:
        episode = CURRENT.get()
        gateway = self._gateway()
        if episode is None or gateway is None or request.method != "POST" or MARK in request.headers:
            return
        if not str(request.url).startswith(f"{gateway}/v1/") or "/feedback" in request.url.path:
            return
        headers = self._headers(episode, request)
        request.headers.update(headers)
        request.extensions = {**request.extensions, EPISODE: episode}
        if (number := headers.get("X-Everloop-Seq")) is not None:
            episode.asked(int(number))

    def _headers(self, episode: OpenEpisode, request: Any) -> dict[str, str]:
        """A call that the openai client tries again keeps its number and key: it runs in the same context."""
        last = _LAST.get()
        again = request.headers.get("x-stainless-retry-count", "0") != "0"
        if again and last is not None and last.get(MARK, episode.name) == episode.name:
            return last
        headers = episode.headers()
        if episode.capture and "Idempotency-Key" not in request.headers:
            headers["Idempotency-Key"] = unique("once_")
        _LAST.set(headers)
        return headers

    def _note(self, response: Any) -> None:
        request = response.request
        episode = request.extensions.get(EPISODE)
        if episode is None or response.status_code >= 400:
            return
        number = request.headers.get("X-Everloop-Seq")
        episode.answered(None if number is None else int(number), response.headers.get("X-Everloop-Call"))
