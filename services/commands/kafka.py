"""A real Kafka broker on this machine, for the loopback alone: start, stop, status. Data lie in <home>/kafka."""

from __future__ import annotations

import argparse
import os

from everloop.config import load
from everloop.home import Home

from services.broker.jars import NoBroker
from services.broker.process import Broker

PORT = 9092


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="start|stop|status")
    start = verbs.add_parser("start", help="install it where it is missing, start it, wait until it answers")
    start.add_argument("--port", type=int, help=f"of 127.0.0.1; {PORT} if not given, 0: any free one")
    verbs.add_parser("stop", help="end it in good order; its data stay")
    verbs.add_parser("status", help="whether it runs; exit status 1 where it does not")


def run(options: argparse.Namespace) -> int:
    home = Home(load().home)
    folder = home.root / "kafka"
    if options.verb == "start":
        home.made()
        _check_port(Broker(folder), options.port)
        return _start(Broker(folder, PORT if options.port is None else options.port))
    broker = Broker(folder)
    if options.verb == "stop":
        print("The broker is down." if broker.stop() else "No broker runs here.")
        return 0
    if broker.pid is None:
        print("No broker runs here: 'everloop kafka start'.")
        return 1
    print(f"The broker runs at {broker.address}, pid {broker.pid}.")
    return 0


def _check_port(running: Broker, asked: int | None) -> None:
    """Raises NoBroker where one runs on another port than is asked for: it would be left there without a word."""
    if running.pid is None or not asked or running.address.endswith(f":{asked}"):
        return
    raise NoBroker(
        f"a broker runs here already, at {running.address} (pid {running.pid}), and not on port {asked}: stop it first "
        "('everloop kafka stop'), then give this command again; or leave --port out and use that one"
    )


def _start(broker: Broker) -> int:
    took = broker.start()
    if not took:
        print(f"The broker runs already at {broker.address}, pid {broker.pid}: 'everloop kafka stop' ends it.")
        return 0
    print(f"Kafka answers at {broker.address} after {took:.1f} s (pid {broker.pid}, data in {broker.folder}).")
    home = f"--home {os.environ['EVERLOOP_HOME']} " if os.environ.get("EVERLOOP_HOME") else ""
    print(f"  everloop {home}up --log kafka://{broker.address}")
    return 0
