"""What an earlier run of a batch began from, so that ordering the batch again repeats that run whatever is live now.

The earlier run's ``request.json`` holds it: parent, value head, judge, recent versions, encoder, threads, and the
recipe with its numbers as they were. Where one of the files that it names is gone the repeat is refused: it would end
in another adapter, and nobody would know.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from everloop.errors import NotEnoughData
from everloop.home import Home
from everloop.run import Run

from trainer.request import REQUEST, Request

RUN = "run.json"
START = ("base", "recipe", "parent", "value_head", "reward", "encoder", "recent", "threads", "max_tokens")
"""What decides, beside batch and seed, which adapter a run ends in: fields of a request."""


class Earlier(NamedTuple):
    """A run that learned from a batch, and what it was asked."""

    run: Run
    request: Request

    def start(self) -> dict[str, Any]:
        return {name: getattr(self.request, name) for name in START}


def earlier(home: Home, tenant: str, policy: str, batch: str, seed: int) -> Earlier | None:
    """The run to repeat: the newest of this batch with this seed, else with any; None: none is known here.

    Raises NotEnoughData where a file that it began from is gone.
    """
    its = [run for run in kept(home) if (run.tenant, run.policy, run.batch) == (tenant, policy, batch)]
    if not its:
        return None
    run = max(its, key=lambda run: (run.seed == seed, run.time))
    request = Request.load(home.folder("runs", run.id))
    gone = list(_gone(request))
    if gone:
        raise NotEnoughData(
            f"run {run.id} of batch {batch} cannot be repeated: gone are {' and '.join(gone)}. Put back what is gone, "
            "or train on new episodes: everloop retrain without --batch"
        )
    return Earlier(run, request)


def kept(home: Home) -> list[Run]:
    """Every run whose request and state lie in this home, in no order."""
    files = home.folder("runs").glob(f"*/{RUN}")
    return [Run.model_validate_json(path.read_text()) for path in files if path.with_name(REQUEST).exists()]


def _gone(request: Request) -> Iterator[str]:
    if request.parent is not None and not Path(request.parent).is_dir():
        yield f"the adapter that it began from ({request.parent})"
    if request.value_head is not None and not Path(request.value_head).is_file():
        yield f"the value head that it began from ({request.value_head})"
    judged = request.recipe.get("reward", {}).get("source") == "model"
    if judged and request.reward is not None and not (Path(request.reward) / "model.json").is_file():
        yield f"the reward model's snapshot that judged it ({request.reward})"
