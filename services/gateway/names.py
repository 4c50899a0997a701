"""What a policy's name may be followed by, and what runs have to sample from: known from the log, asked by requests.

Written by the thread that follows the log, read by the event loop: tables are replaced, never changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from everloop.names import CHECKPOINT, SCHEME, VERSION, Checkpoint, Checkpoints, Pin, PinState, checkpoint_name
from everloop.release import Adapter

from services.gateway.refusals import Refused

Unit = tuple[str, str]
"""(tenant, policy)"""
LISTED = 50  # of each kind, newest first: what a list of models shows of a policy


class Made(NamedTuple):
    """An adapter. ``version`` is the registry's number of it; "": it has none, or its announcement was not seen."""

    version: str = ""
    time: float = 0.0


class Names:
    """Adapters of each policy by hash, checkpoints of each run, and what the releaser said of pins."""

    def __init__(self) -> None:
        self._made: dict[Unit, dict[str, Made]] = {}
        self._runs: dict[tuple[str, str], Checkpoints] = {}
        self.awaited: set[str] = set()
        """Ids of pins that somebody here waits for: what is said of others is passed over."""
        self.said: dict[str, Pin] = {}

    def take_adapter(self, adapter: Adapter) -> None:
        _, found, version = adapter.uri.rpartition("/")
        made = Made(version if found and VERSION.fullmatch(version) else "", adapter.time)
        self._keep((adapter.tenant, adapter.policy), {adapter.hash: made})

    def take_hashes(self, unit: Unit, hashes: set[str]) -> None:
        """Adapters of which nothing else may be known: those that a route names."""
        known = self._made.get(unit, {})
        self._keep(unit, {hash: Made() for hash in hashes if hash not in known})

    def _keep(self, unit: Unit, fresh: dict[str, Made]) -> None:
        self._made[unit] = {**self._made.get(unit, {}), **fresh}

    def take_checkpoints(self, run: Checkpoints) -> None:
        self._runs = {**self._runs, (run.tenant, run.run): run}

    def take_pin(self, pin: Pin) -> None:
        if pin.state is not PinState.ASKED and pin.id in self.awaited:
            self.said[pin.id] = pin

    def plain(self) -> list[Any]:
        """For a file; see :meth:`restore`."""
        return [[*unit, {hash: list(made) for hash, made in its.items()}] for unit, its in self._made.items()]

    def restore(self, plain: list[Any]) -> None:
        """Raises TypeError or ValueError for what :meth:`plain` did not give."""
        for tenant, policy, its in plain:
            self._keep((tenant, policy), {hash: Made(*made) for hash, made in dict(its).items()})

    def adapters(self, unit: Unit) -> frozenset[str]:
        return frozenset(self._made.get(unit, ()))

    def policy_of(self, tenant: str, name: str) -> str | None:
        """The policy that a checkpoint's name is of; None: this tenant has no such run."""
        run = self._run(tenant, name)
        return None if run is None else run.policy

    def find(self, tenant: str, policy: str, pin: str) -> str:
        """The hash of the one adapter that a pin means. Raises Refused (404) where it means none, or several."""
        if pin.startswith(SCHEME):
            return self._checkpoint(tenant, policy, pin)
        made = self._made.get((tenant, policy), {})
        if VERSION.fullmatch(pin):
            found = [hash for hash, its in made.items() if its.version == pin]
            lacking = f"the registry has no version {pin} of this policy, or nobody announced it yet"
        else:
            found = [hash for hash in made if hash.startswith(pin)]
            lacking = "no adapter of this policy begins so"
        if len(found) == 1:
            return found[0]
        why = lacking if not found else f"{len(found)} adapters begin so; write more"
        raise missing(f"{policy}@{pin}", why)

    def _checkpoint(self, tenant: str, policy: str, name: str) -> str:
        run = self._run(tenant, name)
        if run is None or run.policy != policy:
            raise missing(name, "you have no such run, or it has no checkpoint yet")
        at = run.at(name.rpartition("/")[2])
        if at is None:
            kept = ", ".join(str(one.step) for one in run.kept) or "none"
            raise missing(name, f"of this run's checkpoints these are kept: {kept} (train.keep_checkpoints)")
        return at.adapter

    def _run(self, tenant: str, name: str) -> Checkpoints | None:
        parts = CHECKPOINT.fullmatch(name)
        return None if parts is None else self._runs.get((tenant, parts[1]))

    def listed(self, tenant: str, policy: str) -> Iterator[tuple[str, str, float]]:
        """(name, adapter's hash, when it was made) of what can be pinned, newest first: adapters, then checkpoints of
        runs under way."""
        made = self._made.get((tenant, policy), {})
        for hash, its in sorted(made.items(), key=lambda item: -item[1].time)[:LISTED]:
            yield f"{policy}@{its.version or hash}", hash, its.time
        runs = [run for run in self._runs.values() if (run.tenant, run.policy) == (tenant, policy) and run.running]
        kept: list[tuple[Checkpoints, Checkpoint]] = [(run, one) for run in runs for one in reversed(run.kept)]
        for run, one in sorted(kept, key=lambda pair: -pair[0].time)[:LISTED]:
            yield checkpoint_name(run.run, one.step), one.adapter, run.time


def missing(name: str, why: str) -> Refused:
    return Refused(404, f"there is no model {name[:200]!r}: {why}", "model_not_found", "model")
