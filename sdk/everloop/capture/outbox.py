"""The bounded queue between the agent and the gateway, and the one thread that empties it.

::

    agent's threads ──put()──▶ a deque a route, together ──take()──▶ sender thread ──POST──▶ gateway
          ▲                    at most max_queue_bytes                  │   ▲
          └── never waits: full means dropped, counted                  │   └── woken by put, flush, close
                                                                        └── flush() waits for its progress

One lock guards the queue and the counts; nobody holds it during a request. A batch leaves the queue's byte count
only once it is acknowledged or dropped, so a gateway that hangs cannot make memory grow. What the gateway cannot
take now (429, 5xx, no connection) is tried again with backoff; a batch that it refuses is halved until the items
at fault are alone and dropped. Items carry ids made by the producer: trying again makes no second event.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

from everloop.capture.delivery import Answer
from everloop.capture.settings import Settings
from everloop.capture.tally import Stats, Tally

Route = Literal["events", "feedback"]
FIRST_BACKOFF, LAST_BACKOFF = 0.1, 5.0


class Item(NamedTuple):
    """``number`` counts everything that was queued, over both routes."""

    number: int
    route: Route
    body: bytes


class Outbox:
    """``post(route, bodies)`` sends one batch and never raises. Thread-safe; a forked child starts empty."""

    def __init__(self, settings: Settings, post: Callable[[Route, list[bytes]], Answer]) -> None:
        self.settings = settings
        self._post = post
        self._start_empty()

    def _start_empty(self) -> None:
        self._changed = threading.Condition()  # re-entrant: a log handler may call the SDK
        self._queues: dict[Route, deque[Item]] = {"events": deque(), "feedback": deque()}
        self._bytes = 0
        self._put = 0
        self._done = 0
        self._hurry = False
        self._closing: float | None = None
        self._tally = Tally()
        self._thread: threading.Thread | None = None

    after_fork_in_child = _start_empty
    """The parent's thread, locks and queue are the parent's: it sends what was queued before the fork."""

    def put(self, route: Route, body: bytes) -> bool:
        """Queue one item; False where it was dropped. Returns at once in any case."""
        with self._changed:
            reason = self._refusal(body)
            if reason is None and self._thread is None:
                reason = self._start()
            if reason is not None:
                self._tally.drop(reason)
                return False
            waiting = any(self._queues.values())
            self._queues[route].append(Item(self._put, route, body))
            self._bytes += len(body)
            self._put += 1
            if not waiting:
                self._changed.notify_all()
            return True

    def _refusal(self, body: bytes) -> str | None:
        if self._closing is not None:
            return "process ended"
        if len(body) > self.settings.max_item_bytes:
            return "too large"
        if self._bytes + len(body) > self.settings.max_queue_bytes:
            return "queue full"
        return None

    def _start(self) -> str | None:
        thread = threading.Thread(target=self._run, name="everloop-sdk", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter is going down
            return "no thread"
        self._thread = thread
        return None

    def drop(self, reason: str, detail: str = "") -> None:
        """Count something that never reached the queue."""
        with self._changed:
            self._tally.drop(reason, detail)

    def stats(self) -> Stats:
        with self._changed:
            queued = self._put - self._done
            return Stats(self._tally.sent, queued, self._bytes, self._tally.retries, dict(self._tally.dropped))

    def flush(self, timeout: float) -> bool:
        """Wait until all that is queued now was sent or dropped; False where ``timeout`` seconds were not enough."""
        with self._changed:
            goal = self._put
            self._hurry = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._done >= goal, timeout)

    def close(self, timeout: float) -> None:
        """Take nothing more, and give what is queued ``timeout`` seconds; the rest is dropped and counted."""
        with self._changed:
            if self._closing is not None:
                return
            self._closing = time.monotonic() + timeout
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout)
        with self._changed:
            left = self._put - self._done
            if left:
                self._tally.drop("process ended", items=left)
                self._done = self._put

    def _run(self) -> None:
        while batch := self._take():
            self._deliver(batch)

    def _take(self) -> list[Item]:
        """The next batch, all of the route whose turn it is; waits for it. Empty: closed, and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: any(self._queues.values()) or self._closing is not None)
            if not self._hurry and self._closing is None and self._put - self._done < self.settings.max_batch_items:
                self._changed.wait_for(lambda: self._hurry or self._closing is not None, self.settings.linger)
            waiting = [queue for queue in self._queues.values() if queue]
            batch = self._cut(min(waiting, key=lambda queue: queue[0].number)) if waiting else []
            self._hurry = self._hurry and any(self._queues.values())
            return batch

    def _cut(self, queue: deque[Item]) -> list[Item]:
        """The oldest items of a route, as many as one request may carry."""
        batch: list[Item] = []
        size = 0
        while queue and len(batch) < self.settings.max_batch_items:
            if batch and size + len(queue[0].body) > self.settings.max_batch_bytes:
                break
            batch.append(queue.popleft())
            size += len(batch[-1].body)
        return batch

    def _deliver(self, batch: list[Item]) -> None:
        """Send a batch until each of its items was acknowledged, refused, or out of time."""
        waiting = [batch]
        failures = 0
        while waiting:
            part = waiting.pop()
            answer = self._post(part[0].route, [item.body for item in part])
            if answer.accepted:
                self._settle(part, None)
            elif answer.again:
                waiting.append(part)
                failures += 1
                if not self._back_off(failures, answer.retry_after):
                    for unsent in waiting:
                        self._settle(unsent, "process ended", answer.reason)
                    return
            elif answer.divisible and len(part) > 1:
                middle = len(part) // 2
                waiting += [part[middle:], part[:middle]]
            else:
                self._settle(part, answer.reason, answer.detail)

    def _settle(self, part: list[Item], reason: str | None, detail: str = "") -> None:
        with self._changed:
            if self._done >= self._put:  # close() has given up on it
                return
            if reason is None:
                self._tally.sent += len(part)
            else:
                self._tally.drop(reason, detail, len(part))
            self._done += len(part)
            self._bytes -= sum(len(item.body) for item in part)
            self._changed.notify_all()

    def _back_off(self, failures: int, retry_after: float | None) -> bool:
        """Wait before the next try; False where closing leaves no time for one."""
        delay = retry_after or min(LAST_BACKOFF, FIRST_BACKOFF * 2 ** min(failures - 1, 16)) * random.uniform(0.5, 1)
        with self._changed:
            self._tally.retries += 1
            if self._closing is None:
                self._changed.wait_for(lambda: self._closing is not None, delay)
            if self._closing is None:
                return True
            left = self._closing - time.monotonic()
        if left > 0:
            time.sleep(min(left, FIRST_BACKOFF))
        return left > FIRST_BACKOFF
