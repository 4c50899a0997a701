"""The gateway's spool on Kafka, in the scribe's process: opened, drained, told of. On the embedded log there is none.

::

    scribe: Desk ─▶ sealed ─▶ Spool.append_soon          thread "drain": Spool.drain ─▶ Kafka
                      ▲                                   thread "report": Spool.state, once a second ─▶ the gateway
                      └─ the gateway closes its end: both threads end, what is left stays in the file

A drainer that fails ends the process, whatever else is under way in it: what was acknowledged is in the file, and the
gateway starts another scribe.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from everloop.config import Config
from everloop.errors import LogError
from everloop.home import Home
from everloop.log.base import Log
from everloop.log.embedded import EmbeddedLog
from everloop.log.spool import Spool, Target
from everloop.topics import EVENTS

logger = logging.getLogger(__name__)
EVERY = 1.0  # seconds between two reports
ENDS_WITHIN = 8.0


def open_spool(config: Config, home: Home, log: Log) -> Spool | None:
    """The spool before ``log``; None where that is on this disk itself."""
    if isinstance(log, EmbeddedLog):
        return None
    its = config.log
    target = cast(Target, log)
    return Spool(_path(home), target, EVENTS.name, max_record_bytes=its.max_record_bytes, max_bytes=its.spool_bytes)


def _path(home: Home) -> Path:
    return home.folder("spool") / "events.db"


@contextmanager
def waiting(home: Home, log: Log) -> Iterator[Log | None]:
    """What waits in the spool before ``log``, to be read; None where there is none."""
    if isinstance(log, EmbeddedLog) or not _path(home).exists():
        yield None
        return
    held = EmbeddedLog(_path(home), partitions=1)
    try:
        yield held
    finally:
        held.close()


@contextmanager
def draining(spool: Spool | None, tell: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Drained inside, and ``tell`` given its state; closed at the end."""
    if spool is None:
        yield
        return
    over = threading.Event()
    drain = threading.Thread(target=_drain, args=(spool,), name="drain", daemon=True)
    report = threading.Thread(target=_report, args=(spool, tell, over), name="report", daemon=True)
    for thread in (drain, report):
        thread.start()
    try:
        yield
    finally:
        over.set()
        spool.stop()
        for thread in (drain, report):
            thread.join(ENDS_WITHIN)
        spool.close()


def _drain(spool: Spool) -> None:
    try:
        spool.drain()
    except BaseException:
        logger.exception("the spool is not drained any more; this process ends so that another one is started")
        logging.shutdown()
        os._exit(1)


def _report(spool: Spool, tell: Callable[[dict[str, Any]], None], over: threading.Event) -> None:
    while not over.wait(EVERY):
        with suppress(LogError):  # a disk that is held up is told of by those who wait for it
            tell(asdict(spool.state()))
