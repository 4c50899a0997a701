"""Load by ``wrk``: what it asks, and what it measured. A load generator in Python would measure itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import NamedTuple

BODY = {
    "model": "assistant",
    "messages": [
        {"role": "system", "content": "You answer a bank's customers. Name the topic of the message."},
        {"role": "user", "content": "My card has not arrived yet, and I ordered it two weeks ago. What can I do?"},
    ],
}
PATIENCE = 30  # seconds for one answer
FIRST = 8
SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer %(key)s"
wrk.body = [[%(body)s]]
local file = os.getenv("CALLS") and io.open(os.getenv("CALLS"), "a")
if file then
  response = function(status, headers)
    if status == 200 then file:write(headers["X-Everloop-Call"], "\\n") file:flush() end
  end
end
done = function(summary, latency)
  local errors = summary.errors
  io.write(string.format('{"requests":%%d,"microseconds":%%d,"refused":%%d,"broken":%%d,"p50":%%f,"p99":%%f}\\n',
    summary.requests, summary.duration, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


class Round(NamedTuple):
    """One run of ``wrk``. Latencies in milliseconds."""

    requests: int
    rate: float
    p50: float
    p99: float


def find_wrk() -> str:
    """Where ``wrk`` is; installed where it can be. Exits, saying how, where it cannot."""
    apt = shutil.which("apt-get")
    if shutil.which("wrk") is None and apt and os.geteuid() == 0:
        print("installing wrk (apt-get install wrk) …", flush=True)
        subprocess.run([apt, "install", "--yes", "--quiet", "wrk"], stdout=subprocess.DEVNULL, check=False)
    found = shutil.which("wrk")
    if found is None:
        raise SystemExit(
            "this benchmark needs 'wrk', which makes load without taking much of the machine: a load generator in "
            "Python measures itself. Install it: apt-get install wrk (Debian, Ubuntu), brew install wrk (macOS)"
        )
    return found


class Load:
    """Runs ``wrk`` with one key against one URL or another. ``folder`` gets its scripts."""

    def __init__(self, folder: Path, key: str) -> None:
        self._wrk = find_wrk()
        folder.mkdir(parents=True, exist_ok=True)
        self._key = key
        self._scripts = {}
        for stream, body in ((False, BODY), (True, {**BODY, "stream": True})):
            script = self._scripts[stream] = folder / f"request{'-stream' * stream}.lua"
            script.write_text(SCRIPT % {"key": key, "body": json.dumps(body, separators=(",", ":"))})

    def run(
        self, url: str, connections: int, seconds: int, calls: Path | None = None, *, stream: bool = False
    ) -> Round:
        """Of a stream, times are to its last byte. Raises SystemExit where any answer was not 200."""
        command = [self._wrk, "-t1", f"-c{connections}", f"-d{seconds}s", f"-s{self._scripts[stream]}"]
        environment = {**os.environ} | ({"CALLS": str(calls)} if calls else {})
        out = subprocess.run(
            [*command, f"--timeout={PATIENCE}s", f"{url}/v1/chat/completions"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return read(out)

    def first(self, url: str, *, stream: bool = False) -> None:
        """A few answers one by one: the first of a process may take seconds. Raises OSError where none comes."""
        body = json.dumps({**BODY, "stream": stream}).encode()
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        for _ in range(FIRST):
            asked = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
            with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
                answer.read()


def read(out: str) -> Round:
    """What ``wrk`` printed. Raises SystemExit where any answer was not 200."""
    said = json.loads(out.splitlines()[-1])
    if said["refused"] or said["broken"] or not said["requests"]:
        raise SystemExit(f"not every request was answered: {said}")
    rate = said["requests"] / (said["microseconds"] / 1e6)
    return Round(said["requests"], rate, said["p50"] / 1000, said["p99"] / 1000)
