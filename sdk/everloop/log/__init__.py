"""The log: ``connect(url)`` opens the backend that a URL names; ``open_log(config)`` the one of an installation."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

from everloop.config import Config
from everloop.errors import ConfigError
from everloop.log.base import Consumer, Log, NewRecord, Position, Record, TopicPartition, partition_of
from everloop.log.kafka.declared import Keeping
from everloop.log.kafka.settings import USE, Access, Address
from everloop.log_config import LogConfig

__all__ = [
    "Access",
    "Consumer",
    "Log",
    "NewRecord",
    "Position",
    "Record",
    "TopicPartition",
    "access_of",
    "connect",
    "open_log",
    "partition_of",
]


def connect(
    url: str,
    *,
    partitions: int = 4,
    max_record_bytes: int = 1_048_576,
    retention_hours: float = 720,
    replicas: int = 0,
    create_topics: bool = True,
    access: Access = Access(),  # noqa: B008 (immutable)
) -> Log:
    """Open the log at ``url``; safe to call from many processes at once.

    ``sqlite:///relative.db`` or ``sqlite:////absolute.db`` is the embedded log; ``?max_bytes=<n>`` caps its file.
    ``kafka://<host>:9092[,<host>:9092][/<prefix>]`` is a cluster; the prefix stands before all that is ours there.

    ``partitions`` is how many a new topic gets; a topic that exists keeps its number. ``retention_hours`` counts
    from the append. On Kafka alone: ``replicas`` of a new topic (0: as the cluster does by itself),
    ``create_topics`` False where an operator makes them, and ``access``.

    Raises:
        ConfigError: the URL names no backend that is here.
        LogError: the file cannot be opened, or was written by a newer release. A cluster that does not answer is
            found out later, by the first call that asks it.
    """
    scheme = urlsplit(url).scheme
    if scheme == "kafka":
        keeping = Keeping(partitions, max_record_bytes, retention_hours * 3600, replicas)
        return _kafka(Address.parse(url), access, keeping, create_topics)
    parts = urlsplit(url)
    if scheme != "sqlite" or parts.netloc or len(parts.path) < 2:
        raise ConfigError(
            f"log.url {url!r} names no log: use sqlite:///<file> (embedded; relative to the home), or {USE}"
        )
    from everloop.log.embedded import EmbeddedLog

    return EmbeddedLog(
        parts.path[1:],
        partitions=partitions,
        max_record_bytes=max_record_bytes,
        retention_seconds=retention_hours * 3600,
        max_bytes=_max_bytes(url, parts.query),
    )


def _kafka(address: Address, access: Access, keeping: Keeping, create_topics: bool) -> Log:
    try:
        from everloop.log.kafka.log import KafkaLog
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "kafka":
            raise
        raise ConfigError(
            "log.url names Kafka, and its client is not installed: pip install 'everloop[kafka]'"
        ) from None
    return KafkaLog(address, access, keeping, make=create_topics)


def open_log(config: Config) -> Log:
    """The log of the installation that ``config`` describes; relative files lie below its home."""
    its = config.log
    return connect(
        config.under_home(its.url),
        partitions=its.partitions,
        max_record_bytes=its.max_record_bytes,
        retention_hours=its.retention_hours,
        replicas=its.replicas,
        create_topics=its.create_topics,
        access=access_of(its),
    )


def access_of(its: LogConfig) -> Access:
    """As whom ``[log]`` comes. Raises ConfigError where the password's file cannot be read."""
    return Access(its.security, its.ca_file, its.username, its.secret())


def _max_bytes(url: str, query: str) -> int | None:
    options = parse_qs(query, keep_blank_values=True)
    unknown = sorted(set(options) - {"max_bytes"})
    value = options.get("max_bytes", ["0"])[-1]
    if unknown or not value.isdecimal():
        raise ConfigError(f"log.url {url!r}: the only option is max_bytes=<a whole number of bytes>")
    return int(value) or None
