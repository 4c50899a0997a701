"""The door: who asks, what they may, and how much they may send."""

from __future__ import annotations

import asyncio
import time

from aiohttp import web
from everloop.config import Config

from services.gateway.keys import Key, Keys
from services.gateway.limits import Limits
from services.gateway.refusals import Refused
from services.gateway.tokens import PREFIX as TOKEN
from services.gateway.tokens import Grant, Tokens

READ_SECONDS = 30.0  # for a whole body: a client slower than that is let go
LONGEST_NAME = 256


class Door:
    """Checks keys, tokens and bodies. Used by the event loop alone."""

    def __init__(self, config: Config, keys: Keys, tokens: Tokens, read_seconds: float = READ_SECONDS) -> None:
        self._config = config
        self._keys = keys
        self._tokens = tokens
        self._limit = config.gateway.max_body_bytes
        self._read_seconds = read_seconds
        self.limits = Limits(config)

    def key(self, request: web.Request, action: str) -> Key:
        """The key of a request. Raises Refused: 401 without a good one, 403 where it may not do this, 429 for one
        too many of its tenant's."""
        given = _bearer(request)
        if given.startswith(TOKEN):
            raise Refused(
                403, "a feedback token can do nothing but give feedback; use an API key here", "token_not_enough"
            )
        key = self._keys.find(given)
        if key is None or key.tenant not in self._config.tenants:
            raise Refused(401, "this API key is not known here; 'everloop keys create' makes one", "invalid_api_key")
        if not key.may(action):
            raise Refused(
                403, f"a key of scope '{key.scope}' may not do this; ask for one that may", "insufficient_scope"
            )
        self.limits.take(key.tenant)
        return key

    def rater(self, request: web.Request) -> Key | Grant:
        """Who gives feedback: a key, or a token's grant. Raises Refused."""
        given = _bearer(request)
        if not given.startswith(TOKEN):
            return self.key(request, "feedback")
        try:
            grant = self._tokens.read(given, time.time())
        except ValueError as error:
            raise Refused(401, str(error), "invalid_token") from None
        if grant.tenant not in self._config.tenants:
            raise Refused(401, "this feedback token's tenant is no longer here", "invalid_token")
        self.limits.take(grant.tenant)
        return grant

    async def body(self, request: web.Request) -> bytes:
        """The whole body. Raises Refused: 413 above the limit, 408 where it comes too slowly, 400 where it breaks."""
        length = request.content_length
        if length is not None and length > self._limit:
            raise self._too_large()
        if request.content.is_eof():  # it came with its head, as small ones do
            return self._checked(request.content.read_nowait())
        try:
            async with asyncio.timeout(self._read_seconds):
                return await self._read(request)
        except TimeoutError:
            raise _closing(
                408, f"the body did not come within {self._read_seconds:g} s; send it again", "body_too_slow"
            ) from None
        except web.HTTPException:
            raise
        except (ValueError, web.RequestPayloadError) as error:
            raise _closing(400, f"the body cannot be read: {error}", "invalid_body") from None

    async def _read(self, request: web.Request) -> bytes:
        blocks = []
        size = 0
        async for block in request.content.iter_any():
            size += len(block)
            if size > self._limit:
                raise self._too_large()
            blocks.append(block)
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def _checked(self, body: bytes) -> bytes:
        if len(body) > self._limit:
            raise self._too_large()
        return body

    def _too_large(self) -> Refused:
        return _closing(
            413,
            f"the body is larger than {self._limit:,} bytes (gateway.max_body_bytes); send less, or raise the limit",
            "body_too_large",
        )


def header(request: web.Request, name: str) -> str | None:
    """A name in a header: printable, not too long. Raises Refused (400)."""
    value = request.headers.get(name)
    if value is None or value == "":
        return None
    if len(value) > LONGEST_NAME or not value.isprintable():
        raise Refused(400, f"header {name} must be printable UTF-8 of at most {LONGEST_NAME} characters", "bad_header")
    return value


def _bearer(request: web.Request) -> str:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise Refused(401, "no API key: send 'Authorization: Bearer ek_…'", "missing_api_key")
    return given.strip()


def _closing(status: int, message: str, code: str) -> Refused:
    """A refusal after which the rest of the body is not read: the connection ends with it."""
    return Refused(status, message, code, headers={"Connection": "close"})
