"""Who may do what on the cluster, from the writers and readers declared in :mod:`everloop.topics`. No kafka import.

Each service has a user of its own, and may no more than it needs: write what it writes, read what it reads, commit
for its own groups, keep the changelogs of its own handlers, and write transactions under its own names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from everloop.log.kafka.settings import Address
from everloop.topics import CHANGELOG, GROUPS, HANDLERS, OPERATOR, RELEASER, TOPICS

SERVICES = ("gateway", "assembler", "scorer", "learner", "releaser", OPERATOR)


class Grant(NamedTuple):
    """One permission, in Kafka's words. ``prefixed``: for every name that begins with ``name``."""

    user: str
    operation: str
    resource: str
    name: str
    prefixed: bool = False

    def __str__(self) -> str:
        return f"{self.user} may {self.operation} {self.resource} {self.name}{'*' if self.prefixed else ''}"


def user_of(service: str, address: Address) -> str:
    """The user of a service: ``everloop-gateway``, or ``<prefix>-gateway`` where the log has a prefix."""
    return f"{address.prefix or 'everloop'}-{service}"


def grants(address: Address) -> set[Grant]:
    """Every permission that there should be, for all services."""
    found = {grant for service in SERVICES[:-1] for grant in _service(service, address)}
    return found | set(_operator(address))


def _service(service: str, address: Address) -> Iterator[Grant]:
    user = user_of(service, address)
    for topic in TOPICS.values():
        if service in topic.writers:
            yield from _topic(user, address.qualified(topic.name), "WRITE")
        if service in topic.readers:
            yield from _topic(user, address.qualified(topic.name), "READ")
    for group in (group for group, its in GROUPS.items() if its == service):
        yield Grant(user, "READ", "GROUP", address.qualified(group))
    for handler in (handler for handler, its in HANDLERS.items() if its == service):
        yield from _topic(user, address.qualified(CHANGELOG + handler), "WRITE", "READ")
        yield from _writer(user, address.qualified(f"{handler}-"), prefixed=True)
    if service == RELEASER:
        yield from _writer(user, address.qualified(RELEASER))


def _writer(user: str, name: str, prefixed: bool = False) -> Iterator[Grant]:
    for operation in ("WRITE", "DESCRIBE"):
        yield Grant(user, operation, "TRANSACTIONAL_ID", name, prefixed)


def _topic(user: str, name: str, *operations: str) -> Iterator[Grant]:
    for operation in (*operations, "DESCRIBE"):
        yield Grant(user, operation, "TOPIC", name)


def _operator(address: Address) -> Iterator[Grant]:
    """All of what is ours: without a prefix, all of the cluster's topics, groups and writers."""
    for resource in ("TOPIC", "GROUP", "TRANSACTIONAL_ID"):
        if address.prefix:
            yield Grant(user_of(OPERATOR, address), "ALL", resource, f"{address.prefix}.", prefixed=True)
        else:
            yield Grant(user_of(OPERATOR, address), "ALL", resource, "*")
