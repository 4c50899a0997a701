"""Held-out questions with right answers, which the gate (or the report) asks every candidate. Never trained on.

add      one question with its answer
import   many, from CSV (columns text, category, and split if there is one) or JSON lines (text or prompt, answer)
list     what there is
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from everloop.errors import ContractError
from everloop.event import Message

from pipelines.gold import Added, GoldItem, GoldSet
from services.commands.orders import add_policy
from services.installation import Installation
from services.tables import table

SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="add|import|list")
    add = verbs.add_parser("add", help="one question with its answer")
    add.add_argument("question")
    add.add_argument("answer")
    add.add_argument("--slice", default="", help="the skill that it belongs to")
    many = verbs.add_parser("import", help="many, from a file")
    many.add_argument("file", type=Path, help=".csv or .jsonl")
    for verb in (add, many):
        verb.add_argument("--split", choices=("gate", "report"), help="without it: half of them each, by content")
        verb.add_argument("--system", help="system message before each question that is plain text")
        add_policy(verb)
    listing = verbs.add_parser("list", help="what there is")
    listing.add_argument("--json", action="store_true", help="every item, one JSON object a line")
    add_policy(listing)


def run(options: argparse.Namespace) -> int:
    with Installation.here() as here:
        tenant, policy = here.policy(options.policy)
        gold = GoldSet(here.home.folder("gold"))
        if options.verb == "list":
            return _list(gold.items(tenant, policy), options)
        if options.verb == "add":
            added = gold.add(tenant, policy, [_item(options)])
        else:
            if not options.file.is_file():
                raise ContractError(f"there is no file {options.file}")
            added = gold.load(tenant, policy, options.file, split=options.split, system=options.system)
        _tell(added, gold, tenant, policy, here.config.policy(tenant, policy).gate.min_gold)
    return 0


def _item(options: argparse.Namespace) -> GoldItem:
    before = () if options.system is None else (Message(role="system", content=options.system),)
    prompt = (*before, Message(role="user", content=options.question))
    try:
        return GoldItem.of(prompt, options.answer, slice=options.slice, split=options.split)
    except ValueError as error:
        raise ContractError(f"not a gold item: {error}") from None


def _tell(added: Added, gold: GoldSet, tenant: str, policy: str, needed: int) -> None:
    counts = Counter(item.split for item in gold.items(tenant, policy))
    known = f", {added.known} were known" if added.known else ""
    print(
        f"{added.new} added{known}; {tenant}/{policy} has {counts['gate']} for the gate, {counts['report']} to report."
    )
    if counts["gate"] < needed:
        print(f"The gate needs {needed} to promote without a person.")


def _list(items: list[GoldItem], options: argparse.Namespace) -> int:
    if options.json:
        for item in items:
            print(json.dumps(item.model_dump(mode="json", exclude_none=True), ensure_ascii=False))
        return 0
    if not items:
        print("No gold items: everloop gold add, or everloop gold import.")
        return 0
    rows = [[item.split, item.slice, item.prompt[-1].text[:60], item.answer[:40]] for item in items[:SHOWN]]
    print(table(["split", "slice", "question", "answer"], rows))
    counts = Counter(item.split for item in items)
    print(f"{len(items)} items: {counts['gate']} gate, {counts['report']} report (--json shows all)")
    return 0
