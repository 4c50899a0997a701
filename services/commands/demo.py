"""Close the loop on real messages and show the improvement: a bank's desk agent learns from its customers.

Builds a small base model, starts the processes of 'everloop up' on free ports, and needs at most six minutes on two
cores. Exit status 0: a release was promoted, and held-out answers got better beyond chance. It has a home of its own,
.everloop/demo or what --home names, which it empties before and after (EVERLOOP_HOME is left alone); --keep leaves it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

from everloop.errors import ConfigError

ROOT = Path(__file__).parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _demo().add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if options.config is not None:
        raise ConfigError("the demo writes its own configuration; leave --config out")
    return int(_demo().run(options))


def _demo() -> ModuleType:
    """The demo is an example on the public API, not a part of the platform: it lies beside it in the repository."""
    if not (ROOT / "examples" / "bank_desk").is_dir():
        raise ConfigError(f"the demo is not part of an installed platform: run it in the repository ({ROOT})")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from examples.bank_desk import demo

    return demo
