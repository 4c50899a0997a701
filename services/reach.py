"""Whether the log's cluster answers, in bounded time, and what goes on where it does not.

An embedded log is a file on this disk: it is there, or opening it says why not.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from typing import Any

from everloop.config import Config
from everloop.errors import ConfigError, LogError
from everloop.log import open_log
from everloop.log.base import Log
from everloop.log.embedded import EmbeddedLog
from everloop.topics import EVENTS

from services.tables import span

SECONDS = 12.0  # to connect takes up to 8, and to look for the cause a few more


class BrokerAway(LogError):
    """No broker of the log's cluster answers; the message says why, and what to do. Transient."""


def check(log: Log, within: float = SECONDS) -> None:
    """Raises BrokerAway where the log is on a cluster that does not answer; LogRefused where that refuses us."""
    if isinstance(log, EmbeddedLog):
        return
    from everloop.log.kafka.clients import Unreachable
    from everloop.log.kafka.log import KafkaLog

    assert isinstance(log, KafkaLog)
    where, topic = log.clients.address, log.clients.address.qualified(EVENTS.name)
    asked: Future[Any] = Future()

    def ask() -> None:
        try:
            asked.set_result(log.cluster.ask("asking", lambda admin: admin.describe_topics([topic])))
        except BaseException as error:
            asked.set_exception(error)

    threading.Thread(target=ask, name="reach", daemon=True).start()  # daemon: nobody waits for one that is too late
    try:
        asked.result(within)
    except TooLate:
        raise BrokerAway(f"the log's broker at {where} does not answer: it said nothing for {within:g} s") from None
    except Unreachable as error:
        cause = str(error).removeprefix("asking: ").removeprefix(f"connecting to {where}: ")
        raise BrokerAway(f"the log's broker at {where} does not answer: {cause}") from None


def trouble(config: Config) -> LogError | ConfigError | None:
    """Why the log's cluster cannot be used; None where it answers, or there is none."""
    if not config.log.url.startswith("kafka://"):
        return None
    try:
        log = open_log(config)
    except (LogError, ConfigError) as error:
        return error
    try:
        check(log)
    except LogError as error:
        return error
    finally:
        log.close()
    return None


def meanwhile(gateway: dict[str, Any] | None) -> str:
    """What goes on without the broker, by what the gateway says of itself (None: it does not answer)."""
    if gateway is None:
        return "No gateway answers here, so no requests are served through this home: everloop up"
    spool = gateway.get("spool") or {}
    return (
        f"Requests are served meanwhile, and their events wait in the gateway's spool: {spooled(spool)}. Nothing is "
        "lost: they are sent once the broker is back, and learning and releases go on then by themselves"
    )


def spooled(spool: dict[str, Any]) -> str:
    """The spool's figures, for people."""
    aside = f", {spool['aside']} set aside as too large" if spool.get("aside") else ""
    size = f"{spool.get('records', 0)} events ({spool.get('bytes', 0) / 1e6:.1f} MB)"
    return f"{size}{aside}, the oldest for {span(spool.get('oldest') or 0.0)}"
