"""Start a training run now, whatever its triggers wait for; or repeat an earlier one.

The same batch and seed give the same adapter: 'everloop retrain --batch <id> --seed <n> --no-publish' repeats a run
and leaves the release alone. Batch ids and seeds are in 'everloop sql "select id, batch, seed from runs"'.
"""

from __future__ import annotations

import argparse
import time

from everloop.run import Command, CommandKind, Run, RunState
from everloop.topics import RUNS

from services.commands.orders import add_policy
from services.installation import Installation

ENDED = (RunState.PUBLISHED, RunState.FINISHED, RunState.FAILED)
STARTS = 60.0  # seconds within which a learner that runs has begun, or says what it waits for


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
        command = here.order(
            CommandKind.RETRAIN, tenant, policy, batch=options.batch, seed=options.seed, publish=publish
        )
        if not here.running():
            print(f"Ordered ({command.id}); it starts once the platform runs: everloop up")
            return 1
        return _follow(options, here, command)


def _follow(options: argparse.Namespace, here: Installation, command: Command) -> int:
    """Tell what becomes of the order: the learner's answer, then its run, until it has begun (or ended)."""
    began, shown, start = False, "", time.monotonic()
    while time.monotonic() - start < (options.timeout if options.wait or not began else 0):
        said = ((here.status("learner") or {}).get("commands") or {}).get(command.id)
        if said is not None and not said.get("done", True):
            print(f"Not done: {said.get('says')}")
            return 1
        its = [run for run in here.records(RUNS, Run) if _is_of(run, command)]
        if its:
            newest, began = its[-1], True
            if newest.state.value != shown:
                shown = newest.state.value
                print(f"run {newest.id} is {shown}. {newest.reason or newest.trigger}")
            if newest.state in ENDED:
                return 0 if newest.state is not RunState.FAILED else 1
            if not options.wait:
                return 0
        elif time.monotonic() - start > STARTS and not options.wait:
            print(f"Ordered ({command.id}); it has not begun yet, see everloop status")
            return 0
        time.sleep(0.3)
    print("The time to wait is over; 'everloop status' shows how far it is.")
    return 1


def _is_of(run: Run, command: Command) -> bool:
    """Whether a run came of this order: it says so, or it began after it for the same policy by an order."""
    said = getattr(run, "command", None)
    return run.key == command.key and (said == command.id if said else run.time >= command.time)
