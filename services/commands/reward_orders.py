"""'everloop reward rollback', 'promote' and 'resume': orders to the reward service; and what is told of them.

They lie in the topic of orders that hold, and say how far the episodes went when they were given, so that a reward
service that is built anew from the log obeys them at the same place.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from everloop.errors import ConfigError
from everloop.run import STANDING, Command, CommandKind, RewardVersion
from everloop.topics import EPISODES, PAUSES

from services.commands.orders import add_policy, add_wait, give
from services.installation import Installation

VERBS = {
    "rollback": CommandKind.REWARD_ROLLBACK,
    "promote": CommandKind.REWARD_PROMOTE,
    "resume": CommandKind.REWARD_RESUME,
}


def add_arguments(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    rollback = verbs.add_parser("rollback", help="score with an earlier version, and keep it until resume")
    rollback.add_argument("--to", metavar="VERSION", help="or its beginning (default: the one that scored before)")
    promote = verbs.add_parser("promote", help="score with a version that was refused, or rolled back")
    promote.add_argument("version", metavar="VERSION", help="or its beginning")
    resume = verbs.add_parser("resume", help="after a rollback: let snapshots that pass take over again")
    for verb in (rollback, promote, resume):
        verb.add_argument("--reason", required=True, help="kept with the order, and with the version")
        add_policy(verb)
        add_wait(verb)


def run(options: argparse.Namespace, here: Installation, tenant: str, policy: str) -> int:
    if not options.reason.strip():
        raise ConfigError("--reason is empty; it is kept for whoever asks later why this version scores")
    from services.rewards import versions

    known = versions(here, tenant, policy)
    version = None
    if options.verb == "rollback":
        version = _before(here, known, tenant, policy, options.to)
    elif options.verb == "promote":
        version = _named(here, known, tenant, policy, options.version)
    elif not pinned(orders_of(here, tenant, policy)):
        raise ConfigError(f"{tenant}/{policy} has no version that is kept by a rollback, so there is nothing to resume")
    ends = here.log.end_offsets(EPISODES.name)
    return give(
        *(options, here, VERBS[options.verb], (tenant, policy), "scorer"),
        version=version,
        reason=options.reason.strip(),
        after={f"{EPISODES.name}/{partition}": end for partition, end in enumerate(ends)},
    )


def _before(here: Installation, known: Sequence[RewardVersion], tenant: str, policy: str, name: str | None) -> str:
    """The version to go back to. Raises ConfigError where it never scored, or scores now."""
    released = [one.version for one in known if one.state == "released"]
    if name is None:
        if len(released) < 2:
            raise ConfigError(f"{tenant}/{policy} has no earlier version that scored: 'everloop reward list' shows all")
        return _named(here, known, tenant, policy, released[-2])
    version = _named(here, known, tenant, policy, name)
    if version not in released:
        raise ConfigError(f"{version} was refused, and why is in 'everloop reward list': 'everloop reward promote' it")
    return version


def _named(here: Installation, known: Sequence[RewardVersion], tenant: str, policy: str, name: str) -> str:
    """The whole name of a version that was announced and is kept. Raises ConfigError or ContractError."""
    from reward.rescore import snapshot_folder

    version = snapshot_folder(here.home, tenant, policy, name).name
    if version not in {one.version for one in known}:
        raise ConfigError(f"{version} was never announced by the reward service; 'everloop reward list' shows what was")
    return version


def orders_of(here: Installation, tenant: str, policy: str) -> list[Command]:
    """The orders about a policy's reward model that the log still has, oldest first."""
    found = [one for one in here.records(PAUSES, Command) if one.key == f"{tenant}/{policy}"]
    return [one for one in found if STANDING.get(one.kind) == "reward"]


def pinned(orders: Sequence[Command]) -> bool:
    return bool(orders) and orders[-1].kind is CommandKind.REWARD_ROLLBACK


def told(orders: Sequence[Command], known: Sequence[RewardVersion]) -> list[str]:
    """What the newest order of a policy holds, or that it is not obeyed yet; nothing where it holds nothing."""
    if not orders:
        return []
    newest = orders[-1]
    what = {
        CommandKind.REWARD_ROLLBACK: f"a rollback to {newest.arguments.get('version')}",
        CommandKind.REWARD_PROMOTE: f"a promotion of {newest.arguments.get('version')}",
        CommandKind.REWARD_RESUME: "a resumption",
    }[newest.kind]
    by = f"by {newest.by or 'a person'}: {newest.arguments.get('reason')}"
    if newest.id not in {one.evidence.get("order") for one in known}:
        return [f"{newest.key}: {what} is ordered {by}; it is not obeyed so far, or could not be"]
    if pinned(orders):
        return [f"{newest.key}: kept {by}. No snapshot takes over until 'everloop reward resume'"]
    return []
