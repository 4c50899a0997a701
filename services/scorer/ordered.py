"""A person's orders about reward models, as the log has them by now."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from everloop import wire
from everloop.errors import ContractError
from everloop.log import Log
from everloop.run import STANDING, Command
from everloop.topics import PAUSES
from everloop.wire import BlobStore

from services.releaser.journal import Tail

EVERY = 0.5  # seconds between looks


class Ordered:
    """Call it with (tenant, policy): its orders, oldest first. From any thread.

    The first call reads all that the topic keeps; later ones what was added, ``every`` seconds after the last look at
    the earliest. Raises LogError where the log does not answer.
    """

    def __init__(self, log: Log, blobs: BlobStore, every: float = EVERY) -> None:
        self._tail, self._blobs, self._every = Tail(log, PAUSES), blobs, every
        self._lock = threading.Lock()
        self._due = 0.0
        self._found: dict[str, list[Command]] = {}

    def __call__(self, tenant: str, policy: str) -> Sequence[Command]:
        with self._lock:
            if time.monotonic() >= self._due:
                for record in self._tail.all():
                    self._take(record.value)
                self._due = time.monotonic() + self._every
            return tuple(self._found.get(f"{tenant}/{policy}", ()))

    def _take(self, value: bytes | None) -> None:
        try:
            order = wire.decode(Command, value, self._blobs) if value is not None else None
        except ContractError:  # the releaser, which reads the topic too, says so
            return
        if order is not None and STANDING.get(order.kind) == "reward":
            self._found.setdefault(order.key, []).append(order)
