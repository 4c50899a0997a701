"""One check in a process of its own, which ends whatever the check does.

::

    caller ─▶ job.json in a new folder ─▶ python -I -S inside.py ─▶ verdict.json ─▶ caller
                                            limits, system call filter, then what the answer brought

Limits: wall and processor time, memory (address space), size of each file that it writes, its output included. The
filter (seccomp, on Linux for x86-64 and aarch64) kills it at once where it starts a process or a thread, opens a socket
or signals another process. Elsewhere it is not there: forks are then held by their count (not for root), the network is
open, and :attr:`Outcome.filtered` is False. When its time is over the whole process group is killed.

**What it does not hold**: files. It reads and writes what the user of this service may, so run a service that checks
code as a user of its own. And an answer whose code studies the script that tests it may cheat that one test.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from everloop.section import Section
from pydantic import Field

from reward.checks.base import LONGEST, Verdict, failed

INSIDE = Path(__file__).with_name("inside.py")
VERDICT_BYTES = 16_384
SIGNALS = {
    "SIGSYS": ("forbidden", "it started a process, opened a socket or signalled another process, and was killed"),
    "SIGXFSZ": ("too_much_output", "it wrote more than it may"),
}


class LimitOptions(Section):
    """Of one check."""

    seconds: float = Field(default=5.0, gt=0, le=60, description="of wall time, its start included")
    memory_mb: int = Field(default=512, ge=64, le=8192)
    file_mb: int = Field(default=4, ge=1, le=1024, description="that it may write to one file, its output included")


class Outcome(NamedTuple):
    """``filtered``: whether the system call filter was on; None: it ended before it said."""

    verdict: Verdict
    filtered: bool | None


def run(do: str, job: dict[str, Any], limits: LimitOptions) -> Outcome:
    """Do one of :data:`reward.checks.inside.JOBS`. Returns soon after ``limits.seconds`` at the latest."""
    secret = secrets.token_hex(16)
    numbers = {
        "RLIMIT_AS": limits.memory_mb << 20,
        "RLIMIT_CPU": int(limits.seconds) + 1,  # also where the caller is gone and nobody looks at the clock
        "RLIMIT_FSIZE": limits.file_mb << 20,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,
        "RLIMIT_NOFILE": 64,
    }
    with tempfile.TemporaryDirectory(prefix="everloop-check-", ignore_cleanup_errors=True) as folder:
        body = json.dumps({**job, "do": do, "secret": secret, "limits": numbers})
        (Path(folder) / "job.json").write_text(body, encoding="utf-8")
        status = _ended(folder, limits.seconds)
        return _outcome(status, Path(folder) / "verdict.json", secret, limits)


def _ended(folder: str, seconds: float) -> int | None:
    """The exit status; None: its time was over. Nothing of its group is left."""
    with open(os.path.join(folder, "output"), "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(INSIDE), folder],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"PATH": os.defpath, "TMPDIR": folder, "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
        )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _outcome(status: int | None, path: Path, secret: str, limits: LimitOptions) -> Outcome:
    if status is None:
        return Outcome(failed("timeout", f"it took more than {limits.seconds:g} s"), None)
    if status < 0:
        name = signal.Signals(-status).name
        return Outcome(failed(*SIGNALS.get(name, ("killed", f"it was ended by {name}"))), None)
    said = _said(path, secret)
    if said is None:
        kind = "no_verdict" if status == 0 else "crashed"
        return Outcome(failed(kind, f"it ended with status {status} and without a verdict"), None)
    return Outcome(Verdict(said["value"], str(said["why"]), said["failure"]), bool(said["filtered"]))


def _said(path: Path, secret: str) -> dict[str, Any] | None:
    try:
        if path.is_symlink():
            return None
        with path.open("rb") as file:
            said = json.loads(file.read(VERDICT_BYTES))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) and said.get("secret") == secret else None


def cut(answer: str) -> str:
    """What a check reads of an answer."""
    return answer[:LONGEST]
