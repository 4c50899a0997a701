"""Fresh rollouts in the store: what a policy in training answered, and what the reward model said of it.

They lie in a table of their own, all of them marked synthetic. So they can be queried beside what people saw, and
nothing that reads episodes, turns or trajectories (batches, the reward model, gates, canaries, exports) can take
them for it. The trainer writes each round as one file, whole, before the round uses it; a round that is drawn
again after a kill is the same file again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from pipelines.archive import folder_of, write
from pipelines.rows import Row
from pipelines.tables import ROLLOUTS, day_of


class Round(NamedTuple):
    """What all rollouts of a round share.

    ``policy_version``: who answered, the parent's name as long as no step was taken, then ``<run>@<steps>``.
    ``time``: when the run was asked for, seconds since 1970; it also names the day that the file lies under.
    """

    tenant: str
    policy: str
    run: str
    round: int
    steps: int
    parent: str
    batch: str
    reward_version: str
    time: float

    @property
    def policy_version(self) -> str:
        return f"{self.run}@{self.steps}" if self.steps else self.parent


def keep(store: Path, drawn: Round, rollouts: Iterable[Row]) -> Path:
    """Write a round's rollouts to the store below ``store``; durable on return. Returns the file.

    ``rollouts`` bring what a round does not say of them: the other columns of the table, but for ``number``.
    """
    shared = {**drawn._asdict(), "policy_version": drawn.policy_version, "synthetic": True}
    rows = [{**rollout, **shared, "number": number} for number, rollout in enumerate(rollouts)]
    folder = folder_of(store, ROLLOUTS.name, drawn.tenant, day_of(drawn.time))
    path = folder / f"{drawn.run}-{drawn.round}.parquet"
    write(pa.Table.from_pylist(rows, schema=ROLLOUTS.schema), path, {})
    return path
