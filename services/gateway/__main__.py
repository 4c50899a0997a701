"""``python -m services.gateway``: the gateway as a service.

The engine's health is asked for once a second by a task of the event loop; ``/readyz`` only reads what it found.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

from aiohttp import web
from everloop.config import Config, load
from everloop.errors import ConfigError, EverloopError
from everloop.log import open_log
from prometheus_client import REGISTRY

from services.gateway.app import Gateway
from services.gateway.metrics import SpoolMetrics
from services.gateway.scribe import Scribe
from services.gateway.upstream import HttpServing
from services.service import Service, collect_seldom

EVERY = 1.0  # seconds between looks at the engine


class EngineWatch:
    """Whether the engine answers, as far as was seen last."""

    def __init__(self, serving: HttpServing) -> None:
        self._serving = serving
        self.trouble: str | None = f"the engine at {serving.url} was not asked yet"

    async def during(self, app: web.Application) -> AsyncIterator[None]:
        """A task for as long as the application runs (aiohttp's ``cleanup_ctx``)."""
        task = asyncio.create_task(self._watch())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await self._serving.close()

    async def _watch(self) -> None:
        while True:
            good = await self._serving.healthy()
            self.trouble = None if good else f"no engine answers at {self._serving.url}"
            await asyncio.sleep(EVERY)


def build(config: Config) -> tuple[Service, Gateway]:
    """The service, wired and not yet running. Raises EverloopError where the log or the hook cannot be opened."""
    service = Service("gateway", config, config.gateway.port, host=config.gateway.host)
    serving = HttpServing(config.serving.base_url, timeout=config.gateway.timeout, brief=True)
    scribe = Scribe()
    gateway = Gateway(config, service.home, open_log(config), serving, scribe, REGISTRY)
    gateway.prepare()
    gateway.add_to(service.app)
    gateway.providers.check_keys()
    watch = EngineWatch(serving)

    async def writing(app: web.Application) -> AsyncIterator[None]:
        await scribe.start()
        yield
        await gateway.capture.drained()
        await scribe.close()
        await gateway.providers.close()

    service.app.cleanup_ctx.extend([writing, watch.during])
    service.loop("routes", lambda: gateway.routes.follow(service.stop))
    service.ready("engine", lambda: None if gateway.providers.everywhere else watch.trouble)
    service.ready("log", lambda: scribe.trouble)
    service.ready("routes", lambda: gateway.routes.unready)
    service.describe("gateway", lambda: {**gateway.status(), "engine_trouble": watch.trouble})
    service.describe("spool", lambda: scribe.spool)
    REGISTRY.register(SpoolMetrics(lambda: scribe.spool))
    return service, gateway


def main() -> int:
    try:
        service, gateway = build(load())
    except ConfigError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2
    except EverloopError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 1
    collect_seldom()
    try:
        return service.run()
    finally:
        gateway.close()


if __name__ == "__main__":
    sys.exit(main())
