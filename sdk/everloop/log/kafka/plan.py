"""What differs between the cluster and what is declared, as a plan that is shown first and carried out then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from everloop.log.kafka.cluster import Cluster
from everloop.log.kafka.declared import Keeping, TopicSpec, spec_of
from everloop.log.kafka.grants import SERVICES, grants, user_of
from everloop.log.kafka.settings import Address
from everloop.topics import CHANGELOG, HANDLERS, TOPICS


class Change(NamedTuple):
    """One line of the plan. ``make`` None: nothing here can do it; ``what`` says who can."""

    what: str
    make: Callable[[], object] | None = None


class Plan(NamedTuple):
    """``notes``: what a person should know, and is no difference."""

    changes: list[Change]
    notes: list[str]


def declared(keeping: Keeping) -> list[TopicSpec]:
    """Every topic that there should be: the declared ones, and the changelog of each state that workers share."""
    return [spec_of(name, keeping) for name in (*TOPICS, *(CHANGELOG + handler for handler in HANDLERS))]


def plan(cluster: Cluster, address: Address, keeping: Keeping, *, add_partitions: bool = False) -> Plan:
    """Ask the cluster, and compare. ``add_partitions``: topics with too few get more (see the operations page)."""
    wanted = declared(keeping)
    found = cluster.describe([spec.name for spec in wanted])
    changes = [change for spec in wanted for change in _topic(cluster, spec, found, add_partitions)]
    users = {user_of(service, address) for service in SERVICES}
    has = cluster.grants(users)
    if has is None:
        return Plan(changes, ["this cluster keeps no permissions (it has no authorizer): everyone may do everything"])
    changes += [Change(f"grant: {g}", partial(cluster.grant, g)) for g in sorted(grants(address) - has)]
    changes += [Change(f"take away: {g}", partial(cluster.take, g)) for g in sorted(has - grants(address))]
    return Plan(changes, [])


def _topic(cluster: Cluster, spec: TopicSpec, found: Mapping[str, TopicSpec], add_partitions: bool) -> Iterator[Change]:
    has = found.get(spec.name)
    if has is None:
        more = ", ".join(f"{key}={value}" for key, value in spec.settings.items())
        yield Change(f"make topic {spec.name}: {_count(spec.partitions)}, {more}", partial(cluster.create, spec))
        return
    yield from _partitions(cluster, spec, has, add_partitions)
    differing = {key: value for key, value in spec.settings.items() if has.settings.get(key) != value}
    for key, value in differing.items():
        yield Change(
            f"set {key} of {spec.name}: {has.settings.get(key)} → {value}",
            partial(cluster.configure, spec.name, {key: value}),
        )
    if spec.replicas > 0 and spec.replicas != has.replicas:
        yield Change(
            f"{spec.name} has {has.replicas} replicas, log.replicas says {spec.replicas}: move it with the cluster's "
            "own tool (kafka-reassign-partitions)"
        )


def _partitions(cluster: Cluster, spec: TopicSpec, has: TopicSpec, add: bool) -> Iterator[Change]:
    if has.partitions > spec.partitions:
        yield Change(
            f"{spec.name} has {_count(has.partitions)}, declared are {spec.partitions}, and none can be taken away: "
            f"set log.partitions to {has.partitions}"
        )
    elif has.partitions < spec.partitions and add:
        yield Change(
            f"add partitions to {spec.name}: {has.partitions} → {spec.partitions}",
            partial(cluster.add_partitions, spec.name, spec.partitions),
        )
    elif has.partitions < spec.partitions:
        yield Change(
            f"{spec.name} has {_count(has.partitions)}, declared are {spec.partitions}: keys move when some are added, "
            "so drain the workers first ('Add partitions' in docs/operations.md), then apply with --add-partitions"
        )


def _count(partitions: int) -> str:
    return f"{partitions} partition{'s' if partitions > 1 else ''}"


def carry_out(changes: Iterable[Change]) -> None:
    """Make every change that can be made here, in order. Raises LogError at the first that fails."""
    for change in changes:
        if change.make is not None:
            change.make()
