"""Questions and orders to the cluster that concern no record: topics, ends, times, groups. Thread-safe.

::

    thread that asks ─▶ a place (there are :data:`MOST`) ─▶ an idle client, else a new one ─▶ answer ─▶ idle again
                                                                                           └─ error ─▶ thrown away

So nobody asks through a client that another asks through, or throws away: kafka-python refuses what is asked while
five answers are awaited on a connection. An idle client may have lost its broker meanwhile, and then waits before it
connects again: what it fails to send says nothing of the cluster, so it is asked once more, of a new one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from kafka import IsolationLevel, KafkaAdminClient, TopicPartition
from kafka import errors as kafka_errors
from kafka.admin import (
    ACL,
    ACLFilter,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ConfigResource,
    ConfigResourceType,
    MemberToRemove,
    OffsetSpec,
    ResourcePattern,
    ResourcePatternFilter,
    ResourceType,
)

from everloop.errors import LogError, LogRefused
from everloop.log.kafka.clients import METADATA_SECONDS, Clients, Unreachable
from everloop.log.kafka.declared import Keeping, TopicSpec, spec_of
from everloop.log.kafka.grants import Grant

SPREAD_SECONDS = 10.0  # for which a change may not be seen by every broker
SETTLE_SECONDS = 5.0
MOST = 4  # clients, each with a thread and a connection of its own
PLACE_SECONDS = 30.0  # that one who asks waits for a place
UNSETTLED = (  # a group has no coordinator for a moment, after a start of the broker or a change of leaders
    kafka_errors.CoordinatorNotAvailableError,
    kafka_errors.CoordinatorLoadInProgressError,
    kafka_errors.NotCoordinatorError,
)
LOST = (kafka_errors.NodeNotReadyError, kafka_errors.KafkaConnectionError)
T = TypeVar("T")


class Cluster:
    """See the module. ``make``: a topic that is missing is made as declared, else it is an error that says so."""

    def __init__(self, clients: Clients, keeping: Keeping, make: bool) -> None:
        self._clients = clients
        self._keeping = keeping
        self._make = make
        self._known: dict[str, tuple[int, float]] = {}
        self._idle: list[KafkaAdminClient] = []
        self._places = threading.BoundedSemaphore(MOST)
        self._lock = threading.Lock()
        self._closed = False

    def ask(self, what: str, step: Callable[[KafkaAdminClient], T]) -> T:
        """The answer to ``step``. Raises LogError, in bounded time."""
        if not self._places.acquire(timeout=PLACE_SECONDS):
            raise Unreachable(f"{what}: the questions before it had no answer within {PLACE_SECONDS:g} s")
        try:
            with self._clients.explained(what):
                idle = self._take()
                if idle is not None:
                    with suppress(*LOST), self._kept(idle):
                        return _settled(lambda: step(idle))
                with self._kept(self._clients.admin()) as admin:
                    return _settled(lambda: step(admin))
        finally:
            self._places.release()

    def _take(self) -> KafkaAdminClient | None:
        with self._lock:
            if self._closed:
                raise LogError("the log is closed")
            return self._idle.pop() if self._idle else None

    @contextmanager
    def _kept(self, admin: KafkaAdminClient) -> Iterator[KafkaAdminClient]:
        """A client for this thread alone; kept for the next where all went well."""
        try:
            yield admin
        except BaseException:
            admin.close()
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(admin)
                return
        admin.close()

    def partitions(self, topic: str) -> int:
        """See the port. A number that is known is used on where the cluster does not answer now."""
        count, until = self._known.get(topic, (0, 0.0))
        if count and time.monotonic() < until:
            return count
        try:
            found = self._find(topic) or self._create(topic)
        except LogError:
            if count:
                return count
            raise
        self._known[topic] = (found, time.monotonic() + METADATA_SECONDS)
        return found

    def _find(self, topic: str) -> int:
        name = self._clients.address.qualified(topic)
        (found,) = self.ask(f"looking for the topic {name!r}", lambda admin: admin.describe_topics([name]))
        error = kafka_errors.for_code(found["error_code"])
        if error is kafka_errors.UnknownTopicOrPartitionError:
            return 0
        if error is not kafka_errors.NoError:
            raise self._clients.explain(error(), f"looking for the topic {name!r}")
        return len(found["partitions"])

    def _create(self, topic: str) -> int:
        name = self._clients.address.qualified(topic)
        if not self._make:
            raise LogRefused(
                f"there is no topic {name!r}, and log.create_topics is off: 'everloop topics apply' makes it"
            )
        return self.create(spec_of(topic, self._keeping))

    def create(self, spec: TopicSpec) -> int:
        """Make a topic; its number of partitions, also where another process made it at the same time."""
        name = self._clients.address.qualified(spec.name)
        wanted = {
            "num_partitions": spec.partitions,
            "replication_factor": spec.replicas,
            "configs": spec.settings,
        }

        def make(admin: KafkaAdminClient) -> None:
            with suppress(kafka_errors.TopicAlreadyExistsError):
                admin.create_topics({name: wanted})
            admin.wait_for_topics([name])

        self.ask(f"making the topic {name!r}", make)
        return self._find(spec.name)

    def describe(self, topics: Sequence[str]) -> dict[str, TopicSpec]:
        """Those of the topics that are there, as they are: partitions, replicas and every setting."""
        address = self._clients.address
        names = [address.qualified(topic) for topic in topics]
        described = self.ask("describing topics", lambda admin: admin.describe_topics(names))
        there = {found["name"]: found["partitions"] for found in described if not found["error_code"]}
        if not there:
            return {}
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in there]
        settings = self.ask(
            "reading the settings of topics",
            lambda admin: admin.describe_configs(resources, config_filter="all"),
        )["topic"]
        return {
            address.own(name): TopicSpec(
                address.own(name),
                len(its),
                len(its[0]["replica_nodes"]),
                {key: str(found["value"]) for key, found in settings[name].items()},
            )
            for name, its in there.items()
        }

    def configure(self, topic: str, settings: Mapping[str, str]) -> None:
        name = self._clients.address.qualified(topic)
        resource = ConfigResource(ConfigResourceType.TOPIC, name, dict(settings))
        self.ask(f"setting {', '.join(settings)} of {name!r}", lambda admin: admin.alter_configs([resource]))

    def add_partitions(self, topic: str, count: int) -> None:
        name = self._clients.address.qualified(topic)
        self.ask(f"adding partitions to {name!r}", lambda admin: admin.create_partitions({name: count}))
        self._known.pop(topic, None)
        end = time.monotonic() + SPREAD_SECONDS
        while self._find(topic) < count and time.monotonic() < end:
            time.sleep(0.05)

    def grants(self, users: Collection[str]) -> set[Grant] | None:
        """What these users may; None where the cluster keeps no permissions."""
        every = ResourcePatternFilter(ResourceType.ANY, None, ACLResourcePatternType.ANY)
        wanted = ACLFilter(None, None, ACLOperation.ANY, ACLPermissionType.ALLOW, every)

        def read(admin: KafkaAdminClient) -> set[Grant] | None:
            try:
                return {_grant_of(acl) for acl in admin.describe_acls(wanted)[0]}
            except kafka_errors.SecurityDisabledError:
                return None

        found = self.ask("reading permissions", read)
        return None if found is None else {grant for grant in found if grant.user in users}

    def grant(self, grant: Grant) -> None:
        made = self.ask(f"granting: {grant}", lambda admin: admin.create_acls([_acl(grant, ACL, ResourcePattern)]))
        for error in made["failed"]:
            raise self._clients.explain(error(), f"granting: {grant}")

    def take(self, grant: Grant) -> None:
        wanted = _acl(grant, ACLFilter, ResourcePatternFilter)
        self.ask(f"taking away: {grant}", lambda admin: admin.delete_acls([wanted]))

    def end_offsets(self, topic: str) -> list[int]:
        """The next offset of each partition that is, or will be, of a committed record."""
        name = self._clients.address.qualified(topic)
        asked = {TopicPartition(name, number): OffsetSpec.LATEST for number in range(self.partitions(topic))}
        found = self._offsets(name, asked)
        return [found[partition].offset for partition in asked]

    def offset_at(self, topic: str, partition: int, milliseconds: int) -> int | None:
        """The first offset whose timestamp is this or later; None if there is none."""
        at = TopicPartition(self._clients.address.qualified(topic), partition)
        found = self._offsets(at.topic, {at: milliseconds}).get(at)
        return None if found is None or found.offset < 0 else int(found.offset)

    def _offsets(self, name: str, asked: Mapping[TopicPartition, Any]) -> dict[TopicPartition, Any]:
        return self.ask(
            f"asking for offsets of {name!r}",
            lambda admin: admin.list_partition_offsets(dict(asked), IsolationLevel.READ_COMMITTED),
        )

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """See the port; ``group`` and ``topic`` without prefix."""
        address = self._clients.address
        name, qualified = address.qualified(topic), address.qualified(group)
        asked = [TopicPartition(name, number) for number in range(self.partitions(topic))]
        found = self.ask(
            f"asking for the offsets of the group {qualified!r}",
            lambda admin: admin.list_group_offsets({qualified: asked}),
        )
        offsets = found.get(qualified, {})
        return {at.partition: int(its.offset) for at, its in offsets.items() if its.offset >= 0}

    def members(self, group: str) -> int:
        """How many a group has; ``group`` without prefix. 0 where there is no such group."""
        name = self._clients.address.qualified(group)
        try:
            found = self.ask(f"looking at the group {name!r}", lambda admin: admin.describe_groups([name]))
        except LogError as error:
            if isinstance(error.__cause__, kafka_errors.GroupIdNotFoundError):
                return 0
            raise
        return len(found[name]["members"])

    def remove_member(self, group: str, member_id: str, name: str) -> None:
        """A static member leaves its group: kafka-python's ``close`` leaves it in until its session ends."""
        member = MemberToRemove(member_id=member_id, group_instance_id=name)
        self.ask(f"leaving the group {group!r}", lambda admin: admin.remove_group_members(group, [member]))

    def close(self) -> None:
        """Who asks at this moment still has the answer."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for admin in idle:
            admin.close()


def _grant_of(acl: Any) -> Grant:
    pattern = acl.resource_pattern
    return Grant(
        acl.principal.removeprefix("User:"),
        acl.operation.name,
        pattern.resource_type.name,
        pattern.resource_name,
        pattern.pattern_type is ACLResourcePatternType.PREFIXED,
    )


def _acl(grant: Grant, kind: Any, pattern: Any) -> Any:
    how = ACLResourcePatternType.PREFIXED if grant.prefixed else ACLResourcePatternType.LITERAL
    where = pattern(ResourceType[grant.resource], grant.name, how)
    return kind(f"User:{grant.user}", "*", ACLOperation[grant.operation], ACLPermissionType.ALLOW, where)


def _settled(step: Callable[[], T]) -> T:
    """The answer to ``step``, asked again while a group's coordinator is being found."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            return step()
        except UNSETTLED:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
