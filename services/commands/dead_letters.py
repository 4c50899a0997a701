"""List the records that a handler could not take, with their cause; replay them once what was wrong is mended.

A replay appends the original record again: every handler of its topic sees it once more, and knows it by its id.
"""

from __future__ import annotations

import argparse
import json
import time

from everloop.run import DeadLetter

from services.dead_letters import dead_letters, replay
from services.installation import Installation
from services.tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list|replay")
    listing = verbs.add_parser("list", help="what could not be taken, and why")
    listing.add_argument("--json", action="store_true", help="one JSON object a line, with the traceback")
    again = verbs.add_parser("replay", help="append the original records again")
    again.add_argument("ids", nargs="*", help="of dead letters; without any: all that were not replayed yet")
    again.add_argument("--again", action="store_true", help="also those that were replayed before")
    for verb in (listing, again):
        verb.add_argument("--handler", help="of this handler alone: assemble, archive, score, …")


def run(options: argparse.Namespace) -> int:
    with Installation.here() as here:
        if options.verb == "list":
            return _list(dead_letters(here.log, here.home.blobs, handler=options.handler), options)
        done = replay(
            here.log,
            here.home.blobs,
            time.time(),
            ids=options.ids or None,
            handler=options.handler,
            again=options.again,
        )
        print(f"{len(done)} records are in the log again." if done else "Nothing to replay.")
        return 0


def _list(letters: list[DeadLetter], options: argparse.Namespace) -> int:
    if options.json:
        for letter in letters:
            print(json.dumps(letter.model_dump(mode="json", exclude={"value"})))
        return 0
    rows = [
        [
            letter.id,
            letter.handler,
            f"{letter.topic}/{letter.partition}@{letter.offset}",
            time.strftime("%m-%d %H:%M", time.localtime(letter.time)),
            "replayed" if letter.replayed else "",
            letter.cause,
        ]
        for letter in letters
    ]
    print(table(["id", "handler", "record", "time", "", "cause"], rows) if rows else "No dead letters.")
    return 0
