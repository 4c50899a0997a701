"""Refusals in OpenAI's error form: each says what is wrong, why, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from aiohttp import web
from everloop.errors import LogError, LogFull, Overloaded, ServingError

SOON = {"Retry-After": "1"}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """An answer that is an error. ``code`` is stable, for programs; ``message`` is for people."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> bytes:
        return orjson.dumps({"error": error_fields(self.status, self.message, self.code, self.param)})

    def response(self) -> web.Response:
        return web.Response(status=self.status, body=self.body, content_type="application/json", headers=self.headers)


def error_fields(status: int, message: str, code: str | None, param: str | None = None) -> dict[str, object]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"message": message, "type": kind, "code": code, "param": param}


def from_engine(error: ServingError) -> Refused:
    """What the agent is told when the engine refuses or fails."""
    if isinstance(error, Overloaded):
        wait = {"Retry-After": str(max(1, round(error.retry_after)))}
        return Refused(429, f"{error}. Try again after {wait['Retry-After']} s.", error.code, headers=wait)
    return Refused(error.status, str(error), error.code, headers=SOON if error.status == 503 else None)


def from_log(error: LogError) -> Refused:
    """The answer was made and may not leave: its events could not be made durable."""
    if isinstance(error, LogFull):
        why = f"there is no room ({error})"
        return Refused(
            503,
            f"The answer is withheld because it could not be recorded: {why}. Make room there, or send "
            "'X-Everloop-Capture: off' for requests that need no record; the gateway recovers by itself.",
            "log_full",
            headers={"Retry-After": "5"},
        )
    return Refused(
        503,
        f"The answer is withheld because it could not be recorded: {error}. Try again; if it stays, see the "
        "gateway's log.",
        "log_unavailable",
        headers={"Retry-After": "1"},
    )
