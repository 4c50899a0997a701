"""The SDK's functions, and the one sender that a process has."""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import os
import threading
from collections.abc import Callable
from contextvars import Token
from types import TracebackType
from typing import Any, TypeVar

from everloop.capture.hooks import CURRENT, Hooks
from everloop.capture.open_episode import OpenEpisode
from everloop.capture.sender import Sender
from everloop.capture.settings import Settings, from_environment, origin_of
from everloop.capture.tally import Stats
from everloop.feedback import FeedbackKind

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C")

KEY_PREFIX = "ek_"

_making = threading.Lock()
_sender: Sender | None = None


def _the_sender() -> Sender:
    if _sender is None:
        _install(from_environment(), replace=False)
    assert _sender is not None
    return _sender


def _install(settings: Settings, replace: bool) -> None:
    global _sender
    with _making:
        if _sender is not None and not replace:
            return
        before, _sender = _sender, Sender(_usable(settings))
    if before is not None:
        before.outbox.close(before.settings.exit_timeout)


def _usable(settings: Settings) -> Settings:
    """A URL that cannot be one is as good as none: counted as "not configured"; with ``strict`` a ValueError."""
    if settings.url is None or settings.url.startswith(("http://", "https://")):
        return settings
    if settings.strict:
        raise ValueError(f"the gateway's URL starts with http:// or https://, not {settings.url!r}")
    return settings._replace(url=None)


def _at_exit() -> None:
    if _sender is not None:
        _sender.outbox.close(_sender.settings.exit_timeout)


def _after_fork_in_child() -> None:
    global _making
    _making = threading.Lock()
    if _sender is not None:
        _sender.after_fork_in_child()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

_hooks = Hooks(
    gateway=lambda: _the_sender().settings.origin,
    failed=lambda error: _the_sender().outbox.drop("hook failed", repr(error)),
)


def configure(url: str | None = None, api_key: str | None = None, **settings: Any) -> None:
    """Say where the gateway is; what is left out comes from EVERLOOP_URL and EVERLOOP_API_KEY.

    Further settings are those of ``everloop.capture.settings.Settings``: ``strict``, ``max_queue_bytes``, …
    Calling it again sends what is queued to the old gateway, for at most ``exit_timeout`` seconds, and then
    goes on with the new one.
    """
    found = from_environment()
    _install(Settings(url=url or found.url, api_key=api_key or found.api_key, **settings), replace=True)


def wrap(client: C) -> C:
    """Join a client's model calls to the episode that is current when they are made. Returns the same client.

    Takes the openai client, sync or async, or an ``httpx`` client that another framework is given. Where nothing
    says where the gateway is, and the openai client has a key of ours (``ek_…``), its ``base_url`` and key do.

    Raises TypeError where the client is of another kind.
    """
    url, key = getattr(client, "base_url", None), getattr(client, "api_key", None)
    if _the_sender().settings.url is None and url is not None and str(key).startswith(KEY_PREFIX):
        configure(origin_of(str(url)), str(key))
    _hooks.add_to(client)
    return client


def current() -> OpenEpisode | None:
    """The episode that this thread or task is in; None: none."""
    return CURRENT.get()


class Recorder:
    """Makes an episode for each ``with`` block, or each call of the function that it decorates."""

    def __init__(self, name: str | None, **how: Any) -> None:
        self._name = name
        self._how = how
        self._open: list[tuple[OpenEpisode, Token[OpenEpisode | None]]] = []

    def __enter__(self) -> OpenEpisode:
        episode = OpenEpisode(_the_sender(), self._name, **self._how)
        self._open.append((episode, CURRENT.set(episode)))
        return episode

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        episode, token = self._open.pop()
        with contextlib.suppress(ValueError):  # a generator closed from another context, which never had the episode
            CURRENT.reset(token)
        episode.end()

    async def __aenter__(self) -> OpenEpisode:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def __call__(self, function: F) -> F:
        """Each call of ``function`` is an episode of its own: ``everloop.current()`` inside.

        Raises TypeError where that cannot be: a name for all calls, or a generator, which returns before it runs.
        """
        if self._name is not None:
            raise TypeError("a decorator takes no episode name: every call would join one episode")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError("a generator cannot be decorated; use 'with everloop.record()' where it is consumed")
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def recorded_async(*args: Any, **kwargs: Any) -> Any:
                with Recorder(None, **self._how):
                    return await function(*args, **kwargs)

            return recorded_async  # type: ignore[return-value]

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            with Recorder(None, **self._how):
                return function(*args, **kwargs)

        return recorded  # type: ignore[return-value]


def record(
    name: str | None = None,
    *,
    policy: str | None = None,
    subject: str | None = None,
    capture: bool = True,
    whole: bool = True,
) -> Recorder:
    """Make one episode of all calls in a ``with`` (or ``async with``) block, or in a decorated function.

    ``name`` is the agent's own name for it, such as a ticket's number; without one it gets a random one.
    ``subject`` is the person it is about: consent, retention and erasure act by it. ``capture=False`` keeps all of
    it out of capture. ``whole=False``: other processes, or later requests, add to the same name, so that nothing
    is numbered and the end of the block does not end the episode.
    """
    return Recorder(name, policy=policy, subject=subject, capture=capture, whole=whole)


def give_feedback(
    response_id: object = None,
    *,
    episode: str | None = None,
    policy: str | None = None,
    thumb: bool | int | None = None,
    rating: float | None = None,
    correction: str | None = None,
    comment: str | None = None,
    outcome: float | None = None,
    name: str | None = None,
    rater: str | None = None,
) -> None:
    """Feedback about a response (the openai client's, or its id), or about an episode by its name.

    ``everloop.give_feedback(response_id=answer.id, thumb=1)``. Several words may be given at once. ``name`` says
    which outcome it is.
    """
    sender = _the_sender()
    said: list[tuple[FeedbackKind, dict[str, Any]]] = [
        (FeedbackKind.THUMB, {"value": thumb}),
        (FeedbackKind.RATING, {"value": rating}),
        (FeedbackKind.CORRECTION, {"text": correction}),
        (FeedbackKind.COMMENT, {"text": comment}),
        (FeedbackKind.OUTCOME, {"value": outcome}),
    ]
    given = [(kind, fields) for kind, fields in said if next(iter(fields.values())) is not None]
    if not given or (response_id is None) == (episode is None):
        words = "thumb, rating, correction, comment or outcome"
        sender.refuse("invalid", ValueError(f"give either a response_id or an episode, and at least one {words}"))
        return
    for kind, fields in given:
        if kind is FeedbackKind.OUTCOME:
            fields = {**fields, "name": name}
        sender.say(kind, {"episode": episode, "policy": policy}, response_id, rater, fields)


def stats() -> Stats:
    """How much was sent, is queued, and was dropped, by reason."""
    return _the_sender().outbox.stats()


def flush(timeout: float = 5.0) -> bool:
    """Wait until what is queued now was sent or dropped; False where ``timeout`` seconds were not enough."""
    return _the_sender().outbox.flush(timeout)
