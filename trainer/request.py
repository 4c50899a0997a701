"""A run as it is asked for, and as it ended: JSON in the run's folder. Light, so that a service need not load torch.

A run's folder holds everything that it needs to go on after a kill, and nothing outside it changes while it runs::

    request.json            what was asked, with the whole recipe
    round-0.parquet …       the material of each round: what the steps read, also after a kill
    checkpoints/00000010/   engine state and position
    adapters/<hash>/        adapter files of the newest checkpoints, to sample from; sampled.json lists them
    progress.json           for status pages
    value_head.safetensors  for the run that continues from this one's adapter
    result.json             written last: the run is done
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from everloop.registry import Point

REQUEST, RESULT, PROGRESS = "request.json", "result.json", "progress.json"
ADAPTERS, SAMPLED = "adapters", "sampled.json"
VALUE_HEAD = "value_head.safetensors"


@dataclass(frozen=True)
class Request:
    """What a run needs to know. Paths are absolute.

    ``adapters``: where the adapter goes, as ``<adapters>/<content hash>``. ``recent``: policy versions within the
    lag cap; None: all are. ``threads`` of torch are part of the request, for the order of sums depends on them.
    ``reward``: folder of the snapshot that judges; None: there is none yet. ``store``: the store's folder, where fresh
    rollouts are kept before they are used; None: this run is nobody's (a benchmark's). ``time``: when it was asked for.
    ``max_tokens``: of an answer of the policy, where nobody says otherwise. ``samples``: of how many of the newest
    checkpoints the adapter files are kept, to sample from; 0: none.
    """

    run: str
    folder: str
    adapters: str
    base: str
    cache: str
    batch: str
    recipe: dict[str, Any]
    seed: int
    parent: str | None = None
    value_head: str | None = None
    reward: str | None = None
    encoder: str = "minilm"
    recent: tuple[str, ...] | None = None
    threads: int = 1
    store: str | None = None
    time: float = 0.0
    max_tokens: int = 256
    samples: int = 0

    def save(self) -> None:
        path = Path(self.folder) / REQUEST
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Request:
        fields = json.loads((folder / REQUEST).read_text())
        return cls(**{**fields, "recent": None if fields["recent"] is None else tuple(fields["recent"])})


@dataclass(frozen=True)
class Trained:
    """How a run ended. ``metrics``: means over the last quarter of the steps, and totals; ``curves``: every step."""

    adapter: str
    metrics: dict[str, float]
    curves: list[Point] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        write_json(folder / RESULT, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Trained | None:
        """None where the run is not done."""
        path = folder / RESULT
        if not path.exists():
            return None
        fields = json.loads(path.read_text())
        return cls(fields["adapter"], fields["metrics"], [Point(*point) for point in fields["curves"]])


def sampled(folder: Path) -> list[tuple[int, str]]:
    """(step, adapter) of the checkpoints that a run's folder has the adapter files of, oldest first."""
    try:
        listed = json.loads((folder / ADAPTERS / SAMPLED).read_text())
    except FileNotFoundError:
        return []
    return [(int(step), str(adapter)) for step, adapter in listed["kept"]]


def write_json(path: Path, fields: dict[str, Any], *, durable: bool = True) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        json.dump(fields, file)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    partial.rename(path)
