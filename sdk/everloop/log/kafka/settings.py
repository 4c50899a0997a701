"""Where the cluster is and as whom we come: the address from ``log.url``, the rest from ``[log]``. No kafka import."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from everloop.errors import ConfigError

PORT = 9092
PREFIX = r"[a-zA-Z0-9_-]{1,100}"
USE = "kafka://<host>:9092[,<host>:9092][/<prefix>]"
Security = Literal["plaintext", "tls", "sasl"]


@dataclass(frozen=True)
class Access:
    """``sasl`` is SCRAM-SHA-512 inside TLS: a password never travels in the clear. ``ca_file``: PEM; None: the
    machine's own authorities."""

    security: Security = "plaintext"
    ca_file: Path | None = None
    username: str = ""
    password: str = field(default="", repr=False)

    def context(self) -> ssl.SSLContext:
        """What TLS trusts. Raises ConfigError where ``ca_file`` is no certificate."""
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:
            why = "it is not a certificate in PEM" if isinstance(error, ssl.SSLError) else error.strerror
            raise ConfigError(f"log.ca_file {str(self.ca_file)!r} cannot be read: {why}") from None


@dataclass(frozen=True)
class Address:
    """``prefix`` stands before every topic, group and transaction, so that installations can share a cluster."""

    servers: tuple[str, ...]
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises ConfigError: not a Kafka URL, or one that carries what belongs into ``[log]``."""
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ConfigError(
                f"log.url names hosts alone, as {USE}; user and password belong into log.username and "
                "log.password_file, all else into [log]"
            )
        servers = tuple(_server(url, text.strip()) for text in parts.netloc.split(","))
        prefix = parts.path.strip("/")
        if parts.scheme != "kafka" or (prefix and not re.fullmatch(PREFIX, prefix)):
            raise ConfigError(f"log.url {url!r} names no log on Kafka: use {USE}; a prefix is of letters, digits, _, -")
        return cls(servers, prefix)

    def qualified(self, name: str) -> str:
        """The cluster's name for a topic, a group or a transaction of ours."""
        return f"{self.prefix}.{name}" if self.prefix else name

    def own(self, name: str) -> str:
        """Our name for a topic of the cluster."""
        return name.removeprefix(f"{self.prefix}.") if self.prefix else name

    def __str__(self) -> str:
        return ",".join(self.servers)


def _server(url: str, text: str) -> str:
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:/\s\[\]]+)(?::(\d{1,5}))?", text)
    if not found or int(found[2] or PORT) > 65535:
        raise ConfigError(f"log.url {url!r}: {text!r} is no host with a port: use {USE}")
    return f"{found[1]}:{found[2] or PORT}"
