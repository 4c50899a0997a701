"""Structured logging of the services: one JSON object a line on standard error, with the service's name in it."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError


class JsonLines(logging.Formatter):
    """``{"time", "level", "service", "logger", "message"}``, and ``error`` with the traceback where there is one."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_to_stderr(service: str, level: str) -> None:
    """Send every record of this process to standard error; ``level`` is the config's ``log_level``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(service))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for chatty in ("aiohttp.access", "asyncio", "httpx", "httpcore", "urllib3", "faust", "mode"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))
    for shouting in ("kafka", "aiokafka"):  # 30 lines a second while a broker is away; what matters is raised
        logging.getLogger(shouting).setLevel(logging.CRITICAL)
    logging.getLogger("aiohttp.server").addFilter(_is_not_the_senders)


def _is_not_the_senders(record: logging.LogRecord) -> bool:
    """What is no HTTP, or no body, is answered 400. A traceback for each would let anybody fill the disk with them."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | RequestPayloadError)
