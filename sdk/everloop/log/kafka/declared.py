"""How a topic is made on Kafka, from its line in :mod:`everloop.topics` and from ``[log]``. No kafka import."""

from __future__ import annotations

from dataclasses import dataclass

from everloop.topics import CHANGELOG, TOPICS

BATCH_OVERHEAD = 65_536  # bytes of a record's batch beyond the record itself
TOMBSTONE_SECONDS = 86_400  # for which a changelog keeps what says that an entry was deleted
CHANGELOG_SETTINGS = {
    "segment.bytes": str(64 * 1_048_576),
    "segment.ms": "3600000",
    "delete.retention.ms": str(TOMBSTONE_SECONDS * 1000),
}
"""Compaction leaves the newest segment alone: with Kafka's own (1 GB, a week) a state is read back with all that it
was in the meantime."""


@dataclass(frozen=True)
class Keeping:
    """What ``[log]`` says of all topics. ``replicas`` 0: as the cluster does by itself."""

    partitions: int = 4
    max_record_bytes: int = 1_048_576
    retention_seconds: float = 720 * 3600
    replicas: int = 0


@dataclass(frozen=True)
class TopicSpec:
    """A topic as it should be. ``settings``: those of its settings that are ours, by Kafka's names."""

    name: str
    partitions: int
    replicas: int
    settings: dict[str, str]


def spec_of(name: str, keeping: Keeping) -> TopicSpec:
    """``name`` is ours, without the installation's prefix. A changelog has the partitions it is first made with."""
    declared = TOPICS.get(name)
    partitions = 1 if declared is not None and not declared.partitioned else keeping.partitions
    compacted = name.startswith(CHANGELOG) or (declared is not None and declared.compacted)
    settings = {
        "cleanup.policy": "compact" if compacted else "delete",
        "retention.ms": "-1" if compacted else str(int(keeping.retention_seconds * 1000)),
        "max.message.bytes": str(keeping.max_record_bytes + BATCH_OVERHEAD),
        "message.timestamp.type": "CreateTime",
        "message.timestamp.after.max.ms": str(2 * 86_400_000),
    }
    if name.startswith(CHANGELOG):
        settings |= CHANGELOG_SETTINGS
    if keeping.replicas:
        settings["min.insync.replicas"] = str(max(1, keeping.replicas - 1))
    return TopicSpec(name, partitions, keeping.replicas or -1, settings)
