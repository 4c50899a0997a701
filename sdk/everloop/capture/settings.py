"""Where the SDK sends to, and how much it may hold: given by ``configure`` or by the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple


class Settings(NamedTuple):
    """``url`` is the gateway's, with or without ``/v1``; None: the SDK records nothing, and counts that it did not.

    ``strict`` raises ValueError for feedback that can never be taken (a thumb of 3): wanted in tests, not in
    production, where it is counted and logged once.
    """

    url: str | None = None
    api_key: str | None = None
    strict: bool = False
    max_queue_bytes: int = 8 * 1024 * 1024
    max_item_bytes: int = 1024 * 1024
    max_batch_items: int = 500
    max_batch_bytes: int = 1024 * 1024
    linger: float = 0.02
    """Seconds that the first item of a batch waits for others."""
    timeout: float = 10.0
    """Seconds for one request of the background thread."""
    exit_timeout: float = 2.0
    """Seconds that the end of the process waits for what is still queued."""

    @property
    def origin(self) -> str | None:
        """The gateway's URL without ``/v1`` and trailing slashes."""
        return None if self.url is None else origin_of(self.url)


def origin_of(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def from_environment(environment: Mapping[str, str] | None = None) -> Settings:
    """EVERLOOP_URL and EVERLOOP_API_KEY; an empty variable counts as unset."""
    environment = os.environ if environment is None else environment
    return Settings(url=environment.get("EVERLOOP_URL") or None, api_key=environment.get("EVERLOOP_API_KEY") or None)
