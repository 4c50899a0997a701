"""The parts of a policy's calls that a report tells apart: turn, who answered, topic, language, answers that recur."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from reward.calibration import FEWEST
from reward.language import language
from reward.model import RewardModel
from reward.report import Row

LISTED = 5  # adapters, and recurring answers, that get a slice of their own
READ = 2000  # newest prompts whose topic is found: a new text costs the encoder about 10 ms
SHOWN = 40  # characters of an answer or a prompt


def slices(rows: Sequence[Row], model: RewardModel | None) -> dict[str, list[Row]]:
    """All calls, and by part those that lie in it. ``model``: whose topics they are told apart by; None: by none."""
    parts = {"all": list(rows)}
    parts |= _parted(rows, [_turn(row) for row in rows], ["turn 1", "turns 2 to 3", "turn 4 and later"])
    adapters = [name for name, _ in Counter(row.adapter for row in rows).most_common(LISTED)]
    if len(adapters) > 1:
        parts |= {f"by {name[:12]}": its for name, its in _parted(rows, [r.adapter for r in rows], adapters).items()}
    parts |= {} if model is None else topics(rows, model)
    spoken = [language(row.prompt) for row in rows]
    named = [name for name, _ in Counter(name for name in spoken if name is not None).most_common()]
    parts |= {f"in {name}": its for name, its in _parted(rows, spoken, named).items()}
    answers = [_short(row.answer) for row in rows]
    rated = Counter(answer for answer, row in zip(answers, rows, strict=True) if row.label is not None)
    often = [answer for answer, count in rated.most_common(LISTED) if count >= FEWEST]
    return parts | {f"answer {answer!r}": its for answer, its in _parted(rows, answers, often).items()}


def _parted(rows: Sequence[Row], keys: Sequence[str | None], names: Iterable[str]) -> dict[str, list[Row]]:
    """The rows of each name, in the order of names; what has none is left out."""
    found: dict[str, list[Row]] = {name: [] for name in names}
    for row, key in zip(rows, keys, strict=True):
        if key in found:
            found[key].append(row)
    return {name: its for name, its in found.items() if its}


def _turn(row: Row) -> str:
    return "turn 1" if row.turn == 0 else "turns 2 to 3" if row.turn < 3 else "turn 4 and later"


def topics(rows: Sequence[Row], model: RewardModel) -> dict[str, list[Row]]:
    """The newest READ prompts' calls by the model's own topics, largest first: named by their number, which stays, and
    by the prompt that is nearest to the mean of the topic's."""
    prompts = list(dict.fromkeys(row.prompt for row in sorted(rows, key=lambda row: -row.time)))[:READ]
    if not prompts or not len(model.topics.centres):
        return {}
    vectors = model.encoder.encode(prompts)
    of = model.topics.of(vectors)
    at = dict(zip(prompts, of.tolist(), strict=True))
    found: dict[str, list[Row]] = {}
    for topic, _ in Counter(at.get(row.prompt) for row in rows).most_common():
        if topic is not None:
            its = np.flatnonzero(of == topic)
            typical = prompts[its[(vectors[its] @ vectors[its].mean(0)).argmax()]]
            name = _short(typical.partition("\n")[0])  # the user's own words
            found[f"topic {topic}: {name!r}"] = [row for row in rows if at.get(row.prompt) == topic]
    return found


def _short(text: str) -> str:
    """What a text begins with, on one line."""
    return " ".join(text.split())[:SHOWN]
