"""Checkpoints of a run: a folder that is whole or not there, from which the next step gives the same bits.

A checkpoint is written in these steps: the engine's state and the position into a folder with a temporary name,
everything synced, the folder renamed to its step, older ones dropped. A kill between any two leaves the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from everloop.registry import Point

from trainer.engine import Engine
from trainer.request import ADAPTERS, SAMPLED, sampled, write_json

KEPT = 2
POSITION = "position.json"


class Position(NamedTuple):
    """Where a run stands: ``taken`` optimizer steps in all, the next is ``step`` of round ``number``."""

    number: int = 0
    step: int = 0
    taken: int = 0


class Checkpoints:
    """The checkpoints below one folder; one writer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, engine: Engine, position: Position, curves: list[Point]) -> None:
        """Durable on return."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".partial-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        engine.save_state(partial)
        (partial / POSITION).write_text(json.dumps({"position": position, "curves": curves}))
        for path in partial.iterdir():
            _sync(path)
        target = self.folder / f"{position.taken:08d}"
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _sync(self.folder)
        for old in self._whole()[:-KEPT]:
            shutil.rmtree(old)

    def restore(self, engine: Engine) -> tuple[Position, list[Point]]:
        """Load the newest checkpoint into the engine; the very start and no curves where there is none."""
        whole = self._whole()
        if not whole:
            return Position(), []
        engine.load_state(whole[-1])
        saved = json.loads((whole[-1] / POSITION).read_text())
        return Position(*saved["position"]), [Point(*point) for point in saved["curves"]]

    def _whole(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("[0-9]*") if path.is_dir())


class Samples:
    """Adapter files of a run's newest checkpoints, ``adapters/<hash>/`` below its folder: to sample from.

    ``adapters/sampled.json`` lists what can be had, oldest first: it names files only once they are there, and files
    are dropped only once it no longer names them. ``keep``: how many, at least 1; one writer.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self._run = run
        self._keep = keep

    def add(self, engine: Engine, step: int) -> None:
        """The policy as it is now, after ``step`` optimizer steps. A step that is taken again gives the same files."""
        folder = self._run / ADAPTERS
        made = engine.save_adapter(folder)
        earlier = [one for one in sampled(self._run) if one[0] < step]
        kept = [*earlier, (step, made)][-self._keep :]
        write_json(folder / SAMPLED, {"kept": kept})
        named = {adapter for _, adapter in kept}
        for old in [path for path in folder.iterdir() if path.is_dir() and path.name not in named]:
            shutil.rmtree(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
