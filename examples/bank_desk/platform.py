"""The platform under the demo: its configuration, its processes (those of ``everloop up``), its status over HTTP."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.bank_desk.data import Message

TENANT, POLICY = "bank", "desk"
COMMAND = (sys.executable, "-m", "everloop.cli.main")
START_LIMIT = 900.0  # seconds: a vLLM takes minutes on a busy machine
EMBEDDED = "sqlite:///log.db"
CONFIG = """\
# Written by 'everloop demo'. Small numbers, so that a loop closes within minutes.
home = {home}
cache = {cache}

[log]
url = {log}

[gateway]
port = 0

[serving]
url = {serving}
port = 0

[services]
engine_port = 0
assembler_port = 0
reward_port = 0
learner_port = 0
releaser_port = 0

[tenants.{tenant}.policies.{policy}]
base = {base}
max_tokens = 48

[tenants.{tenant}.policies.{policy}.train]
min_scored = {min_scored}
reward_drift = 0.5
thumbs_drop = 0.5
seed = {seed}

[tenants.{tenant}.policies.{policy}.gate]
min_gold = 40
slice_loss = 0.25  # a topic has about 20 held-out messages: what protects is the pooled check (old_skill_loss)

[tenants.{tenant}.policies.{policy}.canary]
share = 0.5
margin = 0.1
min_units = 50
max_duration = "150s"
"""


class PlatformFailed(Exception):
    """A process of the platform did not do its part; has the end of what it said."""


class Ready(NamedTuple):
    """Where a started platform answers. ``url`` ends in ``/v1``; ``services`` holds the base URL of each."""

    url: str
    key: str
    services: dict[str, str]


def write_config(
    home: Path, cache: Path, base: Path, min_scored: int, seed: int, log: str = EMBEDDED, serving: str = "embedded"
) -> Path:
    """The demo's configuration, as a person would have written it to ``everloop.toml``."""
    text = {name: json.dumps(str(path.absolute())) for name, path in (("home", home), ("cache", cache), ("base", base))}
    text |= {"log": json.dumps(log), "serving": json.dumps(serving)}
    path = home / "everloop.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CONFIG.format(tenant=TENANT, policy=POLICY, min_scored=min_scored, seed=seed, **text))
    return path


def write_examples(path: Path, messages: Sequence[Message]) -> Path:
    """Messages as JSON lines with ``text`` and ``answer``: what ``base build`` and ``gold import`` read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": m.text, "answer": m.topic, "slice": m.topic}, ensure_ascii=False) for m in messages)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def base_folder(cache: Path, prior: Sequence[Message], seed: int) -> Path:
    """Where the base with this prior lies: elsewhere for other messages, another seed, or another way of building."""
    builder = importlib.util.find_spec("trainer.policy.tiny_k2")
    source = Path(builder.origin).read_bytes() if builder and builder.origin else b""
    parts = json.dumps([list(prior), seed]).encode() + source
    return cache.absolute() / "bases" / f"bank-desk-{hashlib.sha256(parts).hexdigest()[:16]}"


def build_base(base: Path, prior: Sequence[Message], seed: int, config: Path) -> None:
    """Build the base where it is not there yet, in the cache of a configuration. Raises PlatformFailed."""
    if not base.exists():
        examples = write_examples(config.parent / "prior.jsonl", prior)
        everloop_command("base", "build", base.name, "--examples", str(examples), "--seed", str(seed), config=config)


def everloop_command(*words: str, config: Path | None = None) -> str:
    """Run one ``everloop`` command to its end; returns what it printed. Raises PlatformFailed where it fails."""
    where = ["--config", str(config)] if config else []
    done = subprocess.run([*COMMAND, words[0], *where, *words[1:]], capture_output=True, text=True, env=environment())
    if done.returncode != 0:
        raise PlatformFailed(f"'everloop {' '.join(words)}' failed:\n{(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def environment() -> dict[str, str]:
    """This process's environment without what would point the platform elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}


class Platform:
    """``everloop up`` as a process of its own. Use as a context manager: leaving it takes everything down."""

    def __init__(self, home: Path, config: Path) -> None:
        self.home = home
        self.config = config
        self.ready: Ready | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Platform:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> Ready:
        """Returns once every service is ready. Raises PlatformFailed where that does not come."""
        (self.home / "logs").mkdir(parents=True, exist_ok=True)
        with (self.home / "logs" / "up.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*COMMAND, "up", "--json", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(),
            )
        line = self._first_line(self._process)
        if not line:
            end = (self.home / "logs" / "up.log").read_text(errors="replace").strip()[-2000:]
            raise PlatformFailed(
                f"'everloop up' did not get ready within {START_LIMIT:g} s; logs: {self.home}/logs\n{end}"
            )
        said = json.loads(line)
        self.ready = Ready(said["url"], said["key"], said["services"])
        return self.ready

    @staticmethod
    def _first_line(process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        end = time.monotonic() + START_LIMIT
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while time.monotonic() < end and process.poll() is None:
                if selector.select(timeout=0.2):
                    return process.stdout.readline()
        return process.stdout.readline() if process.poll() is not None else b""

    def stop(self, limit: float = 20.0) -> None:
        """Ask it to drain, and end it where it does not."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(limit)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None

    def alive(self) -> None:
        """Raises PlatformFailed where ``everloop up`` has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            raise PlatformFailed(f"'everloop up' ended with status {self._process.returncode}; logs: {self.home}/logs")

    def status(self, service: str) -> dict[str, Any]:
        """What a service says of itself; empty while it does not answer (it may be on its way up again)."""
        assert self.ready is not None
        try:
            with urllib.request.urlopen(f"{self.ready.services[service]}/status", timeout=5) as answer:
                return dict(json.load(answer))
        except (OSError, ValueError, KeyError):
            return {}
