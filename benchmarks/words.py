"""What comments are read as, and what success is estimated from those who speak.

**Comments**: so many of 84 (English and German) come with a thumb, in 30 shuffles; how many of the others the line
through them reads right. ``noise``: the thumbs are shuffled too. **Silence**: 3,000 calls of which long answers are
worse and spoken of most; mean of the labels, and of the labels each weighed by how rarely its kind is spoken of, over
10 streams, beside the truth. ``--quick``: a third of the shuffles and streams. A simulation; no data is needed.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks._comments import ENGLISH, GERMAN
from benchmarks._report import aim, loads, parser, publish
from benchmarks._report import load as load_now
from reward.comments import Comments
from reward.encoder import Encoder
from reward.features import Example
from reward.propensity import Propensity

SHUFFLES, STREAMS, CALLS = 30, 10, 3000
EXAMPLES = (20, 40, 60)
HELD_OUT = 24
LENGTHS = (3, 5, 10, 20, 40, 80, 160, 300)  # words of an answer


def read_right(vectors: Any, examples: int, shuffles: int, *, noise: bool = False) -> dict[str, Any]:
    """Shares of the held-out comments that are read right: of all, of the German ones, in the worst shuffle."""
    said = [up for up, _ in (*ENGLISH, *GERMAN)]
    found: list[list[tuple[bool, bool]]] = []  # by shuffle: whether it is read right, whether it is German
    for seed in range(shuffles):
        order, taught = list(range(len(said))), list(said)
        random.Random(seed).shuffle(order)
        if noise:
            random.Random(~seed).shuffle(taught)
        made = Comments(vectors.shape[1])
        for i in order[:examples]:
            made.learn(str(i), vectors[i], float(taught[i]))
        read = [(i, made.read(vectors[i])) for i in order[-HELD_OUT:]]
        found.append([(good is not None and (good > 0.5) == said[i], i >= len(ENGLISH)) for i, good in read])
    of_all = [statistics.mean(right for right, _ in one) for one in found]
    german = [right for one in found for right, is_german in one if is_german]
    return {
        "what": f"comments, {examples} with a thumb{', noise' if noise else ''}",
        "read right": round(statistics.mean(of_all), 3),
        "worst shuffle": round(min(of_all), 3),
        "German": round(statistics.mean(german), 3),
    }


def answers(count: int, seed: int) -> Iterator[tuple[int, bool, bool]]:
    """(words, whether it is good, whether somebody says so): short ones are good, and nobody speaks of them."""
    dice = random.Random(seed)
    for _ in range(count):
        words = dice.choice(LENGTHS)
        length = math.log1p(words) / 5
        yield words, dice.random() < _likely(4 - 6 * length), dice.random() < _likely(6.5 * length - 5)


def _likely(odds: float) -> float:
    return 1 / (1 + math.exp(-odds))


def estimated(seed: int) -> tuple[float, float, float]:
    """The truth, the mean of the labels, and that of the weighed labels."""
    made, truth, labels, weights = Propensity(), [], [], []
    for words, good, spoken in answers(CALLS, seed):
        one = Example("what is this", " ".join(["word"] * words))
        made.saw(one)
        truth.append(good)
        if spoken:
            weights.append(made.spoken(one))
            labels.append(good)
    weighed = sum(weight for weight, good in zip(weights, labels, strict=True) if good) / sum(weights)
    return statistics.mean(truth), statistics.mean(labels), weighed


def main() -> int:
    options, began, started = parser(__doc__ or "").parse_args(), load_now(), time.monotonic()
    part = 3 if options.quick else 1
    vectors = Encoder(threads=1).encode([text for _, text in (*ENGLISH, *GERMAN)])
    rows: list[dict[str, Any]] = [read_right(vectors, examples, SHUFFLES // part) for examples in EXAMPLES]
    rows.append(read_right(vectors, EXAMPLES[-1], SHUFFLES // part, noise=True))
    streams = [estimated(seed) for seed in range(STREAMS // part)]
    truth, plain, weighed = (round(statistics.mean(column), 3) for column in zip(*streams, strict=True))
    rows.append({"what": "success", "truth": truth, "mean of labels": plain, "weighed": weighed})
    aims = [
        aim("share of comments read right after 60 with a thumb", 0.7, rows[2]["read right"]),
        aim("the weighed mean's distance from the truth", abs(plain - truth) / 2, abs(weighed - truth), most=True),
    ]
    publish("words", rows, aims, quick=options.quick, notes=[f"{time.monotonic() - started:.0f} s; {loads(began)}"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
