"""Undo a pause: runs and canaries start again as configured."""

from __future__ import annotations

import argparse

from everloop.run import CommandKind

from services.commands.orders import add_policy, add_wait, give
from services.installation import Installation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_policy(parser, all_of_them=True)
    parser.add_argument("--reason", metavar="TEXT", help="why runs may start again; kept in the log")
    add_wait(parser)


def run(options: argparse.Namespace) -> int:
    with Installation.here() as here:
        pairs = here.policies(options.policy)
        return max(give(options, here, CommandKind.RESUME, pair, reason=options.reason) for pair in pairs)
