"""How fast the reward model learns and scores, with vectors at hand and without, and what of an update costs how much.

Real texts: banking77's thumbs (77 answers that recur) and HH's preferences (none recurs, so all 512 prototypes are in
use). A model that has learned ``WARM`` labels learns the next ones, one at a time, and scores the same answers in
batches of ``BATCH``. Each rate is for a second of processor time of one thread, the median over blocks: a model is one
thread's, two policies' are learned side by side. ``--quick`` takes fewer. Needs EVERLOOP_DATA; vectors are kept below
``.everloop/cache``.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from everloop.config import RewardConfig

from benchmarks import _reward_streams as streams
from benchmarks._report import aim, loads, parser, publish
from benchmarks._report import load as load_now
from benchmarks._reward_baselines import sides
from benchmarks._reward_streams import DataError, Remembering
from reward.encoder import Encoder
from reward.model import Label, Pair, RewardModel

WARM, BLOCK, BATCH = 1000, 100, 256
BLOCKS, QUICK_BLOCKS = 10, 4
UPDATES, SCORES, CORES = 5000, 20_000, 2
STREAMS = ("banking77 thumbs", "HH pairs")
AT_HAND = "vectors at hand"
THREADS = "OMP_NUM_THREADS"


def rate(blocks: Sequence[Sequence[Any]], do: Callable[[Sequence[Any]], object]) -> float:
    """Things for a second of processor time: the median over blocks."""
    found = []
    for block in blocks:
        began = time.process_time()
        do(block)
        found.append(len(block) / (time.process_time() - began))
    return statistics.median(found)


def one_by_one(model: RewardModel) -> Callable[[Sequence[Label | Pair]], object]:
    """What the reward service does with each lesson of a batch."""
    return lambda block: [model.learn([lesson]) for lesson in block]


def lessons_of(name: str, encoder: Remembering, most: int) -> list[Label | Pair]:
    stream = streams.STREAMS[name](0, None)
    lessons = [lesson for block in stream for moment in block for lesson in moment.lessons][:most]
    encoder.prepare([text for one in lessons for side in sides(one) for text in (side.prompt, side.answer)])
    return lessons


def measured(name: str, blocks: int) -> dict[str, float]:
    """Updates and scores a second of one model, vectors at hand."""
    encoder = Remembering()
    lessons = lessons_of(name, encoder, WARM + blocks * BLOCK)
    model = RewardModel(RewardConfig(), encoder)
    model.learn(lessons[:WARM])
    fresh = [lessons[at : at + BLOCK] for at in range(WARM, len(lessons), BLOCK)]
    answers = [side for one in lessons for side in sides(one)]
    batches = [answers[at : at + BATCH] for at in range(0, len(answers) - BATCH + 1, BATCH)]
    return {
        "updates/s": rate(fresh, one_by_one(model)),
        "scores/s": rate(batches, model.estimate),
        "alone": rate([[answer] for answer in answers[:BLOCK]], model.estimate),
    }


def measured_new(name: str, blocks: int) -> dict[str, float]:
    """The same where the encoder has read nothing before: a tenth as many, since each text takes milliseconds."""
    remembering = Remembering()
    lessons = lessons_of(name, remembering, WARM + 2 * blocks * BLOCK // 10)
    model = RewardModel(RewardConfig(), remembering)
    model.learn(lessons[:WARM])
    model.encoder = Encoder(threads=1)
    model.encoder.encode(["the weights are loaded by the first text"])
    fresh, unseen = lessons[WARM::2], [side for one in lessons[WARM + 1 :: 2] for side in sides(one)]
    return {"updates/s": rate([fresh], one_by_one(model)), "scores/s": rate([unseen], model.estimate)}


def parts(name: str, whole: float) -> list[dict[str, Any]]:
    """Where the time of one update goes, of ``whole`` µs: the median of ``BLOCK`` calls of each part by itself."""
    encoder = Remembering()
    lessons = lessons_of(name, encoder, WARM + BLOCK)
    model = RewardModel(RewardConfig(), encoder)
    model.learn(lessons[:WARM])
    kept = copy.deepcopy(model.calibration), copy.deepcopy(model.drift), copy.deepcopy(model.heads)
    calibration, drift, heads = kept
    does: dict[str, Callable[[Label | Pair], object]] = {
        "what the heads see": lambda one: model.seen_of(sides(one), style=True),
        "a step with replay": lambda _: heads.step(model.reservoir.sample(beside=0)),
        "calibration": lambda _: calibration.add(0.3, 0.6, 1.0),
        "drift": lambda _: drift.told(1.0, 0.6),
    }
    rows = []
    for part, do in does.items():
        if part not in ("calibration", "drift") or not isinstance(lessons[0], Pair):
            us = 1e6 / rate([[one] for one in lessons[WARM:]], lambda block, do=do: do(block[0]))
            rows.append({"stream": name, "part": part, "us": round(us), "share": round(us / whole, 2)})
    rest = whole - sum(row["us"] for row in rows)
    rows.append({"stream": name, "part": "the rest", "us": round(rest), "share": round(rest / whole, 2)})
    return rows


def rows_of(name: str, blocks: int) -> list[dict[str, Any]]:
    columns = {
        AT_HAND: measured(name, blocks),
        "every text new": measured_new(name, blocks),
    }
    return [
        {"stream": name, "where": where}
        | {key: round(found[key]) if key in found else None for key in ("updates/s", "scores/s")}
        | {"one score at a time/s": round(found["alone"]) if "alone" in found else None}
        for where, found in columns.items()
    ]


def main() -> int:
    options, began, started = parser(__doc__ or "").parse_args(), load_now(), time.monotonic()
    if os.environ.get(THREADS) != "1":  # read when the libraries are loaded: so for this process from its start
        os.environ[THREADS] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.throughput", *sys.argv[1:]])
    blocks = QUICK_BLOCKS if options.quick else BLOCKS
    try:
        rows = [row for name in STREAMS for row in rows_of(name, blocks)]
        at_hand = {row["stream"]: row for row in rows if row["where"] == AT_HAND}
        costs = [row for name in STREAMS for row in parts(name, 1e6 / at_hand[name]["updates/s"])]
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    aims = [
        aim("updates/s of two cores, vectors at hand", UPDATES, CORES * at_hand[STREAMS[0]]["updates/s"]),
        aim("scores/s of two cores, vectors at hand", SCORES, CORES * at_hand[STREAMS[0]]["scores/s"]),
    ]
    notes = [
        "every text new: read by the packaged encoder on the same thread, an answer that recurs once",
        "part, us, share: of one update, vectors at hand",
        f"{time.monotonic() - started:.0f} s; {loads(began)}",
    ]
    publish("throughput", rows + costs, aims, quick=options.quick, notes=notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
