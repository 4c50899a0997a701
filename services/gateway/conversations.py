"""Which episode a request belongs to, and which policy version that episode is on.

An agent that names its episodes is believed. One that does not is followed by what it says: a request whose
messages begin with an answered conversation continues that conversation's episode. Everything here is a bounded
cache: what is forgotten begins a new episode or is assigned anew, by the same hash.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any, NamedTuple

import orjson

from services.gateway.routes import Assignment

LIMIT = 50_000
AMBIGUOUS = ""


class Known(NamedTuple):
    """An episode that was in use at ``at`` (seconds, monotonic)."""

    policy: str
    assignment: Assignment
    at: float


class Conversation:
    """A running hash over the messages of one conversation, keyed by tenant, policy and subject.

    ``continued`` are the hashes after each assistant message but the last words: what an earlier answer would
    have left.
    """

    __slots__ = ("_hash", "continued")

    def __init__(self, tenant: str, policy: str, subject: str | None, messages: list[dict[str, Any]]) -> None:
        self._hash = hashlib.blake2b(f"{tenant}\0{policy}\0{subject}".encode(), digest_size=16)
        self.continued: list[bytes] = []
        for message in messages:
            self._hash.update(_canonical(message))
            if message["role"] == "assistant":
                self.continued.append(self._hash.copy().digest())

    def after(self, answer: dict[str, Any]) -> bytes:
        """The hash that the conversation has once it is answered so."""
        extended = self._hash.copy()
        extended.update(_canonical(answer))
        return extended.digest()


class Conversations:
    """The conversations and episodes of late. Used by the event loop alone."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._answered: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._episodes: OrderedDict[str, Known] = OrderedDict()

    def continues(self, conversation: Conversation, idle: float, now: float) -> str | None:
        """The episode that this request goes on with; None: a new one begins.

        Where two episodes were answered word for word alike, nobody can say which goes on: None.
        """
        for digest in reversed(conversation.continued):
            held = self._answered.get(digest)
            if held is not None and now - held[1] <= idle:
                return held[0] or None
        return None

    def answered(self, digest: bytes, episode: str, idle: float, now: float) -> None:
        held = self._answered.get(digest)
        if held is not None and held[0] != episode and now - held[1] <= idle:
            episode = AMBIGUOUS
        _keep(self._answered, digest, (episode, now), self._limit)

    def known(self, episode: str, idle: float, now: float) -> Known | None:
        held = self._episodes.get(episode)
        return held if held is not None and now - held.at <= idle else None

    def assigned(self, episode: str, policy: str, assignment: Assignment, now: float) -> None:
        _keep(self._episodes, episode, Known(policy, assignment, now), self._limit)

    def policy_of(self, episode: str) -> str:
        """The policy of an episode; empty where it is not known here (assembly takes it from the calls)."""
        held = self._episodes.get(episode)
        return "" if held is None else held.policy


def _keep(cache: OrderedDict[Any, Any], key: Any, value: Any, limit: int) -> None:
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > limit:
        cache.popitem(last=False)


def _canonical(message: dict[str, Any]) -> bytes:
    """What makes a message the same when an agent sends it back: clients add and drop empty fields."""
    content = message.get("content") or ""
    calls = message.get("tool_calls")
    if not calls and not message.get("tool_call_id"):
        return orjson.dumps((message["role"], content))
    asked = [(call.get("id"), call.get("function")) for call in calls or ()]
    return orjson.dumps((message["role"], content, asked, message.get("tool_call_id")), option=orjson.OPT_SORT_KEYS)
