"""How much a tenant may send: a bucket of tokens for each, filled at its own rate.

The log is first in, first out, so what keeps one hot tenant from delaying the others is that it is not let in faster
than its share. What was let in is never refused later.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from everloop.config import Config

from services.gateway.refusals import Refused

BURST_SECONDS = 2.0  # of a tenant's rate that may come at once


class Limits:
    """Counts requests, and events beyond the first of a request. Used by the event loop alone."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._rates = {name: its.per_second for name, its in config.tenants.items() if its.per_second}
        self._full = {name: max(1.0, BURST_SECONDS * rate) for name, rate in self._rates.items()}
        self._clock = clock
        self._held = {name: (full, clock()) for name, full in self._full.items()}

    def take(self, tenant: str) -> None:
        """One request. Raises Refused (429) with the seconds until the next one is taken."""
        rate = self._rates.get(tenant)
        if rate is None:
            return
        held = self._filled(tenant, rate)
        if held < 1:
            wait = str(math.ceil((1 - held) / rate))
            raise Refused(
                429,
                f"tenant {tenant!r} sends more than its {rate:g} requests and events a second (tenants.{tenant}."
                f"per_second); send this again after {wait} s",
                "rate_limited",
                headers={"Retry-After": wait},
            )
        self.charge(tenant, 1)

    def charge(self, tenant: str, count: int) -> None:
        """So many more that came with a request which was let in: they are waited for before the next one."""
        rate = self._rates.get(tenant)
        if rate is not None:
            self._held[tenant] = (self._filled(tenant, rate) - count, self._clock())

    def _filled(self, tenant: str, rate: float) -> float:
        held, since = self._held[tenant]
        return min(self._full[tenant], held + rate * (self._clock() - since))
