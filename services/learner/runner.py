"""The learner's loop: whose turn it is, one run at a time, every interrupted run first.

::

    handler thread: scores, routes, commands, … ──▶ facts ─┐                        (facts.py)
                                                           ▼
    runner thread:  Ray starts ─▶ interrupted runs ─▶ decide ─▶ begin ─▶ train ─▶ finish ─▶ log     (this file)
                                                      ▲                    │
    HTTP: /status, /metrics ◀── the board ◀───────────┴────────────────────┘

The runner waits for facts (it looks every half second), for Ray, and for the registry; nobody waits for the runner.
A registry that is down delays the announcement alone: the result stays in the run's folder and is tried again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from everloop.config import Config
from everloop.errors import EverloopError, LogError, NotEnoughData, RegistryError
from everloop.home import Home
from everloop.registry import Registry
from everloop.run import Run

from pipelines.overoptimise import Window, verdict
from reward.features import Example
from reward.model import Estimate
from services.learner.board import Board
from services.learner.facts import Facts, FactsHandler
from services.learner.runs import Runs
from services.learner.triggers import Due, Waiting, decide
from trainer.cluster import Cluster, Interrupted
from trainer.request import Request

logger = logging.getLogger(__name__)
LOOK_EVERY = 0.5
SHORT_OF_DATA = 15.0  # seconds before a batch that was too small is selected again
REGISTRY_PAUSE, LONGEST_PAUSE = 2.0, 60.0


class Runner:
    """Trains policies as their facts call for it. One instance works on a home; ``run`` is its thread."""

    def __init__(
        self,
        config: Config,
        facts: FactsHandler,
        runs: Runs,
        registry: Registry,
        cluster: Cluster,
        board: Board,
        stop: threading.Event,
        *,
        lag: Callable[[], int],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._facts, self._runs, self._registry = config, facts, runs, registry
        self._cluster, self._board, self._stop, self._lag, self._clock = cluster, board, stop, lag, clock
        self._not_before: dict[str, float] = {}
        self.ready = False

    def run(self) -> None:
        """Until ``stop`` is set."""
        threading.Thread(target=self._open_registry, name="registry", daemon=True).start()
        try:
            self._start()
            for run in self._runs.under_way():
                self._board.running(run, resumed=True)
                self._carry_through(run)
            while not self._stop.is_set():
                self._look()
                self._stop.wait(LOOK_EVERY)
        finally:
            self._cluster.close()

    def _start(self) -> None:
        """Ray, and in its worker what the first run needs; the log is read meanwhile."""
        self._cluster.start()
        warmed = {(p.base, p.reward.encoder) for p in (self._config.policy(*at) for at in self._config.policies())}
        for base, encoder in sorted(warmed):
            if not self._stop.is_set():
                self._cluster.warm(base, str(self._config.cache.absolute()), encoder)
        while self._lag() and not self._stop.is_set():
            self._stop.wait(0.1)
        self.ready = True

    def _open_registry(self) -> None:
        try:
            self._registry.open()
        except EverloopError as error:
            logger.warning("%s; runs go on, their adapters are published once it does", error)

    def _look(self) -> None:
        """Start what is due, one policy after the other; note what the others wait for."""
        for tenant, policy in self._config.policies():
            if self._stop.is_set():
                return
            key = f"{tenant}/{policy}"
            self._freeze(tenant, policy, self._facts.known(key))
            facts = self._facts.known(key)
            decision = decide(facts, self._config.policy(tenant, policy).train, self._clock())
            self._board.facts(key, facts, decision)
            if isinstance(decision, Due) and self._clock() >= self._not_before.get(key, 0.0):
                run = self._begin(tenant, policy, decision, facts)
                if run is not None:
                    self._carry_through(run)

    def _freeze(self, tenant: str, policy: str, facts: Facts) -> None:
        """Order a pause where the reward model is over-optimised; wait until it is noted, so that no run starts."""
        why = None if facts.paused else verdict([Window(*each) for each in facts.windows], since=facts.resumed)
        if why is None:
            return
        self._runs.pause(tenant, policy, why, facts.windows[-1][0], self._clock())
        logger.warning("%s/%s: no more runs: %s", tenant, policy, why)
        self._board.frozen(f"{tenant}/{policy}")
        while not self._stop.is_set() and not self._facts.known(f"{tenant}/{policy}").paused:
            self._stop.wait(0.05)

    def _begin(self, tenant: str, policy: str, due: Due, facts: Facts) -> Run | None:
        """None where it cannot start: an order is answered with the cause, a trigger is looked at again later."""
        key = f"{tenant}/{policy}"
        try:
            self._board.waiting(key, Waiting("the batch to be drawn, and scored by one reward version", {}))
            run = self._runs.begin(tenant, policy, due, facts, self._clock(), self._ask)
        except LogError:
            raise
        except Interrupted as error:
            logger.info("%s", error)
            return None
        except Exception as error:  # a bug of one policy's run must not keep the others from theirs
            logger.log(
                logging.INFO if isinstance(error, NotEnoughData) else logging.ERROR,
                "%s: no run: %s",
                key,
                error,
                exc_info=not isinstance(error, EverloopError),
            )
            self._not_before[key] = self._clock() + SHORT_OF_DATA
            self._board.waiting(key, Waiting(_why(error), {}))
            if due.order is not None and not isinstance(error, RegistryError):
                self._settled(self._runs.refuse(tenant, policy, due, facts, _why(error), self._clock()))
            return None
        logger.info("%s: run %s starts: %s", key, run.id, run.trigger)
        self._board.running(run)
        self._wait_until_noted(run)
        return run

    def _ask(self, snapshot: Path, encoder: str, examples: Sequence[Example]) -> list[Estimate]:
        return self._cluster.estimate(snapshot, encoder, examples, self._stop)

    def _carry_through(self, run: Run) -> None:
        """Train and publish, or fail; returns early where the service is asked to stop."""
        try:
            request = Request.load(Home(self._config.home).folder("runs", run.id))
            self._cluster.train(request, self._stop, lambda: self._runs.note_checkpoints(run, self._clock()))
            ended = self._published(run)
        except Interrupted as error:
            logger.info("%s", error)
            return
        except LogError:
            raise
        except Exception as error:  # a researcher's own algorithm raises anything; taken up again, it would again
            logger.exception("run %s failed", run.id)
            ended = self._runs.fail(run, f"{type(error).__name__}: {error}", self._clock())
        if ended is not None:
            self._settled(ended)

    def _published(self, run: Run) -> Run | None:
        """Into the registry, however long it is away; None where the service is asked to stop meanwhile."""
        pause = REGISTRY_PAUSE
        while not self._stop.is_set():
            try:
                return self._runs.finish(run, self._clock())
            except RegistryError as error:
                logger.warning("run %s is trained and waits for the registry: %s", run.id, error)
                self._board.held_up(run, str(error))
                self._stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        return None

    def _settled(self, run: Run) -> None:
        logger.info("%s: run %s is %s: %s", run.key, run.id, run.state.value, run.reason)
        self._board.ended(run)
        self._wait_until_noted(run)

    def _wait_until_noted(self, run: Run) -> None:
        """The next decision must know of this run: wait until the fold has read it back."""
        while not self._stop.is_set():
            noted = self._facts.known(run.key).run
            if noted is not None and noted["id"] == run.id and noted["step"] >= run.step:
                return
            self._stop.wait(0.05)


def _why(error: Exception) -> str:
    """An error in words: ours say it themselves, of any other the kind is needed too."""
    return str(error) if isinstance(error, EverloopError) else f"{type(error).__name__}: {error}"
