"""Clients that ask the gateway without pause, each request another person's, and keep what came."""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from examples.bank_desk.platform import Ready

CLIENTS = 2
BREATH = 0.02  # seconds between two requests of a client
LIMIT = 60.0


class Answer(NamedTuple):
    """One answer of the gateway; times in seconds since 1970. ``output``: the message; ``unit``: who asked."""

    sent: float
    came: float
    version: str
    arm: str = "live"
    call: str = ""
    unit: str = ""
    output: Mapping[str, Any] = {}


class Traffic:
    """Clients that ask one question without pause. ``answers`` grows."""

    def __init__(self, ready: Ready, question: Mapping[str, Any]) -> None:
        self.answers: list[Answer] = []
        self.failed: list[str] = []
        self._ready = ready
        self._question = question
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    @contextmanager
    def flowing(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def _ask(self, client: int) -> None:
        where = urlsplit(self._ready.url)
        connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=30)
        headers = {"Authorization": f"Bearer {self._ready.key}", "Content-Type": "application/json"}
        number = 0
        while not self._stop.wait(BREATH):
            number += 1
            sent = time.time()
            unit = f"client-{client}-{number}"
            body = json.dumps({**self._question, "user": unit})
            connection.request("POST", f"{where.path}/chat/completions", body, headers)
            response = connection.getresponse()
            raw = response.read()
            if response.status != 200:
                self.failed.append(f"status {response.status}")
                continue
            came, told = time.time(), response.headers
            version, arm, call = (told[f"X-Everloop-{name}"] for name in ("Policy-Version", "Arm", "Call"))
            output = json.loads(raw)["choices"][0]["message"]
            self.answers.append(Answer(sent, came, version, arm, call, unit, output))

    def until(self, what: str, found: Callable[[Sequence[Answer]], bool], start: int) -> None:
        """Wait for answers since ``start``. Ends the benchmark where they do not come."""
        end = time.monotonic() + LIMIT
        while not found(self.answers[start:]):
            if time.monotonic() > end:
                sys.exit(f"the benchmark failed: {what} did not come within {LIMIT:g} s")
            time.sleep(0.02)
