"""One installation as the command line sees it: its home, what runs, its log, and orders to its services.

Orders are ``Command`` records on the log: the service that they concern decides, and answers under ``commands`` in
its ``/status``. An order given while that service is down waits in the log.
"""

from __future__ import annotations

import getpass
import http.client
import json
import os
import time
import urllib.request
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from everloop import wire
from everloop.config import Config, load
from everloop.contract import Contract
from everloop.errors import ConfigError, ContractError, EverloopError
from everloop.home import Home
from everloop.ids import unique
from everloop.log import NewRecord, belongs, open_log
from everloop.log.base import Log
from everloop.run import STANDING, Command, CommandKind
from everloop.topics import COMMANDS, PAUSES, Topic

from services import made_with
from services.reach import BrokerAway, check

SERVICES = ("gateway", "engine", "assembler", "scorer", "learner", "releaser")
OPTIONS = {"config": "EVERLOOP_CONFIG", "home": "EVERLOOP_HOME", "log": "EVERLOOP_LOG__URL"}
C = TypeVar("C", bound=Contract)


class Running(NamedTuple):
    """A service that announced itself and whose process is there."""

    name: str
    pid: int
    url: str
    started: float
    log: str | None = None


class NothingRuns(EverloopError):
    """What was asked needs a service that does not run."""


class Installation:
    """See the module. Nothing is opened before it is needed; ``close`` closes what was."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.home = Home(config.home)
        self._log: Log | None = None
        self._away: BrokerAway | None = None
        self._asked = False

    @classmethod
    def here(cls) -> Installation:
        """The one that configuration and environment name. Raises ConfigError where nothing ever ran there."""
        made = cls(belongs.of_its_home(load()))
        if not (made.home.root / "log.db").exists() and not made.home.root.is_dir():
            raise ConfigError(
                f"there is no installation at {made.home.root}, so nobody takes orders: "
                "'everloop up' starts one there; --home or EVERLOOP_HOME names another folder"
            )
        return made

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._log is not None:
            self._log.close()

    @cached_property
    def log(self) -> Log:
        """Raises ConfigError where this home, or the platform that runs here, has another one: orders would reach
        nobody."""
        belongs.check(self.config)
        ours = belongs.place(self.config.log.url, self.config)
        for service in self.running().values():
            if service.log is not None and belongs.place(service.log, self.config) != ours:
                raise ConfigError(
                    f"the {service.name} of this home runs on the log {service.log}, and this command would take "
                    f"{self.config.log.url}: give it --log {service.log}, or set EVERLOOP_LOG__URL, or log.url in "
                    "everloop.toml"
                )
        self._log = open_log(self.config)
        return self._log

    def expected(self) -> list[str]:
        """The services that 'everloop up' starts here: all, less the engine where another one answers."""
        return [name for name in SERVICES if name != "engine" or self.config.serving.ours]

    def running(self) -> dict[str, Running]:
        """The services that run now, by name."""
        found = (self._running(name) for name in SERVICES)
        return {service.name: service for service in found if service is not None}

    def _running(self, name: str) -> Running | None:
        try:
            said = json.loads((self.home.root / "run" / f"{name}.json").read_text())
            os.kill(int(said["pid"]), 0)
            return Running(name, int(said["pid"]), str(said["url"]), float(said["started"]), said.get("log"))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def status(self, name: str, timeout: float = 5.0) -> dict[str, Any] | None:
        """What a service says of itself; None: it does not run, or does not answer."""
        service = self._running(name)
        return None if service is None else status_at(service.url, timeout)

    def policy(self, name: str | None) -> tuple[str, str]:
        """(tenant, policy) of a name such as 'assistant' or 'default/assistant'; None: the only one there is.

        Raises ConfigError where it fits none, or several, or the home is one of other policies.
        """
        return self.policies(name, one=True)[0]

    def policies(self, name: str | None, *, one: bool = False) -> list[tuple[str, str]]:
        """Those that a name fits; None: all. ``one``: several are an error. Raises ConfigError, also where the home
        is one of other policies: of these nothing would be found in it."""
        made_with.check(self.config, self.home)
        known = self.config.policies()
        found = [pair for pair in known if name in (None, pair[1], "/".join(pair))]
        listed = ", ".join("/".join(pair) for pair in known)
        if not found:
            raise ConfigError(f"there is no policy {name!r}; this installation has: {listed}")
        if one and len(found) > 1:
            raise ConfigError(f"which policy? Name one of: {listed} (--policy)")
        return found

    def order(self, kind: CommandKind, tenant: str, policy: str, **arguments: Any) -> Command:
        """Append an order; durable on return. A pause, a freeze and their ends go where the newest is kept for ever.

        Raises BrokerAway, in bounded time, where the log's cluster does not answer: nothing is ordered then.
        """
        command = Command(
            id=unique("cmd_"),
            kind=kind,
            tenant=tenant,
            policy=policy,
            arguments={name: value for name, value in arguments.items() if value is not None},
            by=_who(),
            time=time.time(),
        )
        headers = {"schema": "Command", "id": command.id}
        self._need_the_log()
        topic = PAUSES if kind in STANDING else COMMANDS
        self.log.append([NewRecord(topic.name, command.log_key, wire.encode(command), headers, command.time)])
        return command

    def _need_the_log(self) -> None:
        """Asked once, however many orders are given: the answer takes seconds where there is none."""
        if not self._asked:
            self._asked = True
            try:
                check(self.log)
            except BrokerAway as error:
                self._away = error
        if self._away is not None:
            raise self._away

    def answer(self, service: str, command: Command, timeout: float) -> dict[str, Any] | None:
        """What the service answered to an order within ``timeout`` seconds; None: nothing yet."""
        end = time.monotonic() + timeout
        while True:
            said = (self.status(service) or {}).get("commands", {}).get(command.id)
            if said is not None or time.monotonic() > end:
                return said if isinstance(said, dict) else None
            time.sleep(0.1)

    def records(self, topic: Topic, contract: type[C]) -> Iterator[C]:
        """Everything in a topic that is what it should be, in order of each partition."""
        for partition in range(self.log.partitions(topic.name)):
            offset = 0
            while records := self.log.read(topic.name, partition, offset):
                offset = records[-1].offset + 1
                for record in records:
                    if record.value is not None:
                        try:
                            yield wire.decode(contract, record.value, self.home.blobs)
                        except ContractError:
                            continue

    def engine_urls(self) -> tuple[str, ...]:
        """Where the engines answer now. Raises NothingRuns where it is our own and does not run."""
        if not self.config.serving.ours:
            return self.config.serving.urls
        keeper = self.need("engine", "adapters are asked through it").url
        said = (status_at(keeper) or {}).get("engine", {})
        return (str(said.get("url", keeper)),)  # a vLLM answers elsewhere than the process that looks after it

    def need(self, service: str, why: str) -> Running:
        """Raises NothingRuns where the service does not run."""
        running = self._running(service)
        if running is None:
            raise NothingRuns(f"the {service} does not run, and {why}. Start the platform: everloop up")
        return running


def status_at(url: str, timeout: float = 5.0) -> dict[str, Any] | None:
    """What the service at a base URL says of itself; None: none answers there as a service of ours does."""
    try:
        with urllib.request.urlopen(f"{url}/status", timeout=timeout) as answer:
            said = json.loads(answer.read())
    except (OSError, ValueError, http.client.HTTPException):
        return None
    return said if isinstance(said, dict) else None


def holder(url: str) -> str | None:
    """Which Everloop answers at a base URL, for people; None: none that says so."""
    said = status_at(url, timeout=2.0)
    if said is None or "home" not in said:
        return None
    return f"another Everloop, the {said['service']} (process {said['pid']}) of {said['home']}"


def options() -> str:
    """The options that a command for the same installation needs, as this one was given them: ' --home …', or ''."""
    return "".join(f" --{name} {os.environ[key]}" for name, key in OPTIONS.items() if os.environ.get(key))


def _who() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""
