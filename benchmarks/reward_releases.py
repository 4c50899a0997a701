"""How often a snapshot of the reward model takes over, and how late, by the rule in use and by a looser one.

A stream of labels is learned once for each rule, with a snapshot every 50 updates that is judged beside the version
that scores, as the scorer does it. "strict", in use: a loss of more than 0.01 of AUC is ruled out. "loose": it is not
worse beyond noise. AUC is that of what the versions that scored foretold of all labels, beside that of the live model,
which of GSM8K has seen other solutions of the same problem. ``--quick``: one seed of two. Needs EVERLOOP_DATA; vectors
are kept below ``.everloop/cache``.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from everloop.config import RewardConfig

from benchmarks import _reward_streams as streams
from benchmarks._report import Aim, aim, loads, parser, publish
from benchmarks._report import load as load_now
from benchmarks._reward_streams import DataError, Remembering, Stream
from reward.calibration import auc
from reward.model import Label, RewardModel
from reward.release import Shadow

SEEDS, QUICK_SEEDS = (0, 1), (0,)
STREAMS = {"banking77 thumbs": 2500, "GSM8K solutions": 400}
RULES = ("strict", "loose")
REASONS = {
    "a loss not ruled out": "cannot be ruled out",
    "worse": "worse by more than chance",
    "calibration": "its calibration error is",
    "length": "follow the answer's length",
    "null answers": "saying nothing beats",
    "planted pairs": "planted answers lose",
}


class Line:
    """One live model and the version that scores, by one rule; counts what its snapshots came to."""

    def __init__(self, encoder: Remembering, rule: str, folder: Path) -> None:
        self.live = RewardModel(RewardConfig(), encoder)
        self.scoring = self.live
        self.shadow = Shadow(self.live.config.window)
        self.rule, self.folder, self.encoder = rule, folder, encoder
        self.foretold: list[tuple[float, float, float]] = []  # by the one that scores, by the live one, the label
        self.waits: list[int] = []  # snapshots that each takeover had to wait for, itself included
        self.waiting = 0
        self.against: Counter[str] = Counter()

    def tell(self, label: Label) -> None:
        judged = self.scoring is not self.live and self.scoring.may_judge
        beside = self.scoring.foretell(label) if self.scoring is not self.live else 0.5
        (expected,) = self.live.learn([label])
        if judged:
            self.shadow.add(beside, expected, label.value, label.example)
            self.foretold.append((beside, expected, label.value))
        if self.live.updates % self.live.config.snapshot_every == 0:
            self.freeze()

    def freeze(self) -> None:
        candidate = RewardModel.load(self.folder / self.live.save(self.folder), self.encoder)
        if self.scoring is self.live or not self.scoring.may_judge:
            self.scoring = candidate
            return
        verdict = self.shadow.judge(self.scoring, candidate)
        self.waiting += 1
        lossy = "cannot be ruled out" in verdict.reason and verdict.reason.startswith("waits")
        if verdict.takes_over or (self.rule == "loose" and lossy):
            self.waits.append(self.waiting)
            self.waiting = 0
            self.scoring = candidate
            self.shadow.pairs.clear()
        self.against.update(name for name, words in REASONS.items() if words in verdict.reason)


def row(name: str, title: str, lines: list[Line]) -> dict[str, Any]:
    waits = [wait for line in lines for wait in line.waits]
    judged = sum(waits) + sum(line.waiting for line in lines)
    aucs = []
    for line in lines:
        scoring, live, labels = np.array(line.foretold).T
        aucs.append((auc(scoring, labels) or 0.0, auc(live, labels) or 0.0))
    against = sum((line.against for line in lines), Counter[str]())
    return {
        "stream": name,
        "rule": title,
        "snapshots judged": judged,
        "took over": len(waits),
        "median wait": statistics.median(waits) if waits else None,
        "longest wait": max([*waits, *(line.waiting for line in lines)]),
        "AUC": round(statistics.mean(one for one, _ in aucs), 4),
        "AUC of live": round(statistics.mean(one for _, one in aucs), 4),
        "against": ", ".join(f"{why} {count}" for why, count in sorted(against.items())) or "nothing",
    }


def main() -> int:
    options, began, started = parser(__doc__ or "").parse_args(), load_now(), time.monotonic()
    rows: list[dict[str, Any]] = []
    try:
        encoder = Remembering()
        for name, most in STREAMS.items():
            found: dict[str, list[Line]] = {title: [] for title in RULES}
            for seed in QUICK_SEEDS if options.quick else SEEDS:
                stream = streams.STREAMS[name](seed, most)
                encoder.prepare(streams.texts_of(stream))
                for rule in RULES:
                    with tempfile.TemporaryDirectory() as folder:
                        line = Line(encoder, rule, Path(folder))
                        tell_all(line, stream)
                        found[rule].append(line)
                encoder.prepare([])
            rows += [row(name, title, lines) for title, lines in found.items()]
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    publish(
        "reward_releases",
        rows,
        aims_of(rows),
        quick=options.quick,
        notes=[f"{time.monotonic() - started:.0f} s; {loads(began)}"],
    )
    return 0


def tell_all(line: Line, stream: Stream) -> None:
    for block in stream:
        for moment in block:
            for lesson in moment.lessons:
                assert isinstance(lesson, Label)
                line.tell(lesson)


def aims_of(rows: list[dict[str, Any]]) -> list[Aim]:
    return [
        aim(f"{one['stream']}, strict: median wait in snapshots", 3, one["median wait"] or float("inf"), most=True)
        for one in rows
        if one["rule"] == "strict"
    ]


if __name__ == "__main__":
    sys.exit(main())
