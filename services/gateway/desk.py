"""What the desks share that take events from outside (``/v1/events``, ``/v1/feedback``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from everloop.config import Config
from everloop.ids import Ids

from services.gateway.capture import Capture
from services.gateway.conversations import Conversations
from services.gateway.door import Door
from services.gateway.metrics import Metrics
from services.gateway.refusals import Refused

MOST = 1000


@dataclass(frozen=True, slots=True)
class Desk:
    """One that takes events, with all that it works with. Used by the event loop alone."""

    config: Config
    door: Door
    ids: Ids
    conversations: Conversations
    capture: Capture
    metrics: Metrics

    def policy(self, tenant: str, given: Any, episode: str, where: str, otherwise: str = "") -> str:
        """The policy that an event is about; empty where nobody says. Raises Refused (422) for none of the tenant's."""
        policy = given or self.conversations.policy_of(episode) or otherwise
        policies = self.config.tenants[tenant].policies
        if policy and (not isinstance(policy, str) or policy not in policies):
            raise unfit(f"{where}: there is no policy {str(policy)[:64]!r}; you have: {', '.join(policies)}", "policy")
        return str(policy)


def batch(body: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The list under ``name``: 1 to 1000 objects. Raises Refused (422)."""
    items = body[name]
    if not isinstance(items, list) or not 0 < len(items) <= MOST or not all(isinstance(item, dict) for item in items):
        raise unfit(f"'{name}' must be a list of 1 to {MOST} objects; send more in several requests", name)
    if len(body) > 1:
        raise unfit(f"beside '{name}' nothing else is read; put it into the list's objects", name)
    return items


def unfit(message: str, param: str | None = None) -> Refused:
    return Refused(422, message, "invalid_value", param)
