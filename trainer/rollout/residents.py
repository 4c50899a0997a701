"""What the engine can answer as: base models, and adapters resident beside them. Thread-safe.

An adapter is resident as a module that shares with its base all weights that it leaves as they are. Beyond a limit
the one used longest ago goes, but never one that is answering: then there is one more for a while.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from everloop.errors import AdapterRefused, UnknownAdapter
from torch import nn

from trainer.policy import lora
from trainer.policy.base import Policy


@dataclass
class Resident:
    """A module to answer with. ``uses`` counts the requests that it is answering."""

    name: str
    policy: Policy
    module: nn.Module
    uses: int = 0


class Residents:
    """``limit`` adapters, over all bases together."""

    def __init__(self, policies: Iterable[Policy], limit: int) -> None:
        self._bases = {policy.name: Resident(policy.name, policy, policy.model) for policy in policies}
        self._adapters: OrderedDict[str, Resident] = OrderedDict()
        self._limit = limit
        self._lock = threading.Lock()

    @property
    def bases(self) -> list[Resident]:
        return list(self._bases.values())

    def adapters(self) -> dict[str, str]:
        """The base's name by adapter."""
        with self._lock:
            return {name: resident.policy.name for name, resident in self._adapters.items()}

    def lease(self, model: str) -> Resident:
        """What answers as ``model``, kept until :meth:`release`. Raises UnknownAdapter."""
        with self._lock:
            resident = self._adapters.get(model) or self._bases.get(model)
            if resident is None:
                known = ", ".join([*self._bases, *self._adapters])
                raise UnknownAdapter(f"there is no model {model!r} here; there are: {known}")
            if model in self._adapters:
                self._adapters.move_to_end(model)
            resident.uses += 1
            return resident

    def release(self, resident: Resident) -> None:
        with self._lock:
            resident.uses -= 1
            self._evict()

    def load(self, name: str, folder: Path) -> None:
        """Check the files and make the adapter resident; it appears whole or not at all. Slow: not on an event loop.

        Raises AdapterRefused: not the files that the hash ``name`` stands for, or of a base that is not here.
        """
        with self._lock:
            if name in self._adapters:
                self._adapters.move_to_end(name)
                return
        policy = self._base_of(folder)
        lora.check(folder, policy, expected_hash=name)
        module = lora.merged(policy, folder)
        with self._lock:
            self._adapters.setdefault(name, Resident(name, policy, module))
            self._adapters.move_to_end(name)
            self._evict()

    def unload(self, name: str) -> bool:
        """Whether it was resident. Requests that it is answering keep it until they are done."""
        with self._lock:
            return self._adapters.pop(name, None) is not None

    def _base_of(self, folder: Path) -> Policy:
        identity = lora.base_of(folder)
        for resident in self._bases.values():
            if resident.policy.identity == identity:
                return resident.policy
        known = ", ".join(resident.policy.identity for resident in self._bases.values())
        raise AdapterRefused(f"the adapter in {folder} belongs to base {identity!r}, which is not served here: {known}")

    def _evict(self) -> None:
        spare = len(self._adapters) - self._limit
        newest = next(reversed(self._adapters), None)
        for name in [n for n, r in self._adapters.items() if r.uses == 0 and n != newest][: max(0, spare)]:
            del self._adapters[name]
