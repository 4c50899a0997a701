"""Material on disk is the material that was made, to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.material import Answer, Material
from trainer.packing import Sample


def some() -> Material:
    floats = np.asarray([-0.1, -1.0 / 3], np.float32)
    return Material.of(
        [
            Answer(Sample((1, 5), (7, 2)), "fresh", "e1", reward=0.1, weight=0.75, count=3, behaviour=floats),
            Answer(Sample((1, 6), (8,), 0.7), "logged", "e2", turn=1, text="é", weight=0.5, value=1 / 3),
            Answer(Sample((1, 5), (9,)), "believed", "e1", replay=0.9, belief=0.9, synthetic=True),
        ]
    )


def test_answers_to_one_prompt_are_one_group():
    assert [len(group) for group in some().groups] == [2, 1]
    assert some().samples[0] == (Sample((1, 5), (7, 2)), Sample((1, 5), (9,)))


def test_it_survives_a_round_trip(tmp_path: Path):
    made = some()
    made.save(tmp_path / "round-0.parquet")
    loaded = Material.load(tmp_path / "round-0.parquet")
    for before, after in zip(made.answers, loaded.answers, strict=True):
        for name, value in vars(before).items():
            found = getattr(after, name)
            same = np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value
            assert same, name
    assert [path.name for path in tmp_path.iterdir()] == ["round-0.parquet"]
