"""What becomes of a policy that pleases the reward model alone, and where training would have been stopped.

banking77: 1,000 messages answered by the base, 60% rated, a quarter of the thumbs flipped. From them alone the reward
model learns; then nobody says anything any more, and PPO goes on against it, run after run, each on the newest 500
prompts, without replay, corrections, outcomes or a KL term. After each run ``proxy`` is what the reward model thinks of
the greedy answers of what is served to the report's messages (mean reward, -1 to 1) and ``gold`` the share of them that
is right. The pause (:mod:`pipelines.overoptimise`) sees what the learner and the gate tell it: what the run gained by
the reward model's word on 100 of its own prompts, and on gold over 100 items of the gate's split, others in each run.

Two arms are run. ``off``: whatever a run makes is served, and the next run goes on from it; where the pause would have
ended that is the line "pause alone". ``on``: what the product does. The gate as it is shipped examines each candidate
on these 100 items; what it does not pass is never served, the next run begins where the refused one began, and the
pause ends training. (A canary would come after the gate; nobody rates here, so it is left out.) Of each candidate of
this arm ``by chance`` says in how many of a thousand draws of 100 of the report's messages the gate's rule about gold
would have let it through.

A seed of an arm is kept below ``.everloop/cache/overoptimise``. ``--quick``: one seed, four runs. Needs EVERLOOP_DATA.
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
from everloop.config import GateConfig

from benchmarks._report import aim, loads, parser, publish
from benchmarks._report import load as load_now
from benchmarks._reward_streams import DataError, folder
from examples.bank_desk import data
from pipelines import gate
from pipelines.overoptimise import Window, parted, verdict

CACHE = Path(".everloop/cache")
CELLS = CACHE / "overoptimise"
PLOT = Path("docs/overoptimise.png")
SEEDS = (0, 1, 2)
ARMS = ("off", "on")
RUNS, QUICK_RUNS = 8, 4
RATED, NEW = 1000, 250  # messages that are rated; that come with each run, unrated
FLIPPED = 0.25
ITEMS = 100  # of the gate's split that a run's candidate is examined on
DRAWS = 1000  # of as many of the report's messages
RECIPE = {
    "name": "reward-alone",
    "rollouts": {"prompts": 500, "samples": 4},
    "ppo": {"coefficient": 1.0, "logged": False},
    "replay": {"coefficient": 0.0},
    "kl": {"coefficient": 0.0},
    "optimizer": {"learning_rate": 4e-3, "epochs": 5, "steps": 40},
}


def run_seed(arm: str, seed: int, runs: int, threads: int) -> list[dict[str, Any]]:
    """One point before training and one after each run; with guards none after the pause."""
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
        served = _Served(loop)
        points = [{**_point(served, 0), "window": None}]
        _say(arm, seed, points[-1])
        while len(points) <= runs and not (arm == "on" and frozen_at(points) is not None):
            points.append(_trained(served, len(points), arm == "on"))
            _say(arm, seed, points[-1])
    return points


def path_of(arm: str, seed: int) -> Path:
    return CELLS / f"{arm}-{seed}.json"


def kept(arm: str, seed: int, runs: int, threads: int) -> list[dict[str, Any]]:
    """The points of an arm's seed, from the disk where as many runs are there, or the pause."""
    path = path_of(arm, seed)
    points: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    if len(points) <= runs and not (arm == "on" and frozen_at(points) is not None):
        points = run_seed(arm, seed, runs, threads)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(points, indent=1) + "\n")
    return points[: runs + 1]


class _Served:
    """A loop, and what each of its adapters answers to the report's messages."""

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self._answers: dict[Path | None, list[str]] = {}

    def answers(self) -> list[str]:
        adapter = self.loop.adapter
        if adapter not in self._answers:
            self._answers[adapter] = self.loop.greedy(self.loop.desk.report)
        return self._answers[adapter]

    def right(self) -> Any:
        """(messages,) of 0 and 1."""
        return np.array([a == m.topic for a, m in zip(self.answers(), self.loop.desk.report, strict=True)], float)


def _trained(served: _Served, number: int, guarded: bool) -> dict[str, Any]:
    """Serve, train on the reward model's word, and examine the candidate; with guards, go back where it fails."""
    loop = served.loop
    start = RATED + (number - 1) * NEW
    loop.serve(loop.desk.stream[start : start + NEW])
    items = loop.desk.gate[(number - 1) * ITEMS : number * ITEMS]
    incumbent, before, right = loop.incumbent, _asked(loop, items), served.right()
    told = loop.retrain().metrics
    decision = _decided(items, before, _asked(loop, items))
    gained = next(check.numbers["gain"] for check in decision.checks if check.name == "gold")
    window = Window(f"run {number}", told["proxy_after"] - told["proxy_before"], gained, ITEMS, float(number))
    seen = {"window": list(window), "gate": decision.verdict, "says": decision.reason}
    seen |= {"candidate": float(served.right().mean()), "by chance": _by_chance(served.right() - right)}
    if guarded and decision.verdict != "pass":
        loop.go_back(incumbent)
    return {**_point(served, number), **seen}


def _asked(loop: Any, items: Sequence[data.Message]) -> list[gate.Given]:
    """What is served answers to gold items, and how far it is from the base."""
    from trainer.policy.divergence import kl_to_base

    asked = loop.likeliest(items)
    apart: list[float | None] = [None] * len(asked)
    if loop.adapter is not None:
        apart = [*kl_to_base(loop.policy, loop.adapter, [(prompt, one.completion) for prompt, one in asked])]
    return [
        gate.Given(loop.policy.decode(one.completion), len(one.completion), one.finished, kl)
        for (_, one), kl in zip(asked, apart, strict=True)
    ]


def _decided(items: Sequence[data.Message], before: Sequence[gate.Given], after: Sequence[gate.Given]) -> gate.Decision:
    """The gate's, as it is shipped."""
    right = [item.topic for item in items]
    evidence = gate.Evidence(tuple(right), gate.judge_answers(right, before), gate.judge_answers(right, after))
    return gate.decide(evidence, GateConfig())


def _by_chance(gains: Any) -> float:
    """Over which share of draws from all gains (messages,) the gate's rule about gold would let a candidate pass."""
    config, dice, passed = GateConfig(), np.random.default_rng(0), 0
    for _ in range(DRAWS):
        gain, low, _ = gate.gain_bounds(dice.choice(gains, ITEMS, replace=False), config.confidence)
        passed += gain > 0 and low >= config.min_gain
    return passed / DRAWS


def _point(served: _Served, number: int) -> dict[str, Any]:
    """What is served, over the report's messages."""
    from reward.features import Example

    messages, answers = served.loop.desk.report, served.answers()
    judged = served.loop.reward.estimate([Example(m.text, a) for m, a in zip(messages, answers, strict=True)])
    return {
        "steps": number * RECIPE["optimizer"]["steps"],  # type: ignore[index]
        "proxy": float(np.mean([one.reward for one in judged])),
        "gold": float(served.right().mean()),
        "answers": len(set(answers)),
    }


def _say(arm: str, seed: int, point: dict[str, Any]) -> None:
    said = f"{arm}, seed {seed}, {point['steps']} steps: {point['proxy']:+.2f}, {point['gold']:.1%} right"
    if point["window"] is not None:
        _, proxy, gold, *_ = point["window"]
        said += f"; the guard saw {proxy:+.2f} and {100 * gold:+.0f} points; {point['says']}"
    print(said, flush=True)


def frozen_at(points: Sequence[dict[str, Any]]) -> int | None:
    """The index of the point after which training is stopped; None: it never is."""
    windows = [Window(*point["window"]) for point in points[1:]]
    return next((at for at in range(1, len(points)) if verdict(windows[:at])), None)


def lost(points: Sequence[dict[str, Any]]) -> float:
    """The most points of gold that what is served ever was under its best until then."""
    gold = np.array([100 * point["gold"] for point in points])
    return float((np.maximum.accumulate(gold) - gold).max())


def rows_of(found: dict[str, dict[int, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """A row for each arm and seed: gold at first, at best and at last, and the most that was lost since the best."""
    rows = []
    for seed, points in found.get("off", {}).items():
        rows.append(_row("nothing", seed, points, None))
        rows.append(_row("pause alone", seed, points[: (frozen_at(points) or len(points)) + 1], frozen_at(points)))
    for seed, points in found.get("on", {}).items():
        chances = [point["by chance"] for point in points[1:]]
        passed = sum(point["gate"] == "pass" for point in points[1:])
        row = _row("gate and pause", seed, points, frozen_at(points))
        rows.append(row | {"passed": f"{passed} of {len(chances)}", "by chance": round(statistics.fmean(chances), 3)})
    return sorted(rows, key=lambda row: ("nothing", "pause alone", "gate and pause").index(row["guards"]))


def _row(guards: str, seed: int, points: Sequence[dict[str, Any]], at: int | None) -> dict[str, Any]:
    gold = [100 * point["gold"] for point in points]
    return {
        "guards": guards,
        "seed": seed,
        "proxy at first": round(points[0]["proxy"], 2),
        "proxy at last": round(points[-1]["proxy"], 2),
        "gold at first": round(gold[0], 1),
        "at best": round(max(gold), 1),
        "at last": round(gold[-1], 1),
        "most lost": round(lost(points), 1),
        "parted windows": sum(parted(Window(*point["window"])) for point in points[1:]),
        "stopped at": None if at is None else points[at]["steps"],
    }


def plot(found: dict[str, dict[int, list[dict[str, Any]]]], path: Path) -> None:
    """Gold of what is served over steps, with guards and without, a line for each seed; dots where training stops."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    last = max(point["steps"] for points in found["off"].values() for point in points)
    for arm, colour, said in (("off", "tab:orange", "no guards"), ("on", "tab:blue", "gate and pause")):
        for points in found[arm].values():
            at = frozen_at(points)
            steps, gold = [point["steps"] for point in points], [100 * point["gold"] for point in points]
            axes.plot([*steps, last], [*gold, gold[-1]], color=colour, linewidth=1.2, label=said)
            if at is not None:
                about = {"label": "here the pause alone stops"} if arm == "off" else {}
                axes.plot(steps[at], gold[at], "o", color=colour, markersize=4, **about)
            said = "_"  # one line of the legend for an arm
    axes.set(xlabel="optimizer steps", ylabel="served answers that are right, %", ylim=(0, None))
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False, fontsize="small")
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
    found: dict[str, dict[int, list[dict[str, Any]]]] = {arm: {} for arm in ARMS}
    try:
        for seed in options.seed or (SEEDS[:1] if options.quick else SEEDS):
            for arm in ARMS:
                if path_of(arm, seed).exists() or not options.kept:
                    found[arm][seed] = kept(arm, seed, runs, options.threads)
    except (DataError, data.DataError) as error:
        print(error, file=sys.stderr)
        return 2
    aims = [
        aim(
            f"points of gold that what is served is ever under its best, with guards, seed {seed}", 2.0, most, most=True
        )
        for seed, most in ((seed, round(lost(points), 1)) for seed, points in found["on"].items())
    ]
    notes = [f"{time.monotonic() - started:.0f} s for what was not kept; {loads(began)}"]
    publish("overoptimise", rows_of(found), aims, quick=options.quick, part=options.seed is not None, notes=notes)
    if not (options.quick or options.seed):
        plot(found, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
