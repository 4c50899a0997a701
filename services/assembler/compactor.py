"""Compaction of the store, now and then, beside the archive that fills it."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

from prometheus_client import Counter

from pipelines.compaction import compact

logger = logging.getLogger(__name__)
EVERY = 20.0  # seconds
FOLDED = Counter("everloop_store_folded_files", "Small files of the store that were folded into larger ones")


class Compactor:
    """A loop that folds the store's small files. A failure is said in the status and tried again, nothing else:
    the store is whole without compaction, only slower."""

    def __init__(self, folder: Path, stop: threading.Event, every: float = EVERY) -> None:
        self._folder = folder
        self._stop = stop
        self._every = every
        self._folded = 0
        self._seconds = 0.0
        self._trouble = ""

    def run(self) -> None:
        while not self._stop.wait(self._every):
            self.once()

    def once(self) -> None:
        began = time.monotonic()
        try:
            folded = compact(self._folder)
            self._trouble = ""
        except Exception as error:
            logger.exception("compaction; it is tried again in %g s", self._every)
            self._trouble = str(error)
            return
        self._folded += folded
        self._seconds = time.monotonic() - began
        FOLDED.inc(folded)

    def status(self) -> dict[str, Any]:
        return {"folded": self._folded, "last_seconds": round(self._seconds, 3), "trouble": self._trouble}
