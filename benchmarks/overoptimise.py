"""What becomes of a policy that pleases the reward model alone, and where training would have been stopped.

banking77: 1,000 messages answered by the base, 60% rated, a quarter of the thumbs flipped. From them alone the reward
model learns; then nobody says anything any more, and PPO goes on against it, run after run, each on the newest 500
prompts, without replay, corrections, outcomes or a KL term. After each run ``proxy`` is what the reward model thinks of
the greedy answers to the report's messages (mean reward, -1 to 1) and ``gold`` the share of them that is right. The
guard (:mod:`pipelines.overoptimise`) sees what the learner and the gate tell it: what the run gained by the reward
model's word on 100 of its own prompts, and on gold over 100 items of the gate's split, others in each run. With guards
training ends where it says so; until then both lines are one. That a gate would have refused candidates is left out.

A run is kept below ``.everloop/cache/overoptimise``. ``--quick``: one seed, four runs. Needs EVERLOOP_DATA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._report import aim, loads, parser, publish
from benchmarks._report import load as load_now
from benchmarks._reward_streams import DataError, folder
from examples.bank_desk import data
from pipelines.overoptimise import Window, parted, verdict

CACHE = Path(".everloop/cache")
CELLS = CACHE / "overoptimise"
PLOT = Path("docs/overoptimise.png")
SEEDS = (0, 1, 2)
RUNS, QUICK_RUNS = 8, 4
RATED, NEW = 1000, 250  # messages that are rated; that come with each run, unrated
FLIPPED = 0.25
ITEMS = 100  # of the gate's split that a run's candidate is examined on
RECIPE = {
    "name": "reward-alone",
    "rollouts": {"prompts": 500, "samples": 4},
    "ppo": {"coefficient": 1.0, "logged": False},
    "replay": {"coefficient": 0.0},
    "kl": {"coefficient": 0.0},
    "optimizer": {"learning_rate": 4e-3, "epochs": 5, "steps": 40},
}


def run_seed(seed: int, runs: int, threads: int) -> list[dict[str, Any]]:
    """One point before training and one after each run."""
    import torch

    from benchmarks._desk_loop import DeskLoop
    from examples.bank_desk.customer import Customer
    from reward.encoder import Encoder
    from trainer import recipe
    from trainer.learner import Learner

    torch.set_num_threads(threads)
    desk = data.load(None, folder(), seed=seed)
    encoder, learner = Encoder(remember=200_000), Learner()
    learner.share(encoder)
    with tempfile.TemporaryDirectory(prefix="everloop-overoptimise-") as place:
        made = recipe.parse(RECIPE, "of this benchmark")
        options = {"learner": learner, "encoder": encoder, "seed": seed, "threads": threads, "window": RATED}
        loop = DeskLoop(desk, Path(place), CACHE.absolute(), made, **options)
        loop.customer = Customer(seed, flipped=FLIPPED, corrected=0.0)
        loop.serve(desk.stream[:RATED])
        loop.customer = Customer(seed, thumbs=0.0, corrected=0.0)
        points = [_point(loop, 0, None)]
        _say(seed, points[-1])
        for number in range(1, runs + 1):
            points.append(_trained(loop, number))
            _say(seed, points[-1])
    return points


def kept(seed: int, runs: int, threads: int) -> list[dict[str, Any]]:
    """The points of a seed, from the disk where as many runs are there."""
    path = CELLS / f"{seed}.json"
    points: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    if len(points) <= runs:
        points = run_seed(seed, runs, threads)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(points, indent=1) + "\n")
    return points[: runs + 1]


def _trained(loop: Any, number: int) -> dict[str, Any]:
    """Serve, train on the reward model's word, and examine the candidate as the gate would."""
    start = RATED + (number - 1) * NEW
    loop.serve(loop.desk.stream[start : start + NEW])
    items = loop.desk.gate[(number - 1) * ITEMS : number * ITEMS]
    before = loop.accuracy(items)
    told = loop.retrain().metrics
    window = Window(
        f"run {number}", told["proxy_after"] - told["proxy_before"], loop.accuracy(items) - before, ITEMS, float(number)
    )
    return _point(loop, number, window)


def _point(loop: Any, number: int, window: Window | None) -> dict[str, Any]:
    from reward.features import Example

    messages = loop.desk.report
    answers = loop.greedy(messages)
    judged = loop.reward.estimate([Example(m.text, a) for m, a in zip(messages, answers, strict=True)])
    return {
        "steps": number * RECIPE["optimizer"]["steps"],  # type: ignore[index]
        "proxy": float(np.mean([one.reward for one in judged])),
        "gold": float(np.mean([a == m.topic for a, m in zip(answers, messages, strict=True)])),
        "answers": len(set(answers)),
        "window": None if window is None else list(window),
    }


def _say(seed: int, point: dict[str, Any]) -> None:
    said = f"seed {seed}, {point['steps']} steps: {point['proxy']:+.2f}, {point['gold']:.1%} right"
    if point["window"] is not None:
        _, proxy, gold, *_ = point["window"]
        said += f"; the guard saw {proxy:+.2f} and {100 * gold:+.0f} points"
    print(said, flush=True)


def frozen_at(points: Sequence[dict[str, Any]]) -> int | None:
    """The index of the point after which training is stopped; None: it never is."""
    windows = [Window(*point["window"]) for point in points[1:]]
    return next((at for at in range(1, len(points)) if verdict(windows[:at])), None)


def rows_of(found: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """By seed: gold at the start, its best, its last without guards, and where the guard left it."""
    rows = []
    for seed, points in found.items():
        gold, at = [100 * point["gold"] for point in points], frozen_at(points)
        rows.append(
            {
                "seed": seed,
                "steps": points[-1]["steps"],
                "proxy at first": round(points[0]["proxy"], 2),
                "proxy at last": round(points[-1]["proxy"], 2),
                "gold at first": round(gold[0], 1),
                "gold at best": round(max(gold), 1),
                "best at": points[int(np.argmax(gold))]["steps"],
                "gold without guards": round(gold[-1], 1),
                "parted windows": sum(parted(Window(*point["window"])) for point in points[1:]),
                "frozen at": None if at is None else points[at]["steps"],
                "gold with guards": round(gold[-1 if at is None else at], 1),
            }
        )
    return rows


def plot(found: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """Proxy and gold over steps, a line for each seed; dots where the guard stops training."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    other = axes.twinx()
    for points in found.values():
        steps, at = [point["steps"] for point in points], frozen_at(points)
        for its, name, colour in ((axes, "proxy", "tab:orange"), (other, "gold", "tab:blue")):
            values = [point[name] for point in points]
            its.plot(steps, values, color=colour, linewidth=1.2)
            if at is not None:
                its.plot(steps[at], values[at], "o", color=colour, markersize=4)
    axes.set(xlabel="optimizer steps", ylabel="proxy: mean reward")
    axes.yaxis.label.set_color("tab:orange")
    other.set(ylabel="gold: share of right answers")
    other.yaxis.label.set_color("tab:blue")
    figure.savefig(path, dpi=90, metadata={"Software": None})


def _options() -> argparse.Namespace:
    made = parser("PPO against the reward model alone")
    made.add_argument("--seed", type=int, action="append", help="this one; several times; default: 0, 1, 2; quick 0")
    made.add_argument("--kept", action="store_true", help="the table of the seeds that are kept; nothing is measured")
    made.add_argument("--threads", type=int, default=1)
    return made.parse_args()


def main() -> int:
    options, began, started = _options(), load_now(), time.monotonic()
    runs = QUICK_RUNS if options.quick else RUNS
    found = {}
    try:
        for seed in options.seed or (SEEDS[:1] if options.quick else SEEDS):
            if (CELLS / f"{seed}.json").exists() or not options.kept:
                found[seed] = kept(seed, runs, options.threads)
    except (DataError, data.DataError) as error:
        print(error, file=sys.stderr)
        return 2
    rows = rows_of(found)
    late = [row["gold at best"] - row["gold with guards"] for row in rows]
    lost = [row["gold at best"] - row["gold without guards"] for row in rows]
    aims = [aim("gold points lost since the best, with guards", 2.0, round(statistics.fmean(late), 1), most=True)]
    notes = [
        f"without guards {statistics.fmean(lost):.1f} points are lost since the best, on the mean",
        f"{time.monotonic() - started:.0f} s for what was not kept; {loads(began)}",
    ]
    publish("overoptimise", rows, aims, quick=options.quick, part=options.seed is not None, notes=notes)
    if not (options.quick or options.seed):
        plot(found, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
