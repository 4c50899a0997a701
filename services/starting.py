"""What of an installation is not ready, for how long, and what it waits for: by its own word, else by its log.

A service that answers says itself what is missing (``/readyz``). One that does not answer yet, as the engine while it
loads a model, is known by its process, a child of 'everloop up', and by the last line of its log.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from services.installation import Installation

SHOWN = 160  # letters of a log's line
TAIL = 8192  # bytes of a log that are looked at


class NotReady(NamedTuple):
    """``seconds`` since its process began; None: not known."""

    name: str
    pid: int | None
    seconds: float | None
    why: str


def up(here: Installation) -> int | None:
    """The process of 'everloop up' on this home; None: there is none."""
    path = here.home.root / "run" / "up.lock"
    try:
        pid, inode = int(path.read_text()), path.stat().st_ino
        os.kill(pid, 0)
        locks = Path("/proc/locks")
        held = not locks.exists() or any(f":{inode} " in line for line in locks.read_text().splitlines())
    except (OSError, ValueError):
        return None
    return pid if held else None


def not_ready(here: Installation) -> list[NotReady]:
    """The services that do not serve yet, or say that they should not be asked now; empty where nothing runs."""
    running, supervisor = here.running(), up(here)
    asked = [name for name in here.expected() if name in running]
    with ThreadPoolExecutor() as pool:  # all at once: one that hangs, as without its broker, has 5 s
        troubles = dict(zip(asked, pool.map(lambda name: _trouble(running[name].url), asked), strict=True))
    found = []
    for name in here.expected():
        if name in running:
            trouble = troubles[name]
            age = time.time() - running[name].started
            found += [NotReady(name, running[name].pid, age, trouble)] if trouble else []
        elif supervisor is not None:
            found.append(_starting(here, name, supervisor))
    return found


def _trouble(url: str) -> str:
    """What a service says that it lacks; empty: nothing."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5):
            return ""
    except urllib.error.HTTPError as error:
        try:
            return "; ".join(f"{name}: {said}" for name, said in json.loads(error.read())["trouble"].items())
        except (ValueError, KeyError, AttributeError):
            return f"it answers {error.code}"
    except OSError:
        return "it does not answer"


def _starting(here: Installation, name: str, supervisor: int) -> NotReady:
    log = here.home.root / "logs" / f"{name}.log"
    child = _child(supervisor, f"services.{name}")
    if child is None:
        return NotReady(name, None, None, f"its process is not there; the end of {log}: {last_line(log)}")
    pid, seconds = child
    said = last_line(log, since=time.time() - seconds)
    return NotReady(name, pid, seconds, f"its log says: {said}" if said else "it has said nothing yet")


def last_line(log: Path, *, since: float = 0.0) -> str:
    """The last message of a service's log; empty where nothing was written after ``since``."""
    try:
        if log.stat().st_mtime < since - 1:
            return ""
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return _message(lines[-1])[:SHOWN] if lines else ""


def _message(line: str) -> str:
    try:
        return str(json.loads(line)["message"])
    except (ValueError, KeyError, TypeError):
        return line.strip()


def _child(parent: int, module: str) -> tuple[int, float] | None:
    """(pid, age in seconds) of the newest child that runs this module; None: there is none, or nobody tells."""
    try:
        children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        named = [pid for pid in children if module in Path(f"/proc/{pid}/cmdline").read_text().split("\0")]
        if not named:
            return None
        pid = named[-1]  # the kernel lists them as they were made
        began = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return pid, float(Path("/proc/uptime").read_text().split()[0]) - began
    except (OSError, ValueError):
        return None
