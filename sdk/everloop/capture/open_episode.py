"""An episode under way: what ``everloop.record`` hands to the agent."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

from everloop.capture import words
from everloop.capture.sender import Sender
from everloop.feedback import FeedbackKind
from everloop.ids import unique


class OpenEpisode:
    """One episode: calls made while it is current, and what the agent says about them.

    Every method returns at once. ``call`` says which answer is meant: the response object of the openai client,
    its ``id``, or a call id; without it feedback is about the episode as a whole, and a correction or preference
    about its newest answer. Thread-safe.
    """

    def __init__(
        self, sender: Sender, name: str | None, policy: str | None, subject: str | None, capture: bool, whole: bool
    ) -> None:
        self.name = name or unique("run-")
        self.policy = policy
        self.subject = subject
        self.capture = capture
        self.whole = whole
        self._sender = sender
        self._lock = threading.Lock()
        self._given = 0  # numbers: how many, so the next one
        self._unanswered: set[int] = set()
        self._newest_call: str | None = None
        self._ended = False

    def headers(self) -> dict[str, str]:
        """Headers of the next model call, for a client that is not wrapped: ``extra_headers=episode.headers()``.

        Ask anew for each call: a call takes the next number of the episode.
        """
        if not self.capture:
            return {"X-Everloop-Capture": "off"}
        headers = {"X-Everloop-Episode": self.name}
        if self.whole:
            headers["X-Everloop-Seq"] = str(self._next())
        if self.subject is not None:
            headers["X-Everloop-Subject"] = self.subject
        return headers

    def _next(self) -> int:
        with self._lock:
            number = self._given
            self._given += 1
        return number

    def asked(self, number: int) -> None:
        """A wrapped client sends the call with this number."""
        self._unanswered.add(number)

    def answered(self, number: int | None, call: str | None) -> None:
        """The gateway answered it; ``call`` is the call's id where the answer says it."""
        if number is not None:
            self._unanswered.discard(number)
        self._newest_call = call or self._newest_call

    def thumb(self, value: bool | int, *, call: object = None, rater: str | None = None) -> None:
        """Thumb up (True, 1) or down (False, -1)."""
        self._say(FeedbackKind.THUMB, call, rater, value=value)

    def rate(self, value: float, *, call: object = None, rater: str | None = None) -> None:
        """A rating from 0.0 (worst) to 1.0 (best)."""
        self._say(FeedbackKind.RATING, call, rater, value=value)

    def correct(self, text: str, *, call: object = None, rater: str | None = None) -> None:
        """The answer that would have been right."""
        self._say(FeedbackKind.CORRECTION, call or self._newest_call, rater, text=text)

    def prefer(self, chosen: str, *, over: str, call: object = None, rater: str | None = None) -> None:
        """``chosen`` is a better answer to the call's prompt than ``over``."""
        self._say(FeedbackKind.PREFERENCE, call or self._newest_call, rater, chosen=chosen, rejected=over)

    def outcome(self, value: float | bool, *, name: str | None = None, call: object = None) -> None:
        """What the product measured, from 0.0 (failure) to 1.0 (success): solved, bought, kept."""
        self._say(FeedbackKind.OUTCOME, call, None, value=value, name=name)

    def comment(self, text: str, *, call: object = None, rater: str | None = None) -> None:
        """Free words."""
        self._say(FeedbackKind.COMMENT, call, rater, text=text)

    def implicit(self, name: str, value: float = 1.0, *, call: object = None) -> None:
        """A sign that nobody said aloud, such as "kept", "edited", "retried", "abandoned"; 0.0 (bad) to 1.0 (good)."""
        self._say(FeedbackKind.IMPLICIT, call, None, value=value, name=name)

    def tool(
        self, name: str, arguments: object = None, result: object = None, *, error: bool = False, call: object = None
    ) -> None:
        """What a tool answered; values that are not text are sent as JSON. ``error``: the tool failed."""
        self._happened(
            kind="tool",
            id=unique("tool_"),
            name=name,
            arguments=words.as_text(arguments),
            result=words.as_text(result),
            error=error,
            call=words.call_id(call) or self._newest_call,
        )

    def call(
        self,
        messages: Iterable[object],
        output: object,
        *,
        tools: Iterable[object] = (),
        model: str = "",
        finish_reason: str | None = None,
        latency: float = 0.0,
    ) -> str:
        """A model call that did not pass through the gateway: recorded earlier, or answered by another provider.

        ``messages`` is its whole prompt and ``output`` the answer: dicts in OpenAI's form, or the openai client's
        own objects. ``latency`` in seconds. Returns the call's id.
        """
        call = unique("call_")
        self._newest_call = call
        self._happened(
            kind="call",
            id=call,
            messages=messages,
            output=output,
            tools=tools,
            model=model,
            finish_reason=finish_reason,
            latency=latency,
        )
        return call

    def end(self) -> None:
        """Nothing more comes; done by itself where the ``with`` block or the decorated function ends.

        Feedback may still be given afterwards.
        """
        if self._ended or not self.whole:
            return
        self._ended = True
        # A call that was never answered may not have reached the gateway: nobody must wait for it.
        self._happened(number=False, kind="end", events=self._given - len(self._unanswered))

    def feedback_token(self, ttl: float = 3600) -> str | None:
        """A token that can do nothing but give feedback about this episode, for a browser; valid ``ttl`` seconds.

        Asks the gateway and waits for it (in asyncio code: ``await asyncio.to_thread(episode.feedback_token)``).
        None where it could not be had: the agent goes on without.
        """
        return self._sender.token({"episode": self.name, "ttl": ttl}) if self.capture else None

    def _say(self, kind: FeedbackKind, call: object, rater: str | None, **said: Any) -> None:
        if self.capture:
            self._sender.say(kind, {"episode": self.name, "policy": self.policy}, call, rater, said)

    def _happened(self, number: bool = True, **payload: Any) -> None:
        if not self.capture:
            return
        event = {"id": unique("ev_"), "episode": self.name, "time": time.time(), "payload": payload}
        if self.policy is not None:
            event["policy"] = self.policy
        if self.subject is not None:
            event["subject"] = self.subject
        if number and self.whole:
            event["seq"] = self._next()
        self._sender.happened(event)
