"""A run's result into the registry, step by step, each of which may be done again after a kill:

1. the run: parameters, curves, lineage and the adapter's files; found again by its id
2. the adapter, registered as ``models:/<tenant>.<policy>/<n>``; found again by its hash
3. the :class:`Adapter` for the log, which the caller appends: only then does anybody hear of it

The files lie in ``adapters/<hash>`` since the end of training, written whole before they got that name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from everloop.registry import ADAPTER_FILES, Registry
from everloop.release import Adapter
from everloop.run import Run

from trainer.request import Request, Trained


def publish(registry: Registry, run: Run, request: Request, trained: Trained, now: float) -> Adapter:
    """Steps 1 and 2; returns what to announce.

    Raises:
        RegistryError: the registry does not answer; nothing was announced, try again.
    """
    registry_run = log(registry, run, request, trained, now)
    lineage = {"everloop.run": run.id, "everloop.batch": run.batch, "everloop.parent": run.parent}
    uri = registry.register(run.tenant, run.policy, registry_run=registry_run, content=trained.adapter, tags=lineage)
    return Adapter(
        hash=trained.adapter,
        tenant=run.tenant,
        policy=run.policy,
        base=request.base,
        parent=run.parent,
        run=run.id,
        batch=run.batch,
        uri=uri,
        registry_run=registry_run,
        rank=int(request.recipe["adapter"]["rank"]),
        targets=tuple(request.recipe["adapter"]["targets"]),
        seed=run.seed,
        metrics=trained.metrics,
        time=now,
    )


def log(registry: Registry, run: Run, request: Request, trained: Trained, now: float) -> str:
    """Step 1; the registry's id of the run."""
    recipe = flat(request.recipe)
    params = {
        "recipe": recipe.pop("name"),
        **recipe,
        "seed": run.seed,
        "base": request.base,
        "threads": request.threads,
    }
    tags = {
        "everloop.adapter": trained.adapter,
        "everloop.batch": run.batch,
        "everloop.parent": run.parent,
        "everloop.reward": Path(request.reward).name if request.reward else "",
        "everloop.trigger": run.trigger,
    }
    return registry.log_run(
        run.tenant,
        run.policy,
        run.id,
        title=f"{trained.adapter[:8]} seed {run.seed}",  # short: a list of runs has room for 18 letters
        took=(run.time, now),
        batch=run.batch,
        params=params,
        curves=trained.curves,
        results=trained.metrics,
        tags=tags,
        files={ADAPTER_FILES: Path(request.adapters) / trained.adapter},
    )


def flat(fields: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``table.key``, the form that MLflow compares runs by."""
    found: dict[str, str] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return found
