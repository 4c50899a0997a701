"""Adapters that somebody asks for by name: checked, loaded beside what users are answered by, kept while in use.

::

    gateway ─▶ Pin (asked) ─▶ take() ─▶ files checked, loaded (examiner) ─▶ look() ─▶ Pin (held, …) ─▶ gateway

A pin has no part in releases and needs no gate: it answers those alone who name it. The engine's places go to releases
first (what is live, its way back, a canary, a candidate that is being examined); of what is left the pins that were
used last have one each, and an older one goes when its place is needed. A pin that nobody used for
``serving.keep_pinned`` is let go in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from everloop.config import Config
from everloop.errors import AdapterRefused, EverloopError
from everloop.names import Pin, PinState, checkpoint_name
from everloop.release import Release
from everloop.section import seconds

from services.releaser.examiner import Examiner
from services.releaser.journal import Journal
from services.releaser.state import PolicyState

logger = logging.getLogger(__name__)


@dataclass
class Pinned:
    """One adapter that is asked for. ``release`` says whose it is and where its files are; it is in no state."""

    release: Release
    used: float
    loading: Future[None] | None = None
    checked: bool = False
    waiting: list[Pin] = field(default_factory=list)


class Pins:
    """Everything that is pinned in an installation. Used by the releaser's thread alone."""

    def __init__(self, config: Config, journal: Journal, examiner: Examiner) -> None:
        self._places = config.serving.resident_adapters
        self._keep = seconds(config.serving.keep_pinned)
        self._journal = journal
        self._examiner = examiner
        self._asked: list[Pin] = []
        self._answered: set[str] = set()
        self._checkpoints: dict[str, dict[str, str]] = {}
        self._pinned: dict[tuple[str, str], Pinned] = {}
        self.known: set[str] = set()
        """Adapters that were ever loaded for a pin's sake: the engine may be told to drop them."""

    def take(self, now: float) -> None:
        """Read what is asked for: before the adapters of the same round, so that each one that is meant is known."""
        for pin in self._journal.new_pins():
            self.known.add(pin.adapter)
            if pin.state is not PinState.ASKED:
                self._answered.add(pin.id)
            elif now - pin.time < self._keep:
                self._asked.append(pin)

    def look(self, states: Mapping[str, PolicyState], serving: Mapping[str, Release], now: float) -> bool:
        """Begin what is asked for, and answer what is done; whether anything has changed.

        ``serving``: by adapter, what releases need resident.
        """
        for run in self._journal.new_checkpoints():
            names = {one.adapter: checkpoint_name(run.run, one.step) for one in run.kept}
            self._checkpoints[run.key] = names
        asked, self._asked = self._asked, []
        for pin in asked:
            self._begin(pin, states.get(pin.key), serving, now)
        self._answered.clear()
        done = [one for one in self._pinned.values() if one.loading is not None and one.loading.done()]
        for pinned in done:
            self._loaded(pinned, now)
        kept = {k: one for k, one in self._pinned.items() if one.loading or now - one.used < self._keep}
        changed = bool(asked or done) or len(kept) < len(self._pinned)
        self._pinned = kept
        return changed

    def wanted(self, serving: Mapping[str, Release]) -> dict[str, Release]:
        """By adapter, the pins that have a place in the engine beside what releases need, the last used first."""
        chosen = self._chosen(serving)
        return {one.release.adapter: one.release for one in chosen if one.checked}

    def described(self, key: str) -> list[dict[str, Any]]:
        """For status pages: a policy's pins, the last used first."""
        its = [one for one in self._pinned.values() if one.release.key == key]
        return [
            {"adapter": one.release.adapter, "uri": one.release.uri, "until": one.used + self._keep}
            for one in sorted(its, key=lambda one: -one.used)
        ]

    def _begin(self, pin: Pin, state: PolicyState | None, serving: Mapping[str, Release], now: float) -> None:
        pinned = self._pinned.get((pin.key, pin.adapter))
        if pinned is None:
            uri = None if state is None else self._uri(state, pin)
            if uri is None:
                self._answer(pin, PinState.REFUSED, "this policy has no such adapter, or its files were not kept", now)
                return
            its = {"tenant": pin.tenant, "policy": pin.policy, "adapter": pin.adapter, "uri": uri}
            pinned = self._pinned[pin.key, pin.adapter] = Pinned(Release(id="", time=now, **its), used=0.0)
        pinned.used = max(pinned.used, min(pin.time, now))
        if pinned not in self._chosen(serving):
            del self._pinned[pin.key, pin.adapter]
            why = f"the engine has {self._places} places (serving.resident_adapters), all taken by what answers users"
            self._answer(pin, PinState.FULL, why, now)
            return
        held = pin.adapter in self._examiner.residents.held
        if held and (pinned.checked or pin.adapter in serving):
            self._answer(pin, PinState.HELD, "", now)
            return
        pinned.waiting.append(pin)
        if pinned.loading is None:
            pinned.loading = self._examiner.prepare(pinned.release)

    def _uri(self, state: PolicyState, pin: Pin) -> str | None:
        """Where the files of an adapter of the policy lie: every one that is announced becomes a release."""
        released = (release.uri for release in state.releases.values() if release.adapter == pin.adapter)
        its = (names for run, names in self._checkpoints.items() if run.startswith(f"{pin.key}/"))
        return next(released, None) or next((names[pin.adapter] for names in its if pin.adapter in names), None)

    def _chosen(self, serving: Mapping[str, Release]) -> list[Pinned]:
        """Those that have a place, the last used first: one that a release needs anyway takes none."""
        taken = len(serving.keys() | self._examiner.examined)
        free = [one for one in self._pinned.values() if one.release.adapter in serving]
        others = [one for one in self._pinned.values() if one.release.adapter not in serving]
        return free + sorted(others, key=lambda one: -one.used)[: max(0, self._places - taken)]

    def _loaded(self, pinned: Pinned, now: float) -> None:
        assert pinned.loading is not None
        state, reason = _outcome(pinned.loading)
        pinned.loading, pinned.checked = None, state is PinState.HELD
        for pin in pinned.waiting:
            self._answer(pin, state, reason, now)
        pinned.waiting = []
        if state is not PinState.HELD:
            del self._pinned[pinned.release.key, pinned.release.adapter]

    def _answer(self, pin: Pin, state: PinState, reason: str, now: float) -> None:
        if pin.id in self._answered:  # before a restart: now it is loaded again, and nobody waits for a word
            return
        self._journal.answer(pin.model_copy(update={"state": state, "reason": reason, "time": now}))
        if state is not PinState.HELD:
            logger.warning("%s: adapter %s is pinned and not held: %s", pin.key, pin.adapter, reason)


def _outcome(loading: Future[None]) -> tuple[PinState, str]:
    try:
        loading.result()
    except AdapterRefused as error:
        return PinState.REFUSED, str(error)
    except EverloopError as error:
        return PinState.FAILED, str(error)
    except Exception as error:
        logger.exception("loading a pinned adapter")
        return PinState.FAILED, f"it failed: {error!r}"
    return PinState.HELD, ""
