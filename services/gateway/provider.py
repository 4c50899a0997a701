"""The serving port over a provider: an OpenAI-compatible endpoint that the team has already, beside the engine.

It holds no adapters and gives no token ids. The key goes into ``Authorization`` and nowhere else: it is read where it
lies, taken out of whatever the provider says, and read again after the provider has refused it. Redirects are not
followed, certificates are checked (a private authority's by SSL_CERT_FILE), and what comes is bounded.
"""

from __future__ import annotations

import itertools
import logging
import os
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
from everloop.config import Config
from everloop.errors import AdapterRefused, ConfigError, Overloaded, ServingError
from everloop.provider_config import ProviderConfig
from everloop.serving.base import Route

from services.gateway import foreign
from services.gateway.http1 import Broken, Client, Connection, Expired, Framing

logger = logging.getLogger(__name__)
MOST = 33_554_432  # bytes of a whole answer
LONGEST_LINE = 4_194_304  # of a stream
SHOWN = 300  # letters of what it says of an error
AFTERWARDS = 1.0  # seconds after [DONE] in which it may end its stream
PROCESS = os.urandom(8).hex()
REQUESTS = itertools.count()
THE_REQUESTS = (400, 413, 422)  # what else is refused is not the request's fault


class Provider:
    """One policy's. Implements ``everloop.serving.base.Serving``; made anywhere, used inside one event loop.

    ``trouble`` is what went wrong when it was asked last; None: nothing did. ``failures`` counts such requests by code.
    """

    def __init__(self, config: ProviderConfig, policy: str) -> None:
        self.config = config
        self.policy = policy
        self.trouble: str | None = None
        self.failures: Counter[str] = Counter()
        self._client = Client(config.url, config.timeout)
        self._key: str | None = None

    @property
    def incumbent(self) -> bool:
        """Whether it answers until an adapter is live."""
        return self.config.role == "incumbent"

    async def complete(self, route: Route, body: dict[str, Any]) -> dict[str, Any]:
        """``model`` and what only an engine knows are left out of ``body``. Raises ServingError."""
        async with self._answered("POST", f"/{route}", foreign.asked(route, body, self.config.model)) as answered:
            return foreign.whole(route, await _all(answered))

    async def stream(self, route: Route, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """One that ends without ``[DONE]`` is whole where each of its answers has ended."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        sent = {**foreign.asked(route, body, self.config.model), **options}
        chunks = foreign.Chunks(route)
        async with self._answered("POST", f"/{route}", sent) as answered:
            async for data in _events(answered):
                if data == b"[DONE]":
                    await answered.end(AFTERWARDS)
                    return
                yield chunks.fit(data)
        if not chunks.finished:
            raise ServingError("the provider's stream ended before its answer did", code="upstream_truncated")

    async def load(self, name: str, folder: Path) -> None:
        raise AdapterRefused(f"the provider at {self.config.host} serves its own model, and no adapters")

    async def unload(self, name: str) -> None: ...

    async def adapters(self) -> frozenset[str]:
        return frozenset()

    async def healthy(self) -> bool:
        try:
            await self.check()
        except ServingError:
            return False
        return True

    async def check(self) -> str | None:
        """Ask as little as can be; a note on what came, or None. Raises ServingError where it does not answer.

        Where there is no list of models to ask for, that is a completion of a few tokens.
        """
        listed = await self._models()
        if listed is None:
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}
            await self.complete("chat/completions", body)
        elif listed and self.config.model not in listed:
            return f"the provider at {self.config.host} does not list the model {self.config.model!r}"
        return None

    async def close(self) -> None:
        self._client.close()

    async def _models(self) -> set[str] | None:
        try:
            async with self._answered("GET", "/models", None) as answered:
                data = foreign.parsed(await _all(answered)).get("data")
        except _NotThere:
            return None
        return {str(one.get("id")) for one in data if isinstance(one, dict)} if isinstance(data, list) else None

    @asynccontextmanager
    async def _answered(self, method: str, path: str, body: dict[str, Any] | None) -> AsyncIterator[Connection]:
        """A request that the provider has answered with 200. What goes wrong, here or inside, becomes ServingError."""
        try:
            sent = b"" if body is None else orjson.dumps(body)
            connection = await self._client.ask(
                method, path, sent, f"{PROCESS}-{next(REQUESTS):x}", self._authorization()
            )
            try:
                if connection.framing.status != 200:
                    raise self._refusal(connection.framing, await _all(connection))
                yield connection
            finally:
                self._client.give_back(connection)
        except orjson.JSONEncodeError as error:
            raise ServingError(f"the request cannot be sent: {error}", status=400, code="invalid_value") from None
        except OSError as error:
            raise self._noted(self._failed(error)) from error
        except ServingError as error:
            raise self._noted(error) from None
        if self.trouble is not None:
            logger.info("%s: the provider at %s answers again", self.policy, self.config.host)
        self.trouble = None

    def _authorization(self) -> str:
        try:
            self._key = self._key or self.config.key()
        except ConfigError as error:
            raise ServingError(str(error), code="provider_key") from None
        return "User-Agent: everloop\r\n" + (f"Authorization: Bearer {self._key}\r\n" if self._key else "")

    def _noted(self, error: ServingError) -> ServingError:
        if error.status not in THE_REQUESTS:
            self.failures[error.code] += 1
            if self.trouble is None:  # a provider that stays away is told of once
                logger.warning("%s: %s", self.policy, error)
            self.trouble = str(error)
        return error

    def _failed(self, error: OSError) -> ServingError:
        where = f"the provider at {self.config.host}"
        if isinstance(error, Expired):
            return ServingError(f"{where} did not answer: {error}", status=504, code="provider_timeout")
        if isinstance(error, Broken):
            return ServingError(f"{where} broke its answer off", code="upstream_broken")
        if isinstance(error, ssl.SSLCertVerificationError):
            why = f"its certificate is not trusted ({error.verify_message}); SSL_CERT_FILE names another authority"
            return ServingError(f"{where} is not asked: {why}", status=503, code="provider_unavailable")
        return ServingError(f"{where} cannot be reached: {error}", status=503, code="provider_unavailable")

    def _refusal(self, answer: Framing, raw: bytes) -> ServingError:
        status, said, code = answer.status, *self._said(raw)
        where = f"the provider at {self.config.host}"
        setting = f"tenants.{self.policy.replace('/', '.policies.')}.provider"
        if status in (401, 403):
            self._key = None
            why = f"{where} refuses the key ({status}): an operator must mend it ({self.config.keeper})"
            return ServingError(f"{why}. It says: {said}", code="provider_key")
        if status == 429:
            return Overloaded(f"{where} takes no more now: {said}", retry_after=_seconds(answer))
        if status in THE_REQUESTS:
            return ServingError(f"{where} refuses the request: {said}", status=status, code=code or "invalid_request")
        if status in (404, 405, 501):
            return _NotThere(f"{where} has no such path or model ({status}): see [{setting}]. It says: {said}")
        if 300 <= status < 400:
            to = answer.headers.get(b"location", b"").decode("latin-1")[:SHOWN]
            return ServingError(f"{where} sends on to {to!r}, and nobody follows: put it into [{setting}] url")
        away = status == 503
        return ServingError(
            f"{where} failed ({status}): {said}",
            status=503 if away else 502,
            code="provider_unavailable" if away else "upstream_error",
        )

    def _said(self, raw: bytes) -> tuple[str, str | None]:
        """What it said of an error, shortened and without our key; its code where that is a word."""
        try:
            body = orjson.loads(raw)
            error = body.get("error", body) if isinstance(body, dict) else {}
        except orjson.JSONDecodeError:
            error = {}
        text, code = (error.get("message"), error.get("code")) if isinstance(error, dict) else (error, None)
        shown = str(text or raw.decode("utf-8", "replace") or "nothing")
        shown = (shown.replace(self._key, "[the key]") if self._key else shown)[:SHOWN]
        return shown, code[:64] if isinstance(code, str) else None


class _NotThere(ServingError):
    """404 and its like: the configuration is wrong, or this provider lacks the path."""


class Providers:
    """Those of an installation. ``everywhere``: every policy has one, so that none is without an answer for want of
    an engine."""

    def __init__(self, config: Config) -> None:
        policies = {at: config.policy(*at).provider for at in config.policies()}
        self._made = {at: Provider(its, "/".join(at)) for at, its in policies.items() if its is not None}
        self.everywhere = len(self._made) == len(policies)
        self.slowest = max((one.config.patience + one.config.timeout for one in self._made.values()), default=0.0)

    def of(self, tenant: str, policy: str) -> Provider | None:
        return self._made.get((tenant, policy))

    def failures(self) -> Counter[str]:
        """Requests that a provider answered with nothing, by the error's code."""
        return sum((one.failures for one in self._made.values()), Counter())

    def check_keys(self) -> None:
        """Raises ConfigError where a key is named and cannot be had."""
        for provider in self._made.values():
            try:
                provider.config.key()
            except ConfigError as error:
                raise ConfigError(f"{provider.policy}: {error}") from None

    def status(self) -> dict[str, dict[str, Any]]:
        """By 'tenant/policy'."""
        return {
            one.policy: {
                "url": one.config.url,
                "model": one.config.model,
                "role": one.config.role,
                "trouble": one.trouble,
            }
            for one in self._made.values()
        }

    async def close(self) -> None:
        for provider in self._made.values():
            await provider.close()


async def _all(answered: Connection) -> bytes:
    blocks, size = [], 0
    while block := await answered.block():
        size += len(block)
        if size > MOST:
            raise foreign.garbled(f"it is longer than {MOST:,} bytes")
        blocks.append(block)
    return b"".join(blocks)


async def _events(answered: Connection) -> AsyncIterator[bytes]:
    """The data of each server-sent event; the last one may lack its line end."""
    rest = b""
    while block := await answered.block():
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > LONGEST_LINE:
            raise foreign.garbled(f"a line of its stream is longer than {LONGEST_LINE:,} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if rest.startswith(b"data:"):
        yield rest[5:].strip()


def _seconds(answer: Framing) -> float:
    """For how long to wait. It may be a date, which is as good as no number."""
    try:
        return min(max(1.0, float(answer.headers.get(b"retry-after", b"1"))), 3600.0)
    except ValueError:
        return 1.0
