"""What an episode costs, step by step, and what that means for so many episodes a minute.

``--measure`` measures the steps on this machine (:mod:`benchmarks._costs`); without it the last figures are taken.
Everything else is arithmetic on them: ``--episodes-per-minute`` (repeatable) says for how many, and ``--page`` puts
the tables into ``docs/capacity.md``.

The run that measures fails where a step did not handle everything that it was given.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _costs
from benchmarks._report import RESULTS, load, loads, parser, publish, table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "capacity.md"
RATES = (100, 10_000, 1_000_000)
CALLS, FEEDBACK = 2.0, 0.2  # of an episode
BUSY = 0.6  # of a core: what a process of the platform is planned for
REPLICAS = 3
BROKER_CORES = 8 * 0.5  # that one broker gives
RETENTION_DAYS, SETTLE_DAYS = 30, 7  # the defaults of log.retention_hours and assemble.settle
LEAST_PARTITIONS = 4
Row = dict[str, Any]


class Figures(NamedTuple):
    """What was measured: microseconds of processor time, and bytes of an episode, by step."""

    us: Mapping[str, float]
    bytes: Mapping[str, float]

    @classmethod
    def read(cls, path: Path = RESULTS / "capacity.json") -> Figures:
        """Raises SystemExit where nothing was measured yet."""
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        except OSError:
            raise SystemExit(f"there are no figures at {path}: python -m benchmarks.capacity --measure") from None
        us = {row["step"]: float(row["us"]) for row in rows if row["us"] is not None}
        return cls(us, {row["step"]: float(row["bytes"]) for row in rows if row["bytes"] is not None})


class Cost(NamedTuple):
    """Milliseconds of processor time that an episode takes in a step, and what bounds the step."""

    step: str
    ms: float
    bound: str


def costs(figures: Figures) -> list[Cost]:
    """Of an episode with ``CALLS`` calls and ``FEEDBACK`` words about it. Each of these events gives a new version of
    the episode, which is scored and archived anew."""
    us = figures.us

    def both(what: str) -> float:
        return (CALLS * us[what.format("call")] + FEEDBACK * us[what.format("feedback")]) / 1000

    events = CALLS + FEEDBACK
    records = 4 * events  # the event; episode, trajectory and score of its version
    scored = events * us["broker: feedback taken and assembled"] / 1000  # a transaction for each version, as there
    reading = records * us["broker: read by the archive"] / 1000
    return [
        Cost("gateway", events * us["gateway: serving"] / 1000, "one event loop, so one core, for each gateway"),
        Cost("scribe", events * us["gateway: scribe"] / 1000, "a core beside each gateway, and its disk's syncs"),
        Cost(
            "broker", both("broker: {} taken and assembled") + scored + reading, "cores; partitions spread over brokers"
        ),
        Cost("assemble", both("assemble: {}"), "one core a worker"),
        Cost("score and feedback", both("score: {}"), "the encoder on one core; a policy has one writer"),
        Cost(
            "archive",
            records * (us["archive"] + us["archive: fold"]) / 1000,
            "one process for the whole installation, one core",
        ),
    ]


class Plan(NamedTuple):
    """What so many episodes a minute need."""

    cores: float
    gateways: int
    assemblers: int
    scorers: int
    partitions: int
    brokers: int
    archives: int
    log_gb_a_day: float
    store_gb_a_day: float
    state_gb: float


def plan(figures: Figures, episodes_per_minute: float) -> Plan:
    rate = episodes_per_minute / 60
    cores = {one.step: rate * one.ms / 1000 for one in costs(figures)}

    def processes(step: str) -> int:
        return max(1, math.ceil(cores[step] / BUSY))

    day = rate * 86_400 / 1e9
    kept = sum(size for name, size in figures.bytes.items() if name.startswith("log: ") and "-state-" not in name)
    workers = max(processes("assemble"), processes("score and feedback"))
    return Plan(
        sum(cores.values()) + (REPLICAS - 1) * cores["broker"],
        processes("gateway"),
        processes("assemble"),
        processes("score and feedback"),
        max(LEAST_PARTITIONS, 2 * workers),
        max(REPLICAS, math.ceil(REPLICAS * cores["broker"] / BROKER_CORES)),
        processes("archive"),
        REPLICAS * day * kept,
        day * sum(size for name, size in figures.bytes.items() if name.startswith("store: ")),
        REPLICAS * SETTLE_DAYS * day * figures.bytes["log: everloop-state-assemble"],
    )


def measured_table(figures: Figures) -> list[Row]:
    each = [{"measured": name, "µs": f"{value:,.0f}", "bytes": ""} for name, value in figures.us.items()]
    return each + [{"measured": name, "µs": "", "bytes": f"{value:,.0f}"} for name, value in figures.bytes.items()]


def costs_table(figures: Figures) -> list[Row]:
    its = costs(figures)
    rows = [{"step": one.step, "ms": f"{one.ms:.2f}", "what bounds it": one.bound} for one in its]
    return [*rows, {"step": "all of it", "ms": f"{sum(one.ms for one in its):.2f}", "what bounds it": most(figures)}]


def most(figures: Figures) -> str:
    """How much two cores could do, were they busy with nothing else."""
    return f"two cores: {2 * 60_000 / sum(one.ms for one in costs(figures)):,.0f} episodes a minute at most"


def plans_table(figures: Figures, rates: Sequence[float]) -> list[Row]:
    found = [(rate, plan(figures, rate)) for rate in rates]

    def row(what: str, field: str) -> Row:
        return {"episodes a minute": what} | {f"{rate:,.0f}": _round(getattr(its, field)) for rate, its in found}

    return [
        row("cores, all together", "cores"),
        row("gateways, each with its scribe", "gateways"),
        row("workers of assemble", "assemblers"),
        row("workers of score; as many policies at least", "scorers"),
        row("partitions (`log.partitions`)", "partitions"),
        row(f"brokers of 8 cores, half busy, {REPLICAS} replicas", "brokers"),
        row("archives (there is one)", "archives"),
        row(f"log, GB a day, {REPLICAS} replicas", "log_gb_a_day"),
        row("store, GB a day", "store_gb_a_day"),
        row(f"state of assembly, GB, {SETTLE_DAYS} days, {REPLICAS} replicas", "state_gb"),
    ]


def _round(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"


def markdown(rows: Sequence[Row]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(figures: Figures) -> dict[str, str]:
    """The page's tables, by the names that they have in it."""
    return {
        "costs": markdown(costs_table(figures)),
        "plans": markdown(plans_table(figures, RATES)),
        "measured": markdown(measured_table(figures)),
    }


def fill(page: str, figures: Figures) -> str:
    """The page with its tables as the figures make them. Raises SystemExit where a table's place is missing."""
    for name, text in tables(figures).items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not place.search(page):
            raise SystemExit(f"the page has no place for the table {name!r}: <!-- {name} --> … <!-- end -->")
        page = place.sub(lambda found, text=text: f"{found[1]}{text}{found[2]}", page)
    return page


def measure(quick: bool) -> None:
    began = load()
    with tempfile.TemporaryDirectory(prefix="ev-capacity-") as folder:
        rows = _costs.measure(Path(folder), quick=quick)
    notes = [
        "processor time by event, of backlogs; producers, workers and broker shared the cores",
        f"an episode: {_costs.CALLS} calls of 256 tokens and a thumb; each a batch of its own",
        loads(began),
    ]
    publish("capacity", rows, quick=quick, notes=notes)


def main(arguments: Sequence[str] | None = None) -> int:
    its = parser(__doc__ or "")
    its.add_argument("--measure", action="store_true", help="measure the steps here, before anything else")
    its.add_argument("--episodes-per-minute", type=float, action="append", help=f"default: {RATES}")
    its.add_argument("--page", action="store_true", help="put the tables into docs/capacity.md")
    options = its.parse_args(arguments)
    if min(options.episodes_per_minute or RATES) <= 0:
        its.error("--episodes-per-minute takes a number above 0")
    if options.measure:
        measure(options.quick)
    figures = Figures.read()
    print(table(costs_table(figures)), table(plans_table(figures, options.episodes_per_minute or RATES)), sep="\n\n")
    if options.page:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
