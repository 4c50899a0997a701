"""The learner's account of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from trainer.checkpoint import Position
from trainer.learner import summary
from trainer.material import Answer, Material
from trainer.packing import Sample


def test_the_account_is_of_the_last_round_also_beyond_the_tenth(tmp_path: Path):
    for number in (2, 9, 10):
        answers = [Answer(Sample((1,), (i,)), "corrected", "a", replay=1.0) for i in range(number)]
        Material([answers]).save(tmp_path / f"round-{number}.parquet")
    told = summary(SimpleNamespace(position=Position(11, 0, 4), curves=[], folder=tmp_path))  # type: ignore[arg-type]
    assert told["answers_corrected"] == 10
