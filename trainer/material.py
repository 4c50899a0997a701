"""What one round of training learns from: answers, what each is worth, and what the models said of it beforehand.

Material is made once a round, written whole before it is used, and read back after a kill: rollouts are drawn and
judged once. It is one Parquet file, one row an answer, so people can query what a run was trained on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trainer.packing import Sample

Floats = NDArray[np.float32]
Source = Literal["logged", "fresh", "corrected", "rated", "believed"]
NOTHING = np.zeros(0, np.float32)


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer of one turn, as something to learn from.

    ``weight`` is its say in PPO: the turns of an episode share 1, and so do the samples of a prompt; 0: it is not in
    PPO. ``replay`` is its weight in the replay term. ``count`` is how many identical samples it stands for.
    ``behaviour``, ``proximal`` and ``base`` (tokens,) are log-probabilities of the completion: as it was sampled, at
    the start of the round, and under the base model. ``value`` is the value head's word at the start of the round;
    ``target`` is what it should have said. ``synthetic``: no person saw it. ``finished`` False: it was cut at the
    longest length. ``branch``: 0 in the course of an episode; above it, an answer beside it that nothing followed.
    ``potential``: how the episode was foretold to end before this answer, -1 to 1 as rewards are; None: it was not, or
    turns have rewards of their own.

    Example: a rollout sampled three times out of four and judged good::

        Answer(Sample((1, 5), (7, 2)), "fresh", "ep_1", text="card_arrival", reward=0.8, weight=0.75, count=3)
    """

    sample: Sample
    source: Source
    episode: str
    turn: int = 0
    branch: int = 0
    text: str = ""
    reward: float = 0.0
    belief: float = 0.0
    weight: float = 0.0
    replay: float = 0.0
    count: int = 1
    advantage: float = 0.0
    value: float = 0.0
    target: float = 0.0
    potential: float | None = None
    synthetic: bool = False
    finished: bool = True
    behaviour: Floats = field(default_factory=lambda: NOTHING)
    proximal: Floats = field(default_factory=lambda: NOTHING)
    base: Floats = field(default_factory=lambda: NOTHING)


class Material:
    """Answers by prompt: ``groups[i]`` are the answers to one prompt, in a fixed order."""

    def __init__(self, groups: Sequence[Sequence[Answer]]) -> None:
        self.groups = [tuple(group) for group in groups]
        self.samples = [tuple(answer.sample for answer in group) for group in self.groups]

    @classmethod
    def of(cls, answers: Iterable[Answer]) -> Material:
        """Grouped by prompt, in order of first appearance."""
        grouped: dict[tuple[int, ...], list[Answer]] = {}
        for answer in answers:
            grouped.setdefault(answer.sample.prompt, []).append(answer)
        return cls(list(grouped.values()))

    @property
    def answers(self) -> list[Answer]:
        return [answer for group in self.groups for answer in group]

    def changed(self, answers: Sequence[Answer]) -> Material:
        """The same groups with other answers, one for each of ``self.answers``, in order."""
        following = iter(answers)
        return Material([[next(following) for _ in group] for group in self.groups])

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        rows = [{"group": at, **_row(answer)} for at, group in enumerate(self.groups) for answer in group]
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.rename(path)

    @classmethod
    def load(cls, path: Path) -> Material:
        groups: dict[int, list[Answer]] = {}
        for row in pq.read_table(path).to_pylist():
            groups.setdefault(row.pop("group"), []).append(_answer(row))
        return cls([groups[at] for at in sorted(groups)])


_ARRAYS = ("behaviour", "proximal", "base")
SCHEMA = pa.schema(
    [
        ("group", pa.int32()),
        ("prompt", pa.list_(pa.int32())),
        ("completion", pa.list_(pa.int32())),
        ("temperature", pa.float64()),
        ("source", pa.string()),
        ("episode", pa.string()),
        ("turn", pa.int32()),
        ("branch", pa.int32()),
        ("text", pa.string()),
        *((name, pa.float64()) for name in ("reward", "belief", "weight", "replay", "advantage", "value", "target")),
        ("potential", pa.float64()),
        ("count", pa.int32()),
        ("synthetic", pa.bool_()),
        ("finished", pa.bool_()),
        *((name, pa.list_(pa.float32())) for name in _ARRAYS),
    ]
)


def _row(answer: Answer) -> dict[str, Any]:
    plain = {f.name: getattr(answer, f.name) for f in fields(answer) if f.name != "sample"}
    sample = answer.sample
    return {
        **plain,
        "prompt": list(sample.prompt),
        "completion": list(sample.completion),
        "temperature": sample.temperature,
    }


def _answer(row: dict[str, Any]) -> Answer:
    sample = Sample(tuple(row.pop("prompt")), tuple(row.pop("completion")), row.pop("temperature"))
    arrays = {name: np.asarray(row.pop(name), np.float32) for name in _ARRAYS}
    return Answer(sample, **row, **arrays)
