"""Settings of a provider: an OpenAI-compatible endpoint that a team has already, before a policy or behind it."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from everloop.environment import PREFIX
from everloop.errors import ConfigError
from everloop.section import Section

OWN_NETWORK = (".local", ".internal", ".svc")


class ProviderConfig(Section):
    """Who answers a policy beside the engine. The key itself never stands in the configuration."""

    url: str = Field(description="what an OpenAI client calls base_url, such as 'https://api.example.com/v1'")
    model: str = Field(min_length=1, description="as the provider calls it")
    key_file: Path | None = Field(default=None, description="holds the key alone; read again when it is refused")
    key_env: str | None = Field(default=None, min_length=1, description="instead: the variable that holds the key")
    role: Literal["incumbent", "fallback"] = Field(
        default="incumbent",
        description="'incumbent': it answers until an adapter is live; 'fallback': where no engine does",
    )
    timeout: float = Field(default=60, gt=0, description="seconds for one whole answer")
    patience: float = Field(
        default=30,
        gt=0,
        description="seconds without an answer (of a stream: without its beginning) that the engine is waited for",
    )

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname or "", parts.port
        except ValueError as error:
            raise ValueError(f"{url!r} is not an address: {error}") from None
        if parts.scheme not in ("https", "http") or not host or not url.isascii() or any(map(str.isspace, url)):
            raise ValueError(f"{url!r} is not an address: use https://<host>/v1, as an OpenAI client's base_url")
        if "@" in parts.netloc:
            raise ValueError("the url has a name or a password in it: put the key into a file, and name it in key_file")
        if parts.query or parts.fragment:
            raise ValueError(f"{url!r} has more than a path: leave out what begins with '?' or '#'")
        if parts.scheme == "http" and not _near(host):
            raise ValueError(
                f"http:// to {host} would send the key and every conversation in the clear: use https:// (http:// is "
                "for loopback, private addresses, and names of your own network)"
            )
        return url.rstrip("/")

    @model_validator(mode="after")
    def _one_key(self) -> ProviderConfig:
        if self.key_file is not None and self.key_env is not None:
            raise ValueError("key_file and key_env both say where the key is: leave one out")
        if self.key_env is not None and self.key_env.startswith(PREFIX):
            raise ValueError(
                f"key_env = {self.key_env!r}: variables that begin with {PREFIX} are settings; use another"
            )
        return self

    @property
    def host(self) -> str:
        """For people: where it is."""
        return urlsplit(self.url).netloc

    @property
    def keeper(self) -> str:
        """For people: where its key is."""
        if self.key_file is not None:
            return str(self.key_file)
        return "no key is configured: key_file or key_env" if self.key_env is None else f"the variable {self.key_env}"

    def key(self) -> str | None:
        """The key, as it is now; None: none is configured. Raises ConfigError where it cannot be had."""
        if self.key_env is not None:
            found = os.environ.get(self.key_env, "")
        elif self.key_file is not None:
            found = _read(self.key_file)
        else:
            return None
        key = found.strip()
        if not key:
            raise ConfigError(
                f"the provider's key is missing: {self.keeper} is {'empty' if self.key_file else 'not set'}"
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"what is in {self.keeper} is no key: it must be one line of printable ASCII, no spaces")
        return key


def _near(host: str) -> bool:
    """Whether a host is this machine, or by its name or address of one's own network."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(OWN_NETWORK)
    return address.is_private or address.is_loopback


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"the provider's key cannot be read from {str(path)!r}: {why}") from None
