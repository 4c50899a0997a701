"""How well the reward model foretells what it is told next, beside plainer ways to learn the same stream.

Four public streams: preferences (HH), right and wrong solutions (GSM8K; a problem's four are foretold before any is
told), thumbs (banking77) and outcomes (airline recordings, five tasks at once); of each as much as ``MOST`` says.
Predict-then-learn: AUC (of pairs, how often the chosen one was foretold) and calibration error after a stream's first
5%, the mean of three seeds. Beside the error stands what chance alone makes of it: of labels drawn with just the
probabilities foretold. Where outcomes were measured, so that style is nobody's taste, two more lines show what it
costs to leave style out of a score. Streams run side by side, one to a core. ``--quick`` takes two seeds and less of
each stream. Needs EVERLOOP_DATA; vectors are kept below ``.everloop/cache``, so a second run encodes nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from everloop.config import RewardConfig

from benchmarks import _reward_streams as streams
from benchmarks._report import Aim, aim, loads, parser, publish, table
from benchmarks._report import load as load_now
from benchmarks._reward_baselines import Baseline, Majority, Offline, Words, sides, value
from benchmarks._reward_streams import DataError, Remembering, Stream
from reward import durable, model
from reward.calibration import auc, calibration_error
from reward.model import Label, Pair, RewardModel

SEEDS, QUICK_SEEDS = (0, 1, 2), (0, 1)
WARM = 0.05  # share of a stream before anything is counted
MOST = {"GSM8K solutions": 400, "HH pairs": 1500, "banking77 thumbs": 2500, "airline outcomes": None}
QUICK = {"GSM8K solutions": 200, "HH pairs": 750, "banking77 thumbs": 1200, "airline outcomes": 50}
NEAR, CALIBRATED = 0.02, 0.05
MEASURED = ("GSM8K solutions", "airline outcomes")
DRAWS = 50  # of labels, to tell what calibration error chance makes


class Ours:
    """The reward model as a :class:`Baseline`, with what its updates cost."""

    def __init__(self, encoder: Remembering, *, style: bool = False) -> None:
        model.STYLE_IS_SCORED = style
        self.model = RewardModel(RewardConfig(), encoder)
        self.seconds: list[float] = []
        self.bytes: list[int] = []

    def foretell(self, asked: Label | Pair) -> float:
        return self.model.foretell(asked)

    def told_all(self, lessons: tuple[Label | Pair, ...]) -> None:
        for lesson in lessons:
            began = time.process_time()
            self.model.learn([lesson])
            self.seconds.append(time.process_time() - began)
        self.bytes.append(sum(len(piece) for _, piece in durable.changes(self.model)))


def foretold(judge: Baseline | Ours, stream: Stream) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What was foretold and what was told, of everything after the warm-up."""
    said, was = [], []
    for block in stream:
        for moment in block:
            said.append(judge.foretell(moment.asked))
            was.append(value(moment.asked))
        for moment in block:
            if isinstance(judge, Ours):
                judge.told_all(moment.lessons)
            else:
                judge.told(moment.asked)
    start = int(WARM * len(said))
    return np.array(said[start:]), np.array(was[start:])


def chance(said: np.ndarray[Any, Any]) -> float:
    """The calibration error of one whose probabilities are just right, over as many labels."""
    random = np.random.default_rng(0)
    drawn = [calibration_error(said, (random.random(len(said)) < said).astype(float)) for _ in range(DRAWS)]
    return statistics.mean(drawn)


def measured(judge: Baseline | Ours, stream: Stream) -> tuple[float, float, float]:
    """(AUC, or of pairs accuracy; calibration error; that of chance). A pair is shown from either side in turn to
    calibrate it."""
    said, was = foretold(judge, stream)
    if isinstance(stream[0][0].asked, Pair):
        turned = np.arange(len(said)) % 2 == 1
        shown = np.where(turned, 1 - said, said)
        error = calibration_error(shown, np.where(turned, 0.0, was))
        return float((said > 0.5).mean() + 0.5 * (said == 0.5).mean()), error, chance(shown)
    found = auc(said, was)
    return found if found is not None else float("nan"), calibration_error(said, was), chance(said)


def judges(encoder: Remembering, stream: Stream, name: str) -> dict[str, Callable[[], Baseline | Ours]]:
    asked = [moment.asked for block in stream for moment in block]
    answers = sorted({one.answer for label in asked for one in sides(label)})
    made: dict[str, Callable[[], Baseline | Ours]] = {
        "reward model": lambda: Ours(encoder),
        "words, online": Words,
        "offline, refitted": lambda: Offline(encoder, len(asked), answers),
        "majority": Majority,
    }
    if name in MEASURED:
        made["reward model, style scored"] = lambda: Ours(encoder, style=True)
        made["offline, without style"] = lambda: Offline(encoder, len(asked), answers, style=False)
    return made


def rows_of(name: str, seeds: tuple[int, ...], quick: bool) -> list[dict[str, Any]]:
    """One row for each judge of a stream: means over the seeds."""
    encoder = Remembering()
    found: dict[str, list[tuple[float, float, float]]] = {}
    ours: list[Ours] = []
    asked = 0
    for seed in seeds:
        stream = streams.STREAMS[name](seed, (QUICK if quick else MOST)[name])
        encoder.prepare(streams.texts_of(stream))
        asked = sum(len(block) for block in stream)
        for title, make in judges(encoder, stream, name).items():
            judge = make()
            found.setdefault(title, []).append(measured(judge, stream))
            ours += [judge] if title == "reward model" and isinstance(judge, Ours) else []
    rows = []
    for title, results in found.items():
        right, error, alone = (statistics.mean(column) for column in zip(*results, strict=True))
        spread = statistics.stdev(result[0] for result in results)
        row = {"stream": name, "judge": title, "labels": asked, "AUC": round(right, 3), "± of seeds": round(spread, 3)}
        row |= {"calibration error": round(error, 3), "of chance": round(alone, 3), "ms": None, "kB": None}
        if title == "reward model":
            row["ms"] = round(1e3 * statistics.median(second for one in ours for second in one.seconds), 2)
            row["kB"] = round(statistics.median(size for one in ours for size in one.bytes) / 1e3, 1)
        rows.append(row)
    return rows


def aims_of(rows: list[dict[str, Any]]) -> list[Aim]:
    by = {(row["stream"], row["judge"]): row for row in rows}
    aims = []
    for name in dict.fromkeys(row["stream"] for row in rows):
        ours, words, offline = (by[name, judge] for judge in ("reward model", "words, online", "offline, refitted"))
        aims += [
            aim(f"{name}: AUC above words online", words["AUC"], ours["AUC"]),
            aim(f"{name}: AUC within {NEAR} of offline", round(offline["AUC"] - NEAR, 3), ours["AUC"]),
            aim(f"{name}: calibration error", CALIBRATED, ours["calibration error"], most=True),
        ]
    return aims


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--stream", choices=tuple(streams.STREAMS), help="this one alone")
    return made.parse_args()


def main() -> int:
    options, began, started = _options(), load_now(), time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that measure
    seeds = QUICK_SEEDS if options.quick else SEEDS
    try:
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            found = [
                pool.submit(rows_of, name, seeds, options.quick)
                for name in ([options.stream] if options.stream else MOST)
            ]
            rows = []
            for one in found:
                rows += one.result()
                print(table(one.result()), file=sys.stderr, flush=True)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    notes = [
        "AUC of HH pairs is the share of pairs whose chosen answer was foretold",
        "ms: processor time of an update with vectors at hand; kB: what it writes to the state; medians",
        f"{time.monotonic() - started:.0f} s; {loads(began)}",
    ]
    publish("reward", rows, aims_of(rows), quick=options.quick, part=options.stream is not None, notes=notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
