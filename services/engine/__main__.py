"""``python -m services.engine``: loads every base model that the configuration names, then serves.

Nothing listens before all are loaded and have answered once, so that who gets a connection gets an answer. With
``serving.url = "vllm"`` it starts a vLLM instead, and looks after it (see ``vllm.py``).
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time

from everloop.config import Config, load
from everloop.errors import ConfigError
from prometheus_client import REGISTRY

from services.engine import vllm
from services.engine.app import EngineApp
from services.engine.metrics import EngineCollector
from services.logs import log_to_stderr
from services.service import Service
from trainer.policy import base
from trainer.rollout.embedded import EmbeddedServing

logger = logging.getLogger("services.engine")
ROOM = 65_536  # bytes that the gateway may add to a body that it let pass
USAGE_ERROR = 2


def bases_of(config: Config) -> list[str]:
    """The distinct base models of all policies, in order."""
    names = [config.policy(tenant, policy).base for tenant, policy in config.policies()]
    return list(dict.fromkeys(names))


def open_serving(config: Config) -> EmbeddedServing:
    """An engine that has answered once with each base. Raises ConfigError where one cannot be had."""
    policies = []
    for name in bases_of(config):
        began = time.monotonic()
        logger.info("base %s is being loaded (the first time takes longest)", name)
        policies.append(base.load(name, config.cache))
        logger.info("base %s is loaded, after %.1f s", policies[-1].identity, time.monotonic() - began)
    serving = EmbeddedServing(policies, config.serving)
    logger.info("each base answers once before anybody is let in")
    asyncio.run(serving.warm_up())
    return serving


def main() -> int:
    try:
        config = load()
        log_to_stderr("engine", config.log_level)
        if config.serving.url == "vllm":
            return vllm.serve(config)
        serving = open_serving(config)
    except ConfigError as error:
        print(f"engine: {error}", file=sys.stderr)
        return USAGE_ERROR
    service = Service(
        "engine",
        config,
        config.serving.port,
        host=config.serving.host,
        max_body=config.gateway.max_body_bytes + ROOM,
    )
    app = EngineApp(serving, service.home.folder("adapters"))
    app.register(service.app)
    REGISTRY.register(EngineCollector(serving))
    service.check("decoding", app.trouble)
    service.describe("engine", app.status)
    try:
        return service.run()
    finally:
        asyncio.run(serving.close())


if __name__ == "__main__":
    sys.exit(main())
