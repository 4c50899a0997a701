"""Pinned batches by their ids: found, or refused with the ones there are."""

from __future__ import annotations

from pathlib import Path

from everloop.errors import NotEnoughData
from everloop.home import Home

SHOWN = 3


def pinned(home: Home, batch: str) -> Path:
    """The file of a batch that is pinned in this home. Raises NotEnoughData where there is none of that id."""
    folder = home.folder("batches")
    path = folder / f"{batch}.parquet"
    if path.parent == folder and path.is_file():
        return path
    newest = sorted(folder.glob("*.parquet"), key=lambda file: file.stat().st_mtime, reverse=True)[:SHOWN]
    listed = f"the newest are {', '.join(file.stem for file in newest)}" if newest else "there is none yet"
    raise NotEnoughData(
        f"there is no batch {batch!r} in {folder}: {listed}; 'everloop sql \"select id, batch, seed from runs\"' lists "
        "the batch of each run"
    )
