"""The trace of the call that is being answered, for whoever has something to add to it.

Where ``[telemetry]`` is off this is all there is: a look at a variable that holds None.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.gateway.tracing import CallTrace

CURRENT: ContextVar[CallTrace | None] = ContextVar("trace", default=None)
"""Set in the task that answers a call, while it does."""
