"""What a broker is told: its ``server.properties`` as a pure function of a few settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ADMIN = "admin"
"""The user of a secured broker to whom nothing is forbidden: who makes topics and grants."""

QUIET = {
    "auto.create.topics.enable": "false",
    "default.replication.factor": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "group.initial.rebalance.delay.ms": "0",
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "1000",
    "num.network.threads": "2",
    "num.io.threads": "4",
    "background.threads": "4",
    "log.cleaner.dedupe.buffer.size": "16777216",
}
"""One small machine: a single replica, few internal partitions, few threads, 16 MB for the cleaner.

After a kill -9 the controller takes the new process for a double of the old one until the old one's session ended:
3 s instead of 9.
"""


@dataclass(frozen=True)
class Secured:
    """TLS with a certificate (PEM files), and with ``users`` SASL/SCRAM and an authorizer that denies by default.

    ``users``: password by name; :data:`ADMIN` among them.
    """

    certificate: Path
    key: Path
    authority: Path
    users: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """Ports are of 127.0.0.1. ``internal`` is the broker's own listener where that of clients is secured."""

    folder: Path
    port: int
    controller: int
    internal: int = 0
    secured: Secured | None = None
    more: dict[str, str] = field(default_factory=dict)


def properties(settings: Settings) -> str:
    """The text of ``server.properties``."""
    lines = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{settings.controller}",
        "controller.listener.names": "CONTROLLER",
        "log.dirs": str(settings.folder / "data"),
        **QUIET,
        **(_open(settings) if settings.secured is None else _closed(settings, settings.secured)),
        **settings.more,
    }
    return "".join(f"{key}={value}\n" for key, value in lines.items())


def _open(settings: Settings) -> dict[str, str]:
    return {
        "listeners": f"CLIENT://127.0.0.1:{settings.port},CONTROLLER://127.0.0.1:{settings.controller}",
        "listener.security.protocol.map": "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "CLIENT",
    }


def _closed(settings: Settings, secured: Secured) -> dict[str, str]:
    """Clients prove who they are; the broker speaks to itself on a plain port of the loopback."""
    ports = {"CLIENT": settings.port, "INTERNAL": settings.internal, "CONTROLLER": settings.controller}
    protocol = "SASL_SSL" if secured.users else "SSL"
    lines = {
        "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in ports.items()),
        "listener.security.protocol.map": f"CLIENT:{protocol},INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "INTERNAL",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(settings.folder / "identity.pem"),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(secured.authority),
    }
    if secured.users:
        scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        lines |= {
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.client.scram-sha-512.sasl.jaas.config": scram,
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": f"User:{ADMIN};User:ANONYMOUS",
        }
    return lines
