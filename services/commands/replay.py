"""Handle history again: a handler the log from a time on, or all scores with another version of the reward model.

--handler has one handler (assemble, score or archive) handle everything again that happened at --from or later, once
it is started. Its state stays: what it took before it knows by its id and passes over, and what it writes has the
ids that it had. So it brings what it could not take then, or what was lost since, and changes nothing else. It must
not run meanwhile.

--reward scores history again: what was said and expected then stays as it was. Only episodes that another version
scored last get a new score, so doing it twice changes nothing. What the other said stays in history.scores, and
'everloop explain' shows it beside. Which version scores what comes next stays as it is: see 'everloop reward'.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from datetime import datetime

from everloop.errors import ConfigError
from everloop.section import seconds

from services.commands.orders import add_policy
from services.installation import Installation
from services.installation import options as given
from services.rewind import rewind

NEWEST = "newest"  # which no version is called: those are hexadecimal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--handler", metavar="NAME", help="this handler's records: assemble, score or archive")
    what.add_argument(
        "--reward",
        nargs="?",
        const=NEWEST,
        metavar="VERSION",
        help="scores, by this version of the reward model or its beginning; without one: by the one that scores now",
    )
    parser.add_argument(
        "--from",
        dest="start",
        metavar="TIME",
        help="with --handler: such as 2026-03-01T12:00 (local, or with +00:00), or how long ago, such as 6h",
    )
    add_policy(parser, all_of_them=True)


def run(options: argparse.Namespace) -> int:
    if bool(options.handler) != bool(options.start):
        raise ConfigError("--handler and --from belong together: which handler, and from when on")
    with Installation.here() as here:
        return _rewind(here, options) if options.handler else _rescore(here, options)


def _rewind(here: Installation, options: argparse.Namespace) -> int:
    now = time.time()
    back = rewind(here.log, here.home, options.handler, moment(options.start, now), now)
    for (topic, partition), (before, after) in sorted(back.items()):
        print(f"{topic}/{partition}: {options.handler} goes on at offset {after}, not {before}")
    print("It handles them once it is started." if back else "Nothing that it has handled is of that time or later.")
    return 0


def moment(text: str, now: float) -> float:
    """A point in time, in seconds since 1970, from ISO 8601 or a duration before now. Raises ConfigError."""
    try:
        return now - seconds(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ConfigError(f"--from {text!r} is no time: write 2026-03-01T12:00, or how long ago, such as 6h") from None


def _rescore(here: Installation, options: argparse.Namespace) -> int:
    from pipelines.store import Store
    from reward.rescore import newest_version, rescore, snapshot_folder
    from services.rewards import encoder_of

    for tenant, policy in here.policies(options.policy):
        version = newest_version(here.log, tenant, policy) if options.reward == NEWEST else options.reward
        encoder = encoder_of(here, tenant, policy)
        version = snapshot_folder(here.home, tenant, policy, version).name
        with closing(Store(here.home.root / "store", tenant=tenant, blobs=here.home.blobs)) as store:
            made = rescore(
                *(here.log, here.home, encoder, tenant, policy),
                version=version,
                episodes=store.episodes("tenant = ? AND policy = ?", [tenant, policy]),
                scores=store.scores(tenant, policy),
            )
        print(f"{tenant}/{policy}: {made} scores by reward model {version}{_whereabouts(here, version, made)}")
    return 0


def _whereabouts(here: Installation, version: str, made: int) -> str:
    """Where what was scored lies, and how to see it."""
    if not made:
        return ": everything was scored by it last, so nothing was to do"
    when = "within seconds" if "assembler" in here.running() else "once 'everloop up' runs"
    return (
        f", appended to the log; the store has them {when}. 'everloop explain <episode>{given()}' shows what others "
        f"said beside them; all: everloop sql \"select * from scores where reward_version = '{version}'\"{given()}"
    )
