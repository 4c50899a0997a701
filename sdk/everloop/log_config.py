"""Settings of the log: where it is, how it is kept, and how a Kafka cluster is reached."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from everloop.errors import ConfigError
from everloop.section import Section, check_url

ServiceName = Literal["gateway", "assembler", "scorer", "learner", "releaser"]


class LogUser(Section):
    """As whom one service comes to Kafka, under ``everloop up``."""

    username: str = Field(min_length=1)
    password_file: Path = Field(description="holds the password alone")


class LogConfig(Section):
    url: str = Field(default="sqlite:///log.db", description="relative paths are below the home folder")
    partitions: int = Field(default=4, ge=1, le=1024)
    retention_hours: float = Field(default=720, gt=0)
    max_record_bytes: int = Field(default=1_048_576, ge=1024)
    inline_bytes: int = Field(default=262_144, ge=1024, description="larger bodies go to the blob store")
    security: Literal["plaintext", "tls", "sasl"] = Field(
        default="plaintext", description="to Kafka; 'sasl' is SCRAM-SHA-512 inside TLS"
    )
    ca_file: Path | None = Field(default=None, description="PEM of the authority that signed the brokers' certificates")
    username: str = ""
    password: str = Field(default="", repr=False)
    password_file: Path | None = Field(default=None, description="holds the password alone; better than password")
    users: dict[ServiceName, LogUser] = Field(
        default={}, description="of services that 'everloop up' starts, where each has its own; others are as above"
    )
    create_topics: bool = Field(default=True, description="False: 'everloop topics apply' alone makes Kafka topics")
    spool_bytes: int = Field(
        default=1_073_741_824, ge=1_048_576, description="of events that wait in the gateway's spool for Kafka"
    )
    replicas: int = Field(default=0, ge=0, le=32, description="of a new Kafka topic; 0: as the cluster does by itself")

    @field_validator("url")
    @classmethod
    def _known_backend(cls, url: str) -> str:
        return check_url(
            url, ("sqlite:///", "kafka://"), "sqlite:///<file>, relative to the home, or kafka://<host>:9092"
        )

    def secret(self) -> str:
        """The password, from its file where one is named. Raises ConfigError where that cannot be read."""
        if self.password_file is None:
            return self.password
        try:
            return self.password_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(f"log.password_file {str(self.password_file)!r} cannot be read: {why}") from None

    @model_validator(mode="after")
    def _access_is_whole(self) -> LogConfig:
        credentials = bool(self.username or self.password or self.password_file)
        if self.security == "sasl" and not (self.username and (self.password or self.password_file)):
            raise ValueError("security = 'sasl' needs username, and password_file (or password)")
        if self.security != "sasl" and (credentials or self.users):
            raise ValueError(
                f"username and password are given, and security is {self.security!r}, which sends neither: set "
                "security = 'sasl'"
            )
        if self.security == "plaintext" and self.ca_file is not None:
            raise ValueError("ca_file is given, and security is 'plaintext', which checks nothing: set 'tls' or 'sasl'")
        if not self.url.startswith("kafka://") and (self.security != "plaintext" or self.replicas):
            raise ValueError(f"security and replicas are for Kafka, and url is {self.url!r}: leave them out")
        return self

    @model_validator(mode="after")
    def _bodies_fit(self) -> LogConfig:
        if self.inline_bytes >= self.max_record_bytes:
            raise ValueError(
                f"inline_bytes ({self.inline_bytes}) must be below max_record_bytes ({self.max_record_bytes}): a body "
                "just under it would make a record that the log refuses; lower inline_bytes"
            )
        return self
