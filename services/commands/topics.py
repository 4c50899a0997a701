"""The log's topics and grants on Kafka: what differs from what is declared, and making it so.

'check' prints the plan and changes nothing; exit status 1 where something differs. 'apply' prints it and carries it
out; exit status 1 where something is left that only a person can do. Grants are made where the cluster keeps any.

With --add-partitions topics that exist get as many partitions as log.partitions says. Keys move to other partitions
then, and what handlers know of them moves with them; so workers and gateways must be down, and nothing may wait: else
nothing is changed, and what is in the way is said.
"""

from __future__ import annotations

import argparse

from everloop.config import Config, load
from everloop.errors import ConfigError
from everloop.log import belongs, open_log
from everloop.log.kafka.log import KafkaLog
from everloop.log.kafka.plan import Plan, carry_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="check|apply")
    check = verbs.add_parser("check", help="print what differs; change nothing")
    apply = verbs.add_parser("apply", help="print what differs, and make it as declared")
    for verb in (check, apply):
        verb.add_argument(
            "--add-partitions", action="store_true", help="also to topics that exist: while nothing else runs"
        )


def run(options: argparse.Namespace) -> int:
    log = _opened(belongs.of_its_home(load()))
    try:
        plan = log.plan(add_partitions=options.add_partitions)
        _show(plan)
        if options.verb == "check":
            return int(bool(plan.changes))
        if options.add_partitions:
            _grow(log)
            carry_out(log.plan(add_partitions=True).changes)
        else:
            carry_out(plan.changes)
        left = [change for change in plan.changes if change.make is None]
        print(f"{len(plan.changes) - len(left)} changes made." if plan.changes else "Nothing to do.")
        return int(bool(left))
    finally:
        log.close()


def _opened(config: Config) -> KafkaLog:
    """Raises ConfigError where the log is embedded, and does not open that: it would be made."""
    log = open_log(config) if config.log.url.startswith("kafka://") else None
    if not isinstance(log, KafkaLog):
        raise ConfigError(
            f"log.url is {config.log.url!r}, the embedded log, whose topics need no care: for a cluster's, give --log "
            "kafka://<host>:9092"
        )
    return log


def _grow(log: KafkaLog) -> None:
    """Topics of handlers first: their states go with them."""
    from services.moving import grow

    for its in grow(log):
        print(f"{its.topic} has {its.partitions} partitions; {its.entries} entries of {its.handler}'s state moved.")
        if its.late:
            print(f"{its.late} records came to it meanwhile: the episodes they are of may be in two pieces.")


def _show(plan: Plan) -> None:
    for note in plan.notes:
        print(f"Note: {note}.")
    for change in plan.changes:
        print(f"{'+' if change.make else '!'} {change.what}")
    if not plan.changes:
        print("Everything is as declared.")
