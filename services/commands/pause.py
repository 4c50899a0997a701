"""Start no new training runs and no new canaries; serving, capture and a running canary go on."""

from __future__ import annotations

import argparse

from everloop.run import CommandKind

from services.commands.orders import add_policy, add_wait, give
from services.installation import Installation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_policy(parser, all_of_them=True)
    add_wait(parser)


def run(options: argparse.Namespace) -> int:
    with Installation.here() as here:
        pairs = here.policies(options.policy)
        return max(give(options, here, CommandKind.PAUSE, pair) for pair in pairs)
