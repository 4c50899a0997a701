"""A real Kafka broker on this machine, for the loopback alone: start, stop, status. Data lie in <home>/kafka."""

from __future__ import annotations

import argparse
import os

from everloop.config import load
from everloop.home import Home

from services.broker.process import Broker

PORT = 9092


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="start|stop|status")
    start = verbs.add_parser("start", help="install it where it is missing, start it, wait until it answers")
    start.add_argument("--port", type=int, default=PORT, help="of 127.0.0.1; %(default)s if not given")
    verbs.add_parser("stop", help="end it in good order; its data stay")
    verbs.add_parser("status", help="whether it runs; exit status 1 where it does not")


def run(options: argparse.Namespace) -> int:
    folder = Home(load().home).root / "kafka"
    if options.verb == "start":
        return _start(Broker(folder, options.port))
    broker = Broker(folder)
    if options.verb == "stop":
        print("The broker is down." if broker.stop() else "No broker runs here.")
        return 0
    print(f"The broker runs, pid {broker.pid}." if broker.pid else "No broker runs here: 'everloop kafka start'.")
    return int(broker.pid is None)


def _start(broker: Broker) -> int:
    took = broker.start()
    if not took:
        print(f"The broker runs already, pid {broker.pid}: 'everloop kafka stop' ends it.")
        return 0
    print(f"Kafka answers at {broker.address} after {took:.1f} s (pid {broker.pid}, data in {broker.folder}).")
    home = f"--home {os.environ['EVERLOOP_HOME']} " if os.environ.get("EVERLOOP_HOME") else ""
    print(f"  everloop {home}up --log kafka://{broker.address}")
    return 0
