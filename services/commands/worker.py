"""One more worker of a handler, beside those that run: on Kafka they share its partitions. Ctrl-C ends it.

It may run on another machine, with the same configuration and the same home on storage that both reach: what it must
not forget is on Kafka, but large bodies, the store, gold items and reward snapshots lie in the home. The others go on
with its partitions when it ends; as many workers as the topic has partitions have something to do.
"""

from __future__ import annotations

import argparse
import importlib
import os

from everloop.config import Config, load
from everloop.errors import ConfigError
from everloop.home import Home
from everloop.log import belongs, open_log
from everloop.topics import HANDLERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("handler", choices=HANDLERS)
    parser.add_argument("--port", type=int, default=0, help="of health, metrics and status; any free one if not given")


def run(options: argparse.Namespace) -> int:
    config = belongs.of_its_home(load())
    _check(config)
    Home(config.home).made()
    _check_log(config, options.handler)
    from services.service import Service

    name = HANDLERS[options.handler]
    its = importlib.import_module(f"services.{name}.__main__")
    return int(its.work(Service(f"{name}-{os.getpid()}", config, options.port)))


def _check_log(config: Config, handler: str) -> None:
    """Raises LogError with cause and mend where it cannot work on this log: before all that it works with is loaded."""
    from everloop.log.kafka.log import KafkaLog

    from services.moving import SHARED
    from services.partition import check_changelog

    log = open_log(config)
    try:
        if isinstance(log, KafkaLog):
            check_changelog(log, handler, SHARED[handler][0])
    finally:
        log.close()


def _check(config: Config) -> None:
    if not config.log.url.startswith("kafka://"):
        raise ConfigError(
            f"log.url is {config.log.url!r}, and the embedded log has one worker of each handler, which 'everloop up' "
            "starts: more of them need log.url = kafka://<host>:9092"
        )
    if not Home(config.home).is_known:
        raise ConfigError(
            f"{config.home.absolute()} is nobody's home yet, and a worker needs that of the installation: it reads "
            "large bodies, the store, gold items and reward snapshots there. Mount it here and name it by --home or "
            "EVERLOOP_HOME; 'everloop up' makes the first one"
        )
    belongs.check(config)
