"""Score history again with another version of the reward model: what was said and expected then stays as it was.

Only episodes that another version scored last get a new score, so doing it twice changes nothing.
"""

from __future__ import annotations

import argparse

from services.commands.orders import add_policy
from services.installation import Installation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scores", action="store_true", required=True, help="what is replayed: scores")
    parser.add_argument("--reward", metavar="VERSION", help="of the reward model, or its beginning; else the newest")
    add_policy(parser, all_of_them=True)


def run(options: argparse.Namespace) -> int:
    from reward.encoder import Encoder
    from reward.rescore import newest_version, rescore

    with Installation.here() as here:
        for tenant, policy in here.policies(options.policy):
            version = options.reward or newest_version(here.log, tenant, policy)
            encoder = Encoder(here.config.policy(tenant, policy).reward.encoder)
            made = rescore(here.log, here.home, encoder, tenant, policy, version=version)
            print(f"{tenant}/{policy}: {made} scores by reward model {version}")
    return 0
