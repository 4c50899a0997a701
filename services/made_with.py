"""Which configuration and policies a home is of, so that a command with another one says so instead of finding nothing.

A home may be named by itself (``--home``), and then the configuration is whatever lies in the folder where the command
is given, or the defaults.
"""

from __future__ import annotations

import os
from pathlib import Path

from everloop.config import Config
from everloop.errors import ConfigError
from everloop.home import Home

FILE = "config.path"


def source() -> Path | None:
    """The file that the configuration of this process comes from; None: it has none, and the defaults count."""
    path = Path(os.environ.get("EVERLOOP_CONFIG") or "everloop.toml")
    return path.absolute() if path.exists() else None


def remember(home: Home) -> None:
    """Note in the home, which is there, the configuration file of this start."""
    path, given = home.root / FILE, source()
    if given is None:
        path.unlink(missing_ok=True)
        return
    partial = home.root / f"{FILE}.partial"
    partial.write_text(f"{given}\n", encoding="utf-8")
    partial.replace(path)


def remembered(home: Home) -> Path | None:
    """That file, if it is still there."""
    try:
        path = Path((home.root / FILE).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return None
    return path if path.is_file() else None


def policies(home: Home) -> set[str]:
    """'tenant/policy' of those whose answers were scored or that got gold items in this home."""
    rewards = {f"{path.parent.name}/{path.name}" for path in home.root.glob("rewards/*/*") if path.is_dir()}
    return rewards | {f"{path.parent.name}/{path.stem}" for path in home.root.glob("gold/*/*.jsonl")}


def check(config: Config, home: Home) -> None:
    """Raises ConfigError where the home is one of policies of which the configuration has none: what to type."""
    held, named = policies(home), {"/".join(pair) for pair in config.policies()}
    if not held or held & named:
        return
    given, made = source(), remembered(home)
    if given is not None and given == made:  # its policies were renamed, or others took their place
        return
    ours = f"the configuration {given}" if given else "the default configuration (there is no everloop.toml here)"
    mend = f"--config {made}" if made else "the --config that it was started with"
    raise ConfigError(
        f"the home {home.root} is one of {', '.join(sorted(held))}, and {ours} has {', '.join(sorted(named))}, of "
        f"which nothing lies there: give {mend}, or another --home"
    )
