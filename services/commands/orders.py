"""What the commands that give orders share: give one, wait for the answer, tell it."""

from __future__ import annotations

import argparse
from typing import Any

from everloop.run import CommandKind

from services.installation import Installation

WAIT = 30.0


def add_policy(parser: argparse.ArgumentParser, *, all_of_them: bool = False) -> None:
    fallback = "all of them" if all_of_them else "the only one"
    parser.add_argument("--policy", metavar="NAME", help=f"'policy' or 'tenant/policy'; without it: {fallback}")


def add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-wait", action="store_true", help="leave the order in the log and do not wait")
    parser.add_argument("--timeout", type=float, default=WAIT, metavar="SECONDS", help=f"to wait (default {WAIT:g})")


def give(
    options: argparse.Namespace, here: Installation, kind: CommandKind, pair: tuple[str, str], **arguments: Any
) -> int:
    """Give an order to the releaser and tell what it answered. 0: done; 1: not done, or nobody answered."""
    command = here.order(kind, *pair, **arguments)
    name = "/".join(pair)
    if options.no_wait:
        print(f"{name}: {kind} is ordered ({command.id})")
        return 0
    if not here.running():
        print(f"{name}: {kind} is ordered ({command.id}), and done once the platform runs: everloop up")
        return 1
    said = here.answer("releaser", command, options.timeout)
    if said is None:
        print(f"{name}: {kind} is ordered ({command.id}); no answer within {options.timeout:g} s, see everloop status")
        return 1
    print(f"{name}: {said['says']}")
    return 0 if said["done"] else 1
