"""From what the agent said to items in the outbox; the place where no exception gets past."""

from __future__ import annotations

import math
from typing import Any

import httpx

from everloop.capture import words
from everloop.capture.delivery import Delivery
from everloop.capture.outbox import Outbox, Route
from everloop.capture.settings import Settings
from everloop.feedback import FeedbackKind

TOKEN_TIMEOUT = 2.0


class Sender:
    """Checks, packs and queues. What can never be taken is counted, or with ``strict`` settings a ValueError."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._delivery = Delivery(settings)
        self.outbox = Outbox(settings, self._delivery.post)

    def say(
        self,
        kind: FeedbackKind,
        about: dict[str, str | None],
        call: object,
        rater: str | None,
        said: dict[str, Any],
    ) -> None:
        """Queue one piece of feedback. ``about``: the episode's name and policy, as far as they are known."""
        try:
            if kind is FeedbackKind.THUMB:
                said = {**said, "value": words.thumb_value(said["value"])}
            which = words.target(call)
            known = {} if "response_id" in which else {name: text for name, text in about.items() if text is not None}
            fields = words.fields_of(kind, {**known, **which}, rater, **said)
        except ValueError as error:
            self.refuse("invalid", error)
        else:
            self._queue("feedback", fields)

    def happened(self, event: dict[str, Any]) -> None:
        self._queue("events", event)

    def refuse(self, reason: str, error: Exception) -> None:
        """Count what can never be sent; raise it where that is wanted."""
        if self.settings.strict:
            raise error
        self.outbox.drop(reason, str(error))

    def _queue(self, route: Route, fields: dict[str, Any]) -> None:
        if self.settings.url is None:
            self.outbox.drop("not configured", "set EVERLOOP_URL, or call everloop.configure(url=…)")
            return
        try:
            body = words.packed(fields)
        except (TypeError, ValueError, RecursionError) as error:
            self.refuse("not JSON", ValueError(str(error)))
        else:
            self.outbox.put(route, body)

    def token(self, fields: dict[str, Any]) -> str | None:
        """Ask for a feedback token and wait, at most 2 s. None, counted, where it could not be had."""
        if self.settings.url is None or not math.isfinite(fields["ttl"]):
            self.outbox.drop("no feedback token")
            return None
        headers = {"Authorization": f"Bearer {self.settings.api_key or ''}"}
        try:
            url = f"{self.settings.origin}/v1/feedback/tokens"
            response = httpx.post(url, json=fields, headers=headers, timeout=TOKEN_TIMEOUT)
            return str(response.raise_for_status().json()["token"])
        except Exception as error:  # whatever the network or a wrong URL gives: the agent goes on
            self.outbox.drop("no feedback token", str(error))
            return None

    def after_fork_in_child(self) -> None:
        self._delivery.after_fork_in_child()
        self.outbox.after_fork_in_child()
