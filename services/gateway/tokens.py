"""Feedback tokens: what a browser may hold. Signed, short-lived, good for feedback about one episode and no more.

Nothing is stored for a token: it carries tenant, episode and expiry under a keyed hash.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import NamedTuple

PREFIX = "ft_"
TAG = 16  # bytes of the signature
LONGEST = 30 * 86400  # seconds


class Grant(NamedTuple):
    """What a token allows: feedback of this tenant about this episode, until ``expires`` (seconds since 1970)."""

    tenant: str
    episode: str
    policy: str
    expires: int


class Tokens:
    """Makes and reads the feedback tokens of one installation. ``secret`` is its home's."""

    def __init__(self, secret: bytes) -> None:
        self._key = hmac.new(secret, b"feedback tokens", hashlib.sha256).digest()

    def grant(self, grant: Grant) -> str:
        body = "\0".join((grant.tenant, grant.episode, grant.policy, str(grant.expires))).encode()
        return PREFIX + base64.urlsafe_b64encode(body + self._tag(body)).decode().rstrip("=")

    def read(self, token: str, now: float) -> Grant:
        """Raises ValueError, saying why, where the token was not made here or has expired."""
        text = token.removeprefix(PREFIX)
        try:
            raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except ValueError:
            raw = b""
        body, tag = raw[:-TAG], raw[-TAG:]
        if not body or not hmac.compare_digest(tag, self._tag(body)):
            raise ValueError("this feedback token was not made by this installation")
        tenant, episode, policy, expires = body.decode().split("\0")
        if int(expires) < now:
            raise ValueError("this feedback token has expired; ask your server for a new one")
        return Grant(tenant, episode, policy, int(expires))

    def _tag(self, body: bytes) -> bytes:
        return hmac.new(self._key, body, hashlib.sha256).digest()[:TAG]
