"""The log: ``connect(url)`` opens the backend that a URL names; ``open_log(config)`` the one of an installation."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

from everloop.config import Config
from everloop.errors import ConfigError
from everloop.log.base import Consumer, Log, NewRecord, Position, Record, TopicPartition, partition_of

__all__ = [
    "Consumer",
    "Log",
    "NewRecord",
    "Position",
    "Record",
    "TopicPartition",
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
) -> Log:
    """Open the log at ``url``; safe to call from many processes at once.

    ``sqlite:///relative.db`` or ``sqlite:////absolute.db`` is the embedded log; ``?max_bytes=<n>`` caps its file.
    ``partitions`` is how many a new topic gets; a topic that exists keeps its number. ``retention_hours`` counts
    from the append.

    Raises:
        ConfigError: the URL names no backend that is here.
        LogError: the file cannot be opened, or was written by a newer release.
    """
    parts = urlsplit(url)
    if parts.scheme != "sqlite" or parts.netloc or len(parts.path) < 2:
        raise ConfigError(f"log.url {url!r} names no log: use sqlite:///<file> (embedded; relative to the home)")
    from everloop.log.embedded import EmbeddedLog

    return EmbeddedLog(
        parts.path[1:],
        partitions=partitions,
        max_record_bytes=max_record_bytes,
        retention_seconds=retention_hours * 3600,
        max_bytes=_max_bytes(url, parts.query),
    )


def open_log(config: Config) -> Log:
    """The log of the installation that ``config`` describes; relative files lie below its home."""
    return connect(
        config.under_home(config.log.url),
        partitions=config.log.partitions,
        max_record_bytes=config.log.max_record_bytes,
        retention_hours=config.log.retention_hours,
    )


def _max_bytes(url: str, query: str) -> int | None:
    options = parse_qs(query, keep_blank_values=True)
    unknown = sorted(set(options) - {"max_bytes"})
    value = options.get("max_bytes", ["0"])[-1]
    if unknown or not value.isdecimal():
        raise ConfigError(f"log.url {url!r}: the only option is max_bytes=<a whole number of bytes>")
    return int(value) or None
