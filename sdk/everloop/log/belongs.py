"""Which log a home belongs to. Its store, states and offsets are of that log's records, and of no other's."""

from __future__ import annotations

from pathlib import Path

from everloop.config import Config
from everloop.errors import ConfigError
from everloop.log.kafka.settings import Address

FILE = "log.url"


def place(url: str, config: Config) -> tuple[frozenset[str], str]:
    """Where a log lies, however its URL is spelled: any order of servers, with or without the usual port."""
    if url.startswith("kafka://"):
        address = Address.parse(url)
        return frozenset(server.lower() for server in address.servers), address.prefix
    return frozenset(), config.under_home(url).partition("?")[0].rstrip("/")


def log_of(home: Path) -> str | None:
    """The URL of the log that a home belongs to; None: it was never used with one."""
    try:
        return (home / FILE).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def of_its_home(config: Config) -> Config:
    """The configuration, with the home's own log where it names none."""
    held = None if "url" in config.log.model_fields_set else log_of(config.home)
    if held is None:
        return config
    return config.model_copy(update={"log": config.log.model_copy(update={"url": held})})


def check(config: Config) -> None:
    """Raises ConfigError where the home belongs to another log than the configuration's."""
    held, root = log_of(config.home), config.home.absolute()
    if held is not None and place(held, config) != place(config.log.url, config):
        raise ConfigError(
            f"the home {root} belongs to the log {held}, whose records its store and states are of, and not to "
            f"{config.log.url}. Leave --log (log.url, EVERLOOP_LOG__URL) out to go on with its own, or take a home of "
            f"its own for the other (--home). Where the same log has another address now, write that into {root / FILE}"
        )


def bind(config: Config) -> None:
    """From now on the home, which is there, belongs to the configuration's log. Raises ConfigError as :func:`check`."""
    check(config)
    if log_of(config.home) is None:
        partial = config.home / f"{FILE}.partial"
        partial.write_text(config.log.url + "\n", encoding="utf-8")
        partial.replace(config.home / FILE)
