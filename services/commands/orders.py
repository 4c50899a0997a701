"""What the commands that give orders share: give one, wait for the answer, tell it."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from everloop.run import CommandKind

from services.installation import Installation, options
from services.reach import BrokerAway, meanwhile
from services.starting import up

WAIT = 30.0


def add_policy(parser: argparse.ArgumentParser, *, all_of_them: bool = False) -> None:
    fallback = "all of them" if all_of_them else "the only one"
    parser.add_argument("--policy", metavar="NAME", help=f"'policy' or 'tenant/policy'; without it: {fallback}")


def add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-wait", action="store_true", help="leave the order in the log and do not wait")
    parser.add_argument("--timeout", type=float, default=WAIT, metavar="SECONDS", help=f"to wait (default {WAIT:g})")


def starts(here: Installation) -> str:
    """How the platform is started so that it takes an order that is in the log already."""
    return f"everloop up{options()} (on the same log, {here.config.log.url})"


def not_ordered(here: Installation, what: str, error: BrokerAway) -> str:
    """One line: that nothing is ordered and why, what goes on, and what to do."""
    return (
        f"{what} is NOT ordered: {error}. {meanwhile(here.status('gateway'))}. Give the order again once it answers; "
        "'everloop status' says whether it does"
    )


def give(
    asked: argparse.Namespace,
    here: Installation,
    kind: CommandKind,
    pair: tuple[str, str],
    service: str = "releaser",
    **arguments: Any,
) -> int:
    """Give an order to a service and tell what it answered. 0: done; 1: not done, or nobody answered."""
    name = "/".join(pair)
    try:
        command = here.order(kind, *pair, **arguments)
    except BrokerAway as error:
        print(not_ordered(here, f"{name}: {kind}", error), file=sys.stderr)
        return 1
    if asked.no_wait:
        print(f"{name}: {kind} is ordered ({command.id})")
        return 0
    if not here.running() and up(here) is None:
        print(f"{name}: {kind} is ordered ({command.id}), and done once the platform runs: {starts(here)}")
        return 1
    said = here.answer(service, command, asked.timeout)
    if said is None:
        print(f"{name}: {kind} is ordered ({command.id}); no answer within {asked.timeout:g} s, see everloop status")
        return 1
    print(f"{name}: {said['says']}")
    return 0 if said["done"] else 1
