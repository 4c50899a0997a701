"""How much is learned on banking77 from thumbs and few corrections, and what each part of the trainer adds.

The messages of the stream (all that the training part has beside the prior's, about 9,600) are answered in cycles
of 1,000; 60% of answers get a thumb, 5% of them flipped, and 5% of the wrong answers are corrected. After each
cycle a training run; then greedy answers to the held-out half that nothing else reads. Each (arm, seed) is a cell,
kept in ``benchmarks/results/learning/``: a benchmark that was stopped goes on with the cells that are missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _report

CELLS = _report.RESULTS / "learning"
CACHE = Path(".everloop/cache")
CYCLE, QUICK_MESSAGES = 1000, 3000
MAIN = "main"


class Arm(NamedTuple):
    """``taught``: customers say the right topic of every message, in place of thumbs."""

    recipe: str
    words: str
    seeds: int = 1
    taught: bool = False


ARMS = {
    MAIN: Arm("ppo-replay", "PPO, reward model and replay", seeds=3),
    "ppo": Arm("ppo", "plain PPO on thumbs, without reward model"),
    "replay": Arm("replay", "replay alone, judged by the reward model"),
    "words": Arm("replay-words", "replay of people's words alone, without reward model"),
    "shuffled": Arm("ppo-shuffled", "PPO with shuffled scores"),
    "ceiling": Arm("replay-words", "supervised on every gold label", taught=True),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    made = _report.parser("learning from use on banking77")
    made.add_argument("--cell", action="append", help="arm:seed, such as main:0; several times; default: all")
    made.add_argument("--again", action="store_true", help="run cells that are kept, too")
    made.add_argument("--threads", type=int, default=1)
    return made.parse_args(arguments)


def cells(options: argparse.Namespace) -> list[tuple[str, int]]:
    """(arm, seed) in the order in which they are run: one seed of each first."""
    if options.cell:
        return [(arm, int(seed)) for arm, _, seed in (cell.partition(":") for cell in options.cell)]
    if options.quick:
        return [(MAIN, 0), ("ppo", 0)]
    wanted = [(arm, seed) for arm, its in ARMS.items() for seed in range(its.seeds)]
    return sorted(wanted, key=lambda cell: cell[1])


def run_cell(arm: str, seed: int, messages: int, threads: int) -> dict[str, Any]:
    """One line of the table: accuracy after every cycle."""
    import torch

    from benchmarks._desk_loop import DeskLoop
    from examples.bank_desk import data
    from examples.bank_desk.customer import Customer
    from reward.encoder import Encoder
    from trainer import recipe
    from trainer.learner import Learner

    torch.set_num_threads(threads)
    desk = data.load(None, CACHE, seed=seed)
    _require_banking77(desk.name)
    encoder, learner = Encoder(remember=200_000), Learner()
    learner.share(encoder)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="everloop-learning-") as folder:
        loop = DeskLoop(
            desk,
            Path(folder),
            CACHE.absolute(),
            recipe.load(ARMS[arm].recipe),
            learner=learner,
            encoder=encoder,
            seed=seed,
            threads=threads,
            window=messages,
        )
        if ARMS[arm].taught:
            loop.customer = Customer(seed, thumbs=1.0, flipped=0.0, corrected=1.0)
        before = loop.accuracy(desk.report)
        _say(arm, seed, 0, before, started)
        cycles = []
        for start in range(0, min(messages, len(desk.stream)), CYCLE):
            cycle = loop.cycle(desk.stream[start : start + CYCLE])
            cycles.append(asdict(cycle))
            _say(arm, seed, cycle.messages, cycle.accuracy, started)
    return {
        "arm": arm,
        "seed": seed,
        "recipe": ARMS[arm].recipe,
        "data": desk.name,
        "held_out": len(desk.report),
        "before": before,
        "cycles": cycles,
        "seconds": time.monotonic() - started,
        "machine": _report.machine(),
    }


def _require_banking77(name: str) -> None:
    if not name.startswith("banking77"):
        print("This benchmark needs banking77: set EVERLOOP_DATA to the folder that holds banking77/train.csv")
        sys.exit(2)


def _say(arm: str, seed: int, messages: int, accuracy: float, started: float) -> None:
    print(f"{arm}:{seed}  {messages:>6,} messages  {accuracy:.3f}  {time.monotonic() - started:.0f} s", flush=True)


def kept(arm: str, seed: int, messages: int) -> Path:
    return CELLS / f"{arm}-{seed}-{messages}.json"


def rows(found: dict[tuple[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: one row an arm, mean over its seeds."""
    table = []
    for arm, its in ARMS.items():
        of_arm = [cell for (name, _), cell in sorted(found.items()) if name == arm]
        if not of_arm:
            continue
        final = [cell["cycles"][-1]["accuracy"] for cell in of_arm]
        row: dict[str, Any] = {"arm": its.words, "seeds": len(of_arm), "0": _mean(cell["before"] for cell in of_arm)}
        for at in (2, 4, 6, 9):
            reached = [cell["cycles"][at] for cell in of_arm if at < len(cell["cycles"])]
            if reached:
                row[f"{1000 * (at + 1):,}"] = _mean(cycle["accuracy"] for cycle in reached)
        row["spread"] = max(final) - min(final) if len(final) > 1 else None
        row["s a run"] = _mean(cycle["seconds"] for cell in of_arm for cycle in cell["cycles"])
        table.append(row)
    return table


def _mean(values: Any) -> float:
    return round(statistics.fmean(values), 4)


def notes(found: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """What PPO and the reward model add, beside the spread of the seeds."""
    main = [cell["cycles"][-1]["accuracy"] for (arm, _), cell in found.items() if arm == MAIN]
    if len(main) < 2:
        return ["the spread of the seeds is not known from one seed"]
    spread = max(main) - min(main)
    said = [f"spread of the main line over {len(main)} seeds: {100 * spread:.1f} points"]
    for arm, part in (("replay", "PPO"), ("words", "the reward model with PPO")):
        cell = found.get((arm, 0))
        if cell is not None:
            added = statistics.fmean(main) - cell["cycles"][-1]["accuracy"]
            verdict = "more" if added > spread else "no more"
            said.append(f"{part} adds {100 * added:+.1f} points, {verdict} than the spread of the seeds")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    messages = QUICK_MESSAGES if options.quick else 10_000
    found = {}
    for arm, seed in cells(options):
        path = kept(arm, seed, messages)
        if options.again or not path.exists():
            cell = run_cell(arm, seed, messages, options.threads)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(cell, indent=1) + "\n")
        found[arm, seed] = json.loads(path.read_text())
    reached = [cell["cycles"][-1]["accuracy"] for (arm, _), cell in found.items() if arm == MAIN]
    aims = [_report.aim("held-out exact match of the main line", 0.65, statistics.fmean(reached))] if reached else []
    part = bool(options.cell)
    _report.publish("learning", rows(found), aims, quick=options.quick, part=part, notes=notes(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
