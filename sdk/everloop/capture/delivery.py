"""One batch over HTTP: the request, and what its answer means for the batch."""

from __future__ import annotations

import json
from typing import NamedTuple

import httpx

from everloop.capture.settings import Settings

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
WHOLE = frozenset({401, 403, 405})  # about the sender, not about an item: smaller batches fare no better
LONGEST_RETRY_AFTER = 30.0


class Answer(NamedTuple):
    """``again``: the same batch may pass later. ``divisible``: only some of its items may be at fault."""

    accepted: bool
    again: bool = False
    divisible: bool = False
    reason: str = ""
    detail: str = ""
    retry_after: float | None = None


def judge(status: int, body: bytes, retry_after: str | None = None) -> Answer:
    """What a response means. The gateway's errors have OpenAI's form: ``{"error": {"message", "code", …}}``."""
    if 200 <= status < 300:
        return Answer(accepted=True)
    code, message = _error(body)
    reason = f"http {status} {code}".rstrip()
    again = status in AGAIN
    return Answer(False, again, not again and status not in WHOLE, reason, message, _seconds(retry_after))


def _error(body: bytes) -> tuple[str, str]:
    try:
        error = json.loads(body)["error"]
        return str(error.get("code") or error.get("type") or "")[:40], str(error.get("message") or "")[:300]
    except (ValueError, TypeError, KeyError, AttributeError):
        return "", body[:300].decode(errors="replace")


def _seconds(retry_after: str | None) -> float | None:
    try:
        return min(LONGEST_RETRY_AFTER, max(0.0, float(retry_after or "")))
    except ValueError:
        return None


class Delivery:
    """Posts batches to the gateway. Used by one thread; connections are made when first needed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: httpx.Client | None = None

    def post(self, route: str, bodies: list[bytes]) -> Answer:
        """Never raises: what goes wrong on the way is an answer too."""
        content = b'{"%b":[%b]}' % (route.encode(), b",".join(bodies))
        try:
            response = self._open().post(f"{self._settings.origin}/v1/{route}", content=content)
        except (httpx.HTTPError, OSError) as error:
            return Answer(False, again=True, reason="no connection", detail=str(error))
        except Exception as error:  # a key or URL that cannot be sent at all, a proxy that is set up wrongly
            return Answer(False, reason="not sendable", detail=f"{type(error).__name__}: {error}")
        return judge(response.status_code, response.content, response.headers.get("retry-after"))

    def _open(self) -> httpx.Client:
        if self._client is None:
            headers = {"Content-Type": "application/json"}
            if self._settings.api_key:
                headers["Authorization"] = f"Bearer {self._settings.api_key}"
            self._client = httpx.Client(headers=headers, timeout=self._settings.timeout)
        return self._client

    def after_fork_in_child(self) -> None:
        """The parent's connections are the parent's."""
        self._client = None
