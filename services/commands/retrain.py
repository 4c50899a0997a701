"""Start a training run now, whatever its triggers wait for; or repeat an earlier one.

Says first how much there is to learn from, and where that is little; the run goes on all the same. Where there is
nothing yet, it orders none, and says what brings something.

The same batch and seed give the same adapter, whatever is live by now: 'everloop retrain --batch <id> --seed <n>
--no-publish' begins from what that batch's earlier run began from, and leaves the release alone. A batch that no run is
known of, and every new one, begins from what is live now. Batch ids and seeds are in
'everloop sql "select id, batch, seed from runs"'.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from everloop.config import PolicyConfig
from everloop.run import Command, CommandKind, Run, RunState
from everloop.topics import RUNS

from services.commands.orders import add_policy, not_ordered, starts
from services.installation import Installation
from services.learner.facts import run_order
from services.learner.pinned import pinned
from services.learner.repeats import earlier
from services.reach import BrokerAway
from services.starting import up
from services.tables import clock, span

ENDED = (RunState.PUBLISHED, RunState.FINISHED, RunState.FAILED)
REMIND = 60.0  # seconds after which it is said again what an order waits for
STARTS = 60.0  # seconds within which a learner that runs has begun, or says what it waits for


class Material(NamedTuple):
    """What a run would learn from: what the store has of a policy, and the gate's questions."""

    episodes: int
    good: int
    bad: int
    gold: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", help="id of a pinned batch; without it: a new one from the newest episodes")
    parser.add_argument("--seed", type=int, help="without it: the configuration's")
    parser.add_argument("--no-publish", action="store_true", help="no candidate comes of it")
    parser.add_argument("--wait", action="store_true", help="until the run has ended")
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="SECONDS", help="to wait at most")
    add_policy(parser)


def run(options: argparse.Namespace) -> int:
    with Installation.here() as here:
        tenant, policy = here.policy(options.policy)
        publish = False if options.no_publish else None
        if options.batch is None:
            told = material(here, tenant, policy)
            if not told.episodes and store_is_here(here):
                print("\n".join(nothing_yet(here, tenant, policy)), file=sys.stderr)
                return 1
            print("\n".join(prospects(f"{tenant}/{policy}", told, here.config.policy(tenant, policy))), flush=True)
        else:
            pinned(here.home, options.batch)
            print(repeating(here, tenant, policy, options.batch, options.seed), flush=True)
        try:
            command = here.order(
                CommandKind.RETRAIN, tenant, policy, batch=options.batch, seed=options.seed, publish=publish
            )
        except BrokerAway as error:
            print(not_ordered(here, f"{tenant}/{policy}: a run", error), file=sys.stderr)
            return 1
        if not here.running() and up(here) is None:
            print(f"Ordered ({command.id}); it starts once the platform runs: {starts(here)}")
            return 1
        print(f"Ordered ({command.id}).", flush=True)
        return _follow(options, here, command)


def repeating(here: Installation, tenant: str, policy: str, batch: str, seed: int | None) -> str:
    """What a run of a pinned batch will begin from, in words. Raises NotEnoughData where part of that is gone."""
    configured = here.config.policy(tenant, policy).train.seed
    found = earlier(here.home, tenant, policy, batch, configured if seed is None else seed)
    if found is None:
        return f"No earlier run of batch {batch} is known here: this one begins from what is live now."
    return f"Repeats run {found.run.id} (seed {found.run.seed}) from where it began: {found.run.parent}."


def material(here: Installation, tenant: str, policy: str) -> Material:
    """As of now; the store follows the log by a second or two."""
    from pipelines.gold import GoldSet
    from pipelines.store import Store

    store = Store(here.home.root / "store", tenant=tenant, blobs=here.home.blobs)
    query = """
        select count(distinct episode) episodes, count(*) filter (label >= 0.5) good, count(*) filter (label < 0.5) bad
        from scores where policy = ?
    """
    try:
        (row,) = store.rows(query, [policy])
    finally:
        store.close()
    return Material(**row, gold=len(GoldSet(here.home.root / "gold").items(tenant, policy, "gate")))


def store_is_here(here: Installation) -> bool:
    """Whether what :func:`material` counts is all there is: on Kafka the store may lie on another machine."""
    return not here.config.log.url.startswith("kafka://") or "learner" in here.running()


def nothing_yet(here: Installation, tenant: str, policy: str) -> Iterator[str]:
    """That no run is ordered, and what brings something to learn from."""
    train, gateway = here.config.policy(tenant, policy).train, here.running().get("gateway")
    where = f"at {gateway.url}/v1" if gateway else "which 'everloop up' starts"
    cadence = f", or every {train.every} where there are fewer (train.every)" if train.every else ""
    yield f"{tenant}/{policy} has no scored episodes yet: nothing to learn from, and no run is ordered. Next:"
    yield f"  send requests for the model {policy!r} through the gateway, {where}"
    yield "  give feedback on the answers (POST /v1/feedback, or the SDK): thumbs and corrections are learned from"
    yield f"  a run starts by itself at {train.min_scored} scored episodes (train.min_scored){cadence}"
    yield "  'everloop status' shows how many there are, and what the next run waits for"


def prospects(name: str, told: Material, config: PolicyConfig) -> Iterator[str]:
    """What there is to learn from, and a line for each part of it that is little."""
    from reward.model import FEWEST_OF_A_KIND, MIN_LABELS

    labels, gold = told.good + told.bad, config.gate.min_gold
    yield (
        f"{name} has {told.episodes} scored episodes with {labels} labels ({told.good} good, {told.bad} bad), and "
        f"{told.gold} gold items for the gate."
    )
    if told.episodes < config.train.min_scored:
        yield f"  few episodes: by itself a run starts at {config.train.min_scored} (train.min_scored)"
    if labels < MIN_LABELS or min(told.good, told.bad) < FEWEST_OF_A_KIND:
        yield (
            f"  few labels: below {MIN_LABELS}, {FEWEST_OF_A_KIND} of either kind, the reward model has no opinion, so "
            "that the run learns from these alone"
        )
    if told.gold < gold:
        yield (
            f"  few gold items: below {gold} (gate.min_gold) nobody can tell whether the adapter is better, and a "
            "person promotes it on their word ('everloop gold import' adds some)"
        )


def _follow(options: argparse.Namespace, here: Installation, command: Command) -> int:
    """Tell what becomes of the order: what it waits for, the learner's answer, then its run, until begun (or ended)."""
    began, shown, start, told = False, "", time.monotonic(), 0.0
    while time.monotonic() - start < (options.timeout if options.wait or not began else 0):
        status = here.status("learner") or {}
        said = (status.get("commands") or {}).get(command.id)
        if said is not None and not said.get("done", True):
            print(f"Not done: {said.get('says')}")
            return 1
        its = [run for run in here.records(RUNS, Run) if _is_of(run, command)]
        if its:
            newest, began = its[-1], True
            if newest.state.value != shown:
                shown = newest.state.value
                print(f"run {newest.id} is {shown}. {newest.reason or newest.trigger}", flush=True)
            if newest.state in ENDED:
                return 0 if newest.state is not RunState.FAILED else 1
            if not options.wait:
                return 0
        else:
            waits = held_up(status, command.key)
            waited = time.monotonic() - start
            if waits and (waits != shown or waited - told > REMIND):
                print(f"It waits for {waits}" + (f" ({span(waited)} by now)" if waits == shown else ""), flush=True)
                shown, told = waits, waited
            if time.monotonic() - start > STARTS and not options.wait:
                print("It has not begun yet, see everloop status")
                return 0
        time.sleep(0.3)
    print("The time to wait is over; 'everloop status' shows how far it is.")
    return 1


def held_up(status: dict[str, Any], key: str) -> str:
    """What an order waits for, by the learner's own words: a run under way of any policy, or a pause."""
    policies: dict[str, Any] = status.get("policies") or {}
    if not policies:
        return "the learner, which does not answer yet"
    under_way = [(name, its["running"]) for name, its in policies.items() if its.get("running")]
    if under_way:
        name, current = under_way[0]
        since = f" (under way since {clock(current['since'])})" if "since" in current else ""
        return f"run {current['run']} of {name} to end{since}: one trains at a time"
    return "everloop resume: the policy is paused" if (policies.get(key) or {}).get("paused") else ""


def _is_of(run: Run, command: Command) -> bool:
    """Whether a run came of this order. A trigger's run, which has none, may well end after it was given."""
    return run.key == command.key and run_order(run) == command.id
