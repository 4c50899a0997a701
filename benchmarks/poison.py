"""How far a few users can move the reward model, with the guards against poison and without them.

banking77's stream, a policy that is right half of the time, 100 customers who come back. 1, 5 or 10% of them push one
wrong topic, praise whatever they get and ask everything ten times, rate by the toss of a coin, or say nothing (see
``_poisoned``). Everything goes through the scorer's handler. ``picked``: how often the version that scores in the end
takes the right one of 77 topics for the best answer to a held-out message; ``told apart``: how often it says rightly
whether an answer is good, of one right and one wrong answer each. Without guards nothing is held or cut to a share, and
a rater is believed as all others are.

``--policy``: the policy too, in the cells of 5% (see ``_poisoned_policy``): the base answers 800 messages, one run of
the trainer learns from them. ``right``: how often the policy then answers a held-out message rightly; ``pushed topic``:
how often it answers the topic that those who push praise.

A cell is kept below ``.everloop/cache/poison``: what was stopped goes on with what is missing. ``--quick``: one seed,
5% alone, fewer messages. Needs EVERLOOP_DATA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _poisoned
from benchmarks._report import Aim, aim, loads, parser, publish
from benchmarks._report import load as load_now
from benchmarks._reward_streams import DataError, Remembering, folder
from examples.bank_desk import data

CELLS = Path(".everloop/cache/poison")
SEEDS, SHARES = (0, 1, 2), (0.05, 0.10, 0.01)  # the share of the aim first
MESSAGES, QUICK_MESSAGES = 1500, 1000
HELD_OUT = 1000  # messages of the report's split
MOST_LOST = 1.0  # points of accuracy, with 5% of poisoners
POLICY_SEEDS = (0,)
POLICY_MESSAGES = 800


class Cell(NamedTuple):
    """``kind``: '' where nobody poisons."""

    kind: str
    share: float
    guards: bool
    seed: int
    messages: int

    @property
    def path(self) -> Path:
        guards = "guarded" if self.guards else "open"
        return CELLS / f"{self.kind or 'clean'}-{100 * self.share:g}-{guards}-{self.seed}-{self.messages}.json"


def policy_cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Of the aim's share alone; what harms most first."""
    for seed in POLICY_SEEDS:
        for kind in ("push", "", *_poisoned.KINDS[1:]):
            for guards in (True, False):
                yield Cell(kind, SHARES[0] if kind else 0.0, guards, seed, POLICY_MESSAGES)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """The aim's share first."""
    messages = QUICK_MESSAGES if options.quick else MESSAGES
    for share in SHARES[:1] if options.quick else SHARES:
        for seed in SEEDS[:1] if options.quick else SEEDS:
            for kind in ("", *_poisoned.KINDS) if share == SHARES[0] else _poisoned.KINDS:
                for guards in (True, False):
                    yield Cell(kind, share if kind else 0.0, guards, seed, messages)


def run(cell: Cell, encoder: Remembering) -> dict[str, Any]:
    """One cell's numbers."""
    began = time.monotonic()
    desk = data.load(None, folder(), cell.seed)
    held_out = desk.report[:HELD_OUT]
    encoder.prepare([one.text for one in (*desk.stream[: cell.messages], *held_out)] + [*desk.topics])
    stream = _poisoned.visits(desk, cell.seed, cell.kind, cell.share, cell.messages)
    with _poisoned.guards(cell.guards):
        made = _poisoned.learned(stream, encoder)
        picked = _poisoned.picks(made.model, desk, held_out)
        apart = _poisoned.told_apart(made.model, desk, held_out, cell.seed)
    poison = made.status["poison"]
    return {
        "picked": sum(a == one.topic for a, one in zip(picked, held_out, strict=True)) / len(picked),
        "apart": apart,
        "pushed": picked.count(_poisoned.pushed_of(desk, cell.seed)) / len(picked),
        "held_poison": made.held[True],
        "held_others": made.held[False],
        "believed_poison": _poisoned.believed(made.model, stream, True),
        "believed_others": _poisoned.believed(made.model, stream, False),
        "quarantined": poison["quarantined"],
        "cut": poison["cut_to_share"],
        "taken_back": poison["taken_back"],
        "labels": made.status["labels"],
        "snapshots_refused": made.status["snapshots_refused"],
        "seconds": time.monotonic() - began,
    }


def kept(cell: Cell, encoder: Remembering) -> dict[str, Any]:
    """The cell's numbers from the disk, or measured and put there."""
    if not cell.path.exists():
        found = run(cell, encoder)
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        cell.path.write_text(json.dumps(found, indent=1) + "\n")
        said = f"{100 * found['picked']:.1f} picked, {100 * found['apart']:.1f} told apart"
        print(f"{cell.path.stem}: {said}, {found['seconds']:.0f} s", flush=True)
    return dict(json.loads(cell.path.read_text()))


def policy_path(cell: Cell) -> Path:
    return cell.path.with_name(f"policy-{cell.path.name}")


def policies(wanted: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    """The cells' numbers about the policy, from the disk, or measured and put there."""
    parts: tuple[Any, Any] | None = None
    found = {}
    for cell in wanted:
        path = policy_path(cell)
        if not path.exists():
            from benchmarks import _poisoned_policy

            parts = parts or _poisoned_policy.parts()
            made = _poisoned_policy.trained(*cell, place=CELLS.parent, parts=parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(made, indent=1) + "\n")
            print(f"{path.stem}: {100 * made['right']:.1f} right, {made['seconds']:.0f} s", flush=True)
        found[cell] = dict(json.loads(path.read_text()))
    return found


def policy_rows(found: dict[Cell, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each way to poison and guards: means over the seeds."""
    rows = []
    for kind, guards in dict.fromkeys((cell.kind, cell.guards) for cell in found):
        its = [one for cell, one in found.items() if (cell.kind, cell.guards) == (kind, guards)]
        row: dict[str, Any] = {"poison": kind or "none", "users": f"{SHARES[0] if kind else 0:.0%}", "guards": guards}
        row |= {"seeds": len(its), "before": _percent(its, "before"), "right": _percent(its, "right")}
        row |= {"pushed topic": _percent(its, "pushed"), "held of poison": _percent(its, "held_poison")}
        rows.append(row)
    return sorted(rows, key=_order)


def rows_of(found: dict[Cell, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each way to poison, share and guards: means over the seeds, losses beside the honest cell."""
    rows = []
    for kind, share, guards in dict.fromkeys((cell.kind, cell.share, cell.guards) for cell in found):
        mine = [cell for cell in found if cell[:3] == (kind, share, guards) and _honest(cell) in found]
        if not mine:
            continue
        honest = [found[_honest(cell)] for cell in mine]
        its = [found[cell] for cell in mine]
        row: dict[str, Any] = {"poison": kind or "none", "users": f"{share:.0%}", "guards": guards, "seeds": len(its)}
        for name, title in (("picked", "picked"), ("apart", "told apart")):
            lost = [100 * (before[name] - after[name]) for before, after in zip(honest, its, strict=True)]
            row |= {title: _percent(its, name), f"{title}, lost": round(statistics.fmean(lost), 2)}
        row["pushed topic picked"] = _percent(its, "pushed")
        row |= {"held of poison": _percent(its, "held_poison"), "held of others": _percent(its, "held_others")}
        row["cut"] = round(statistics.fmean(one["cut"] for one in its))
        trust = statistics.fmean(one["believed_poison"] for one in its)
        row["poisoners believed"] = None if kind in ("", "silent") else round(trust, 2)
        rows.append(row)
    return sorted(rows, key=_order)


def _order(row: dict[str, Any]) -> tuple[bool, str, float, bool]:
    return row["poison"] != "none", row["poison"], float(row["users"][:-1]), not row["guards"]


def _honest(cell: Cell) -> Cell:
    return cell._replace(kind="", share=0.0)


def _percent(its: list[dict[str, Any]], name: str) -> float:
    return round(100 * statistics.fmean(one[name] for one in its), 1)


def aims_of(rows: list[dict[str, Any]]) -> list[Aim]:
    at = [row for row in rows if row["users"] == f"{SHARES[0]:.0%}" and row["guards"] and row["poison"] != "silent"]
    return [
        aim(f"points of '{title}' lost to 5% ({row['poison']})", MOST_LOST, row[f"{title}, lost"], most=True)
        for row in at
        for title in ("picked", "told apart")
    ]


def _options() -> argparse.Namespace:
    made = parser("the reward model under poison")
    made.add_argument("--kept", action="store_true", help="the table of the cells that are kept; nothing is measured")
    made.add_argument(
        "--policy", action="store_true", help="the policy after a run of the trainer, in the cells of 5%%"
    )
    return made.parse_args()


def _policy(options: argparse.Namespace) -> None:
    began, started = load_now(), time.monotonic()
    every = [*policy_cells(options)]
    wanted = [cell for cell in every if policy_path(cell).exists() or not options.kept]
    notes = [f"{time.monotonic() - started:.0f} s for the cells that were not kept; {loads(began)}"]
    notes += [f"{len(every) - len(wanted)} cells are not measured yet"] if len(every) > len(wanted) else []
    publish("poison_policy", policy_rows(policies(wanted)), quick=options.quick, notes=notes)


def main() -> int:
    options, began, started = _options(), load_now(), time.monotonic()
    try:
        if options.policy:
            _policy(options)
            return 0
        encoder = Remembering()
        wanted = [cell for cell in cells(options) if cell.path.exists() or not options.kept]
        found = {cell: kept(cell, encoder) for cell in wanted}
    except (DataError, data.DataError) as error:
        print(error, file=sys.stderr)
        return 2
    rows = rows_of(found)
    notes = [
        "percent; lost: points beside the same guards and seed without poison, whose words are lost as well",
        f"{time.monotonic() - started:.0f} s for the cells that were not kept; {loads(began)}",
    ]
    missing = len([*cells(options)]) - len(wanted)
    notes += [f"{missing} cells are not measured yet: see the column 'seeds'"] if missing else []
    publish("poison", rows, aims_of(rows), quick=options.quick, notes=notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
