"""What became of everything that the agent handed to the SDK: counted, and logged once for each reason."""

from __future__ import annotations

import logging
from collections import Counter
from typing import NamedTuple

logger = logging.getLogger("everloop")


class Stats(NamedTuple):
    """``sent`` items that the gateway acknowledged, ``queued`` ones on their way, ``dropped`` ones by reason.

    Reasons: "not configured", "invalid", "not JSON", "too large", "queue full", "process ended", "no thread",
    "hook failed", or the gateway's refusal such as "http 404 not_found".

    Example: ``Stats(sent=12, queued=0, queued_bytes=0, retries=1, dropped={"queue full": 3})``
    """

    sent: int
    queued: int
    queued_bytes: int
    retries: int
    dropped: dict[str, int]


class Tally:
    """Counts. The caller holds a lock where it needs one: a lost increment of a Counter is not acceptable."""

    def __init__(self) -> None:
        self.sent = 0
        self.retries = 0
        self.dropped: Counter[str] = Counter()

    def drop(self, reason: str, detail: str = "", items: int = 1) -> None:
        """Count, and say so in the log the first time that this reason comes up."""
        if reason not in self.dropped:
            logger.warning("everloop drops what it cannot send (%s)%s; further ones are counted only, see "
                           "everloop.stats()", reason, f": {detail}" if detail else "")  # fmt: skip
        self.dropped[reason] += items
