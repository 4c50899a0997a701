"""One training run from order to announcement, on disk and on the log. Steps, each safe to do again after a kill:

1. pin: select the batch, all opinions in it by one reward version, into ``batches/`` (or load the one that was asked
   for); choose parent and reward snapshot
2. write ``runs/<id>/request.json`` and ``runs/<id>/run.json``: from here on the run is resumed, never forgotten
3. append Run (running)
4. train on Ray, from the last checkpoint if there is one; append Checkpoints as they come
5. publish to the registry; the adapter lies in ``adapters/<hash>`` since the end of training
6. append Adapter, Run (published) and the last Checkpoints together: one append, so nobody sees one without the other
7. write ``runs/<id>/run.json`` (published): the run is over

Killed between 6 and 7, both records are appended again with the same ids and content, which changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from everloop import wire
from everloop.config import Config
from everloop.contract import Contract
from everloop.errors import AdapterRefused, ConfigError, ContractError, LogError
from everloop.event import BASE
from everloop.home import Home
from everloop.log.base import Log, NewRecord
from everloop.names import Checkpoint, Checkpoints
from everloop.registry import Registry
from everloop.release import Adapter
from everloop.run import Command, CommandKind, Run, RunState
from everloop.topics import ADAPTERS, CHECKPOINTS, PAUSES, RUNS

from pipelines.batch import Batch, newest_reward, select
from pipelines.gold import GoldSet
from pipelines.store import Store
from services.learner import repeats
from services.learner.facts import Facts
from services.learner.opinions import Estimator, rescoring
from services.learner.pinned import pinned
from services.learner.repeats import RUN
from services.learner.triggers import Due
from trainer import publish
from trainer import recipe as recipes
from trainer.policy import servable
from trainer.policy.servable import Servable
from trainer.request import VALUE_HEAD, Request, Trained, sampled

logger = logging.getLogger(__name__)
ENDED = (RunState.PUBLISHED, RunState.FINISHED, RunState.FAILED)


class Runs:
    """The runs of one installation. ``threads`` of torch for a run."""

    def __init__(self, config: Config, log: Log, registry: Registry, threads: int) -> None:
        self._config = config
        self._home = Home(config.home)
        self._log = log
        self._registry = registry
        self._threads = threads
        self._noted: dict[str, tuple[Checkpoint, ...]] = {}

    def begin(self, tenant: str, policy: str, due: Due, facts: Facts, now: float, ask: Estimator) -> Run:
        """Steps 1 to 3. ``ask`` is asked for opinions of the pinned reward version.

        Raises:
            NotEnoughData: the window holds less than a batch needs.
            ConfigError, RegistryError: the recipe is refused, or the parent's files cannot be had.
        """
        order = due.order or {}
        seed = self._seed(tenant, policy, order)
        again = self._earlier(tenant, policy, order, seed)
        recipe = self._recipe(tenant, policy) if again is None else {}
        batch = self._batch(tenant, policy, order, facts, ask)
        live = facts.live if again is None else again.run.parent
        run_id = _run_id(tenant, policy, batch.stem, seed, live, order.get("id") or str(now))
        start = self._start(tenant, policy, batch, recipe, facts) if again is None else again.start()
        request = Request(
            run=run_id,
            folder=str(self._home.folder("runs", run_id)),
            adapters=str(self._home.folder("adapters")),
            cache=str(self._config.cache.absolute()),
            batch=str(batch),
            seed=seed,
            store=str(self._home.folder("store")),
            time=now,
            samples=self._config.policy(tenant, policy).train.keep_checkpoints,
            **start,
        )
        request.save()
        run = Run(
            id=run_id,
            tenant=tenant,
            policy=policy,
            state=RunState.RUNNING,
            batch=batch.stem,
            seed=seed,
            parent=live,
            trigger=due.reason if again is None else f"{due.reason}, to repeat run {again.run.id}",
            publish=order.get("publish") is not False,
            time=now,
            **({"command": order["id"]} if order else {}),  # type: ignore[arg-type]
        )
        self._keep(run)
        self._append((RUNS.name, run))
        return run

    def refuse(self, tenant: str, policy: str, due: Due, facts: Facts, why: str, now: float) -> Run:
        """Answer an order that cannot become a run with a failed one, so that it is taken and its cause is told."""
        order = due.order or {}
        seed = self._seed(tenant, policy, order)
        run_id = _run_id(tenant, policy, "", seed, facts.live, str(order.get("id")))
        run = Run(
            id=run_id,
            tenant=tenant,
            policy=policy,
            state=RunState.FAILED,
            batch=str(order.get("batch") or ""),
            seed=seed,
            parent=facts.live,
            trigger=due.reason,
            reason=why,
            time=now,
            command=order.get("id"),  # type: ignore[call-arg]
        )
        self._append((RUNS.name, run))
        return run

    def _seed(self, tenant: str, policy: str, order: dict[str, Any]) -> int:
        """The order's; where it names none, the configuration's."""
        return int(order["seed"] if order.get("seed") is not None else self._config.policy(tenant, policy).train.seed)

    def _earlier(self, tenant: str, policy: str, order: dict[str, Any], seed: int) -> repeats.Earlier | None:
        """The run that an order asks to repeat; None: it names no batch, or one that no run is known of."""
        if order.get("batch") is None:
            return None
        return repeats.earlier(self._home, tenant, policy, str(order["batch"]), seed)

    def _start(self, tenant: str, policy: str, batch: Path, recipe: dict[str, Any], facts: Facts) -> dict[str, Any]:
        """What a run begins from today: the fields of a request that ``repeats.START`` names."""
        its = self._config.policy(tenant, policy)
        reward = self._reward(tenant, policy, batch, facts)
        return {
            "base": its.base,
            "recipe": recipe,
            "parent": self._continued(tenant, policy, self._parent(facts)),
            "value_head": self._value_head(facts),
            "reward": None if reward is None else str(reward),
            "encoder": its.reward.encoder,
            "recent": tuple(facts.lives[: its.train.max_lag + 1]),
            "threads": self._threads,
            "max_tokens": its.max_tokens,
        }

    def _recipe(self, tenant: str, policy: str) -> dict[str, Any]:
        """The policy's recipe, its adapter on no more than the engine can serve. Raises ConfigError."""
        recipe = recipes.load(self._config.policy(tenant, policy).train.recipe)
        can = self._servable(tenant, policy)
        left = servable.narrowed(recipe.adapter.targets, can)
        if left != recipe.adapter.targets:
            logger.info("adapters of %s/%s are trained on %s alone: %s", tenant, policy, ", ".join(left), can.why)
        adapter = recipe.adapter.model_copy(update={"targets": left})
        return recipe.model_copy(update={"adapter": adapter}).model_dump()

    def _servable(self, tenant: str, policy: str) -> Servable:
        def folder() -> Path:
            from trainer.policy import base

            return base.folder(self._config.policy(tenant, policy).base, self._config.cache.absolute())

        return servable.of(self._config.serving, folder)

    def pause(self, tenant: str, policy: str, why: str, about: str, now: float) -> None:
        """Order that no run and no canary starts until a person resumes; the same order for the same run's window."""
        pause = Command(
            id=f"overoptimised-{about}",
            kind=CommandKind.PAUSE,
            tenant=tenant,
            policy=policy,
            arguments={"reason": why},
            by="the learner",
            time=now,
        )
        self._append((PAUSES.name, pause))

    def under_way(self) -> list[Run]:
        """Runs that a kill interrupted, oldest first."""
        return sorted((run for run in repeats.kept(self._home) if run.state not in ENDED), key=lambda run: run.time)

    def finish(self, run: Run, now: float) -> Run:
        """Steps 5 to 7 for a run whose result is in its folder.

        Raises RegistryError where the registry does not answer: call again later.
        """
        folder = self._home.folder("runs", run.id)
        request, trained = Request.load(folder), Trained.load(folder)
        if trained is None:
            raise ContractError(f"run {run.id} has no result in {folder}: it is not done")
        metrics = {**trained.metrics, "kl": trained.metrics.get("kl_base", 0.0)}
        if not run.publish:
            publish.log(self._registry, run, request, trained, now)
            says = f"trained adapter {trained.adapter}, which was not to be published"
            return self._end(run, RunState.FINISHED, says, metrics, now, adapter=trained.adapter)
        adapter = publish.publish(self._registry, run, request, trained, now)
        says = f"registered adapter {adapter.hash} as {adapter.uri}"
        return self._end(run, RunState.PUBLISHED, says, metrics, now, adapter=adapter.hash, announce=adapter)

    def note_checkpoints(self, run: Run, now: float) -> None:
        """Announce what can be sampled from now, where that has changed. A log that is away is told of it later."""
        found = self._checkpoints(run, now, running=True)
        if found is None or found.kept == self._noted.get(run.id):
            return
        try:
            self._append((CHECKPOINTS.name, found))
        except LogError as error:
            logger.warning("the checkpoints of run %s could not be announced, and will be: %s", run.id, error)
            return
        self._noted[run.id] = found.kept

    def _checkpoints(self, run: Run, now: float, *, running: bool) -> Checkpoints | None:
        """None where the run has no files to sample from."""
        listed = sampled(self._home.root / "runs" / run.id)
        kept = tuple(Checkpoint(step=step, adapter=adapter) for step, adapter in listed)
        if not kept:
            return None
        return Checkpoints(run=run.id, tenant=run.tenant, policy=run.policy, kept=kept, running=running, time=now)

    def fail(self, run: Run, why: str, now: float) -> Run:
        """The run cannot go on; nothing of it is announced."""
        return self._end(run, RunState.FAILED, why, {}, now)

    def _end(
        self,
        run: Run,
        state: RunState,
        reason: str,
        metrics: dict[str, float],
        now: float,
        *,
        adapter: str | None = None,
        announce: Adapter | None = None,
    ) -> Run:
        ended = run.model_copy(
            update={
                "state": state,
                "step": run.step + 1,
                "reason": reason,
                "metrics": metrics,
                "adapter": adapter,
                "time": now,
            }
        )
        made: list[tuple[str, Contract]] = [(ADAPTERS.name, announce)] if announce is not None else []
        last = self._checkpoints(run, now, running=False)
        made += [] if last is None else [(CHECKPOINTS.name, last)]
        self._append(*made, (RUNS.name, ended))
        self._keep(ended)
        self._noted.pop(run.id, None)
        return ended

    def _batch(self, tenant: str, policy: str, order: dict[str, Any], facts: Facts, ask: Estimator) -> Path:
        """The pinned batch that is asked for, else a new one. A person may train on less than triggers wait for."""
        if order.get("batch") is not None:
            return pinned(self._home, str(order["batch"]))
        store = Store(self._home.root / "store", tenant=tenant, blobs=self._home.blobs)
        try:
            batch = self._selected(store, tenant, policy, facts, ask, least=1 if order else None)
            return batch.save(self._home.folder("batches"))
        finally:
            store.close()

    def _selected(
        self, store: Store, tenant: str, policy: str, facts: Facts, ask: Estimator, least: int | None
    ) -> Batch:
        its = self._config.policy(tenant, policy)
        version = facts.reward_version or newest_reward(store, tenant, policy)
        snapshot = self._snapshots(tenant, policy) / version
        whole = bool(version) and (snapshot / "model.json").exists()
        return select(
            store,
            tenant,
            policy,
            its.train,
            gold=GoldSet(self._home.root / "gold").keys(tenant, policy),
            reward_version=version,
            rescore=rescoring(store, tenant, policy, snapshot, its.reward, ask) if whole else None,
            minimum=least,
        )

    def _snapshots(self, tenant: str, policy: str) -> Path:
        return self._home.root / "rewards" / tenant / policy

    def _parent(self, facts: Facts) -> str | None:
        """The folder of the live adapter, fetched where it is not in the home; None: the base is live."""
        from trainer.policy.lora import content_hash

        if facts.live == BASE:
            return None
        here = self._home.root / "adapters" / facts.live
        if here.exists():
            return str(here)
        uri = facts.uris.get(facts.live)
        if uri is None:
            raise ConfigError(f"the live adapter {facts.live} is neither in {here} nor in the registry by its route")
        return str(self._registry.fetch(uri, facts.live, here.parent, content_hash))

    def _continued(self, tenant: str, policy: str, parent: str | None) -> str | None:
        """The parent, where the engine can serve what continues from it: a run keeps its parent's targets.

        Raises ConfigError where it cannot: the run would end with an adapter that nobody serves.
        """
        if parent is not None:
            try:
                servable.check(Path(parent), self._servable(tenant, policy))
            except AdapterRefused as error:
                raise ConfigError(f"{error}; or go back to the base: everloop release rollback") from None
        return parent

    def _value_head(self, facts: Facts) -> str | None:
        made_by = facts.runs.get(facts.live)
        kept = self._home.root / "runs" / str(made_by) / VALUE_HEAD
        return str(kept) if kept.exists() else None

    def _reward(self, tenant: str, policy: str, batch: Path, facts: Facts) -> Path | None:
        """The snapshot that scored the batch, kept with it; the newest where that one was pruned."""
        scored = Batch.load(batch).reward_version
        for folder in (self._snapshots(tenant, policy) / scored, self._home.root / facts.reward_path):
            if folder.name and (folder / "model.json").exists():
                return folder
        return None

    def _keep(self, run: Run) -> None:
        path = self._home.folder("runs", run.id) / RUN
        partial = path.with_name(f"{RUN}.{os.getpid()}.partial")
        with partial.open("w") as file:
            file.write(run.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)

    def _append(self, *made: tuple[str, Contract]) -> None:
        self._log.append([self._record(topic, contract) for topic, contract in made])

    def _record(self, topic: str, contract: Any) -> NewRecord:
        name = next(str(getattr(contract, field)) for field in ("id", "hash", "run") if hasattr(contract, field))
        headers = {"schema": type(contract).__name__, "id": name}
        return NewRecord(topic, contract.key, wire.encode(contract, self._home.blobs), headers, contract.time)


def _run_id(*parts: object) -> str:
    """The same for the same order: an order that is read twice is one run."""
    return "run_" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
