"""Trying again: bounded, with exponential backoff and jitter, and given up at once when the process is to stop."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Stopping(Exception):
    """A stop was asked for while a step waited for its next try."""


class Retry(NamedTuple):
    """``tries`` of one step, with waits between them that double from ``first`` to ``longest`` seconds, jittered."""

    tries: int = 8
    first: float = 0.1
    longest: float = 10.0

    def wait(self, failed: int) -> float:
        """Seconds before the next try, after ``failed`` of them (1 and up)."""
        return min(self.longest, self.first * 2 ** (failed - 1)) * random.uniform(0.5, 1.0)

    def call(
        self,
        what: str,
        step: Callable[[], T],
        stop: threading.Event,
        *,
        permanent: tuple[type[Exception], ...] = (),
        failed: Callable[[], None] = lambda: None,
    ) -> T:
        """The result of ``step``. ``failed`` is called before each wait; ``permanent`` errors are raised at once.

        Raises Stopping where ``stop`` is set during a wait, and the last error where no try is left.
        """
        for tried in range(1, self.tries + 1):
            try:
                return step()
            except permanent:
                raise
            except Exception as error:
                if tried == self.tries:
                    raise
                wait = self.wait(tried)
                logger.warning("%s failed (try %d of %d, next in %.2f s): %r", what, tried, self.tries, wait, error)
                failed()
                if stop.wait(wait):
                    raise Stopping(what) from error
        raise ValueError(f"{what}: at least one try is needed, not {self.tries}")
