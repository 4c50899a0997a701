"""Aliases of a policy's model in the registry: requests to the releaser, and a mirror of what is live.

::

    a person:  candidate ─▶ version 7 ──▶ looked at ─▶ its files, checked ─▶ a candidate like any other
               live      ─▶ version 7 ──▶ looked at ─▶ put back to what is live; a person is told how to promote
    releases:  what is live ────────────────────────▶ live

An alias is never a way past gate and canary. Each version is asked about once. The registry is looked at every
``mlflow.poll`` seconds, where it is a SQLite file only once that has changed. While it is away nothing waits for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from everloop.config import Config
from everloop.errors import AdapterRefused, EverloopError
from everloop.registry import model_name
from everloop.release import Adapter, Release

from services.releaser.examiner import Examiner
from services.releaser.state import PolicyState

logger = logging.getLogger(__name__)
LIVE, CANDIDATE = "live", "candidate"
FIRST = 30.0  # seconds after the start before the registry is opened: that takes what others need then
LATER = 5.0  # seconds before what failed is tried again; for looks twice as long each time, up to LONGEST
LONGEST = 60.0


class Look(NamedTuple):
    """A question under way, and the version that ``live`` should have had when it was asked, where that was settled."""

    future: Future[dict[str, dict[str, str]]]
    settled: dict[str, str | None]


class Aliases:
    """Of every policy of an installation. Used by the releaser's thread alone; ``announce`` makes a candidate known."""

    def __init__(self, config: Config, examiner: Examiner, announce: Callable[[Adapter], None], now: float) -> None:
        self._every = config.mlflow.poll
        self._file = _file_of(config.under_home(config.mlflow.uri))
        self._examiner = examiner
        self._announce = announce
        self._begins = now + min(FIRST, 6 * self._every if self._every else FIRST)
        self._look_at, self._mirror_at = self._begins, self._begins
        self._pause = LATER
        self._seen_file: object = None
        self._looking: Look | None = None
        self._mirrored: dict[str, str | None] = {}
        self._mirroring: dict[str, tuple[str | None, Future[None]]] = {}
        self._asked_about: set[tuple[str, str]] = set()
        self._adopting: dict[str, tuple[str, Future[Any]]] = {}
        self._said: dict[str, dict[str, str]] = {}
        self.trouble: str | None = None

    def said(self, key: str) -> Iterator[str]:
        """What became of a policy's aliases, for those who moved them; and why the registry is not looked at."""
        yield from self._said.get(key, {}).values()
        if self.trouble is not None:
            yield self.trouble

    def look(self, states: Mapping[str, PolicyState], now: float) -> None:
        """One look at everything that is under way, or due."""
        if now < self._begins:
            return
        self._mirror(states, now)
        for key, (version, future) in list(self._adopting.items()):
            if future.done():
                del self._adopting[key]
                self._adopted(states[key], version, future)
        if self._looking is not None and self._looking.future.done():
            looking, self._looking = self._looking, None
            self._heard(states, looking, now)
        if self._looking is None and self._every and now >= self._look_at:
            self._look_at = now + self._every
            self._ask(states)

    def _ask(self, states: Mapping[str, PolicyState]) -> None:
        file = _stamp(self._file)
        if self._file is not None and file == self._seen_file:
            return
        self._seen_file = file
        settled = {
            key: _version(state.live)
            for key, state in states.items()
            if key not in self._mirroring and self._mirrored.get(key) == _uri(state.live)
        }
        policies = [(state.tenant, state.policy) for state in states.values()]
        self._looking = Look(self._examiner.registry("aliases", policies=policies), settled)

    def _heard(self, states: Mapping[str, PolicyState], looking: Look, now: float) -> None:
        try:
            found = looking.future.result()
        except EverloopError as error:
            if self.trouble is None:
                logger.warning("aliases are not looked at: %s", error)
            self.trouble = f"aliases are not looked at: {error}"
            self._look_again(now)
            return
        self.trouble, self._pause = None, LATER
        for key, aliases in found.items():
            state = states[key]
            if key in looking.settled and looking.settled[key] == _version(state.live):
                self._hold_against(state, aliases.get(LIVE))
            if CANDIDATE in aliases:
                self._request(state, aliases[CANDIDATE], now)

    def _look_again(self, now: float) -> None:
        self._seen_file = None
        self._look_at = now + self._pause
        self._pause = min(2 * self._pause, LONGEST)

    def _hold_against(self, state: PolicyState, version: str | None) -> None:
        """Have ``live`` put back where somebody moved it."""
        key, wanted = f"{state.tenant}/{state.policy}", _version(state.live)
        if version == wanted:
            return
        moved = "was removed" if version is None else f"was moved to version {version}"
        back = "removed again: the base model is live" if wanted is None else f"put back to version {wanted}"
        how = "It follows the releases: promote with 'everloop release promote'"
        self._say(key, LIVE, f"alias {LIVE} {moved} by hand, and is {back}. {how}")
        self._mirrored[key] = "moved"  # which is no uri: mirrored anew

    def _request(self, state: PolicyState, version: str, now: float) -> None:
        """Have a version examined that nobody asked about before."""
        key = f"{state.tenant}/{state.policy}"
        if (key, version) in self._asked_about or key in self._adopting:
            return
        self._asked_about.add((key, version))
        uri = f"models:/{model_name(state.tenant, state.policy)}/{version}"
        known = next((release for release in state.releases.values() if release.uri == uri), None)
        if known is not None:
            self._say(key, CANDIDATE, _known(version, known))
            return
        asked = {"version": version, "tenant": state.tenant, "policy": state.policy, "now": now}
        self._say(key, CANDIDATE, f"alias {CANDIDATE}: version {version} is fetched and checked")
        self._adopting[key] = version, self._examiner.registry("adopt_version", **asked)

    def _adopted(self, state: PolicyState, version: str, future: Future[Any]) -> None:
        key = f"{state.tenant}/{state.policy}"
        try:
            adapter = Adapter.model_validate(future.result())
        except AdapterRefused as error:
            self._say(key, CANDIDATE, f"alias {CANDIDATE}: version {version} is refused: {error}")
            return
        except EverloopError as error:
            self._say(key, CANDIDATE, f"alias {CANDIDATE}: version {version} will be tried again: {error}")
            self._asked_about.discard((key, version))
            self._seen_file = None
            return
        known = next((release for release in state.releases.values() if release.adapter == adapter.hash), None)
        if known is not None:
            self._say(key, CANDIDATE, _known(version, known))
            return
        self._announce(adapter)
        self._say(key, CANDIDATE, f"alias {CANDIDATE}: version {version} is a candidate now, adapter {adapter.hash}")

    def _say(self, key: str, alias: str, what: str) -> None:
        logger.info("%s: %s", key, what)
        self._said.setdefault(key, {})[alias] = what

    def _mirror(self, states: Mapping[str, PolicyState], now: float) -> None:
        """``live`` follows what is live, a little later, and again until it has."""
        if now < self._mirror_at:
            return
        for key, state in states.items():
            under_way = self._mirroring.get(key)
            if under_way is not None and under_way[1].done():
                del self._mirroring[key]
                if under_way[1].exception() is None:
                    self._mirrored[key] = under_way[0]
                else:
                    self._mirror_at = now + LATER
            elif under_way is None and self._mirrored.get(key) != _uri(state.live):
                uri = _uri(state.live)
                asked = {"tenant": state.tenant, "policy": state.policy, "uri": uri}
                self._mirroring[key] = uri, self._examiner.registry("mirror", **asked)


def _uri(live: Release | None) -> str | None:
    return None if live is None else live.uri or None


def _version(live: Release | None) -> str | None:
    uri = _uri(live)
    return None if uri is None else uri.rpartition("/")[2]


def _known(version: str, release: Release) -> str:
    return f"alias {CANDIDATE}: version {version} is release {release.id} already, {release.state}: {release.reason}"


def _file_of(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _stamp(file: Path | None) -> object:
    """What changes when a SQLite file does; None: there is none."""
    if file is None:
        return None
    found = []
    for path in (file, file.with_name(f"{file.name}-wal")):
        try:
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size))
        except FileNotFoundError:
            found.append((0, 0))
    return tuple(found) if file.exists() else None
