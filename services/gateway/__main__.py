"""``python -m services.gateway``: the gateway as a service.

Each engine is looked at once a second by a task of the event loop; ``/readyz`` only reads what it found.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable

from aiohttp import web
from everloop.config import Config, load
from everloop.errors import ConfigError, EverloopError
from everloop.log import open_log
from prometheus_client import REGISTRY

from services.gateway.app import Gateway
from services.gateway.metrics import ProviderMetrics, ReplicaMetrics, SpoolMetrics
from services.gateway.replicas import Replicas
from services.gateway.scribe import Scribe
from services.service import Service, collect_seldom


def watching(gateway: Gateway, replicas: Replicas) -> Callable[[web.Application], AsyncIterator[None]]:
    """A task that looks at the engines for as long as the application runs (aiohttp's ``cleanup_ctx``)."""

    async def during(app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(replicas.watch(gateway.routed))
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await replicas.close()

    return during


def build(config: Config) -> tuple[Service, Gateway]:
    """The service, wired and not yet running. Raises EverloopError where the log or the hook cannot be opened."""
    service = Service("gateway", config, config.gateway.port, host=config.gateway.host)
    replicas = Replicas(config.serving.urls, timeout=config.gateway.timeout, brief=True)
    scribe = Scribe()
    gateway = Gateway(config, service.home, open_log(config), replicas, scribe, REGISTRY)
    gateway.prepare()
    gateway.add_to(service.app)
    gateway.providers.check_keys()

    async def writing(app: web.Application) -> AsyncIterator[None]:
        await scribe.start()
        yield
        await gateway.capture.drained()
        await scribe.close()
        await gateway.providers.close()

    service.app.cleanup_ctx.extend([writing, watching(gateway, replicas)])
    service.loop("routes", lambda: gateway.routes.follow(service.stop))
    service.ready("engine", lambda: None if gateway.providers.everywhere else replicas.trouble)
    service.ready("log", lambda: scribe.trouble)
    service.ready("routes", lambda: gateway.routes.unready)
    service.describe("gateway", lambda: {**gateway.status(), "engine_trouble": replicas.trouble})
    service.describe("replicas", lambda: [replica.described() for replica in replicas.each])
    service.describe("spool", lambda: scribe.spool)
    REGISTRY.register(ReplicaMetrics(replicas.each))
    REGISTRY.register(ProviderMetrics(gateway.providers.failures))
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
