"""What ``/status`` and ``/metrics`` of the learner show. Written by the runner's thread, read by any.

``/status`` has, under ``policies`` by ``tenant/policy``:

- ``paused``; ``live``: the version that the next run starts from
- ``running``: the run under way with its phase, step and newest metrics; null: none
- ``last_run``: the newest run that ended: id, state, reason, adapter, metrics, seconds
- ``mismatch``: how far engine and trainer were apart in the newest run that could measure it; null: none could
- ``waits_for``: one sentence; ``numbers``: those in it

and under ``commands`` what became of orders, by id.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from everloop.home import Home
from everloop.run import Run, RunState
from prometheus_client import Counter, Gauge

from services.learner.facts import Facts, run_order
from services.learner.mismatches import Mismatches
from services.learner.triggers import Due, Waiting

REMEMBERED = 200
RUNS = Counter("everloop_learner_runs", "Training runs that ended", ["policy", "state"])
STEPS = Counter("everloop_learner_steps", "Optimizer steps of runs that ended", ["policy"])
ROLLOUTS = Counter("everloop_learner_rollouts", "Fresh answers sampled by runs that ended", ["policy"])
SECONDS = Gauge("everloop_learner_run_seconds", "Training time of the last run", ["policy"])
KL = Gauge("everloop_learner_kl_base_nats", "KL to the base a token, at the end of the last run", ["policy"])
REWARD = Gauge("everloop_learner_rollout_reward", "Mean reward of the last run's rollouts, -1 to 1", ["policy"])
RUNNING = Gauge("everloop_learner_running", "1 while a run is under way", ["policy"])
SCORED = Gauge("everloop_learner_new_episodes", "Scored episodes since the last run started", ["policy"])


FROZEN = Counter("everloop_learner_overoptimised", "Times that training was paused for over-optimisation", ["policy"])


class Board:
    """The newest word on each policy."""

    def __init__(self, home: Home, mismatches: Mismatches) -> None:
        self._home = home
        self.mismatches = mismatches
        self._lock = threading.Lock()
        self._policies: dict[str, dict[str, Any]] = {}
        self.commands: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def facts(self, key: str, facts: Facts, decision: Due | Waiting) -> None:
        """Between runs: what is known, and what is waited for."""
        SCORED.labels(key).set(facts.scored)
        changes = {"paused": facts.paused, "live": facts.live}
        if facts.run is not None and facts.run["state"] != RunState.RUNNING:
            changes["last_run"] = _brief(facts.run)
            self.mismatches.take(key, facts.run)
        with self._lock:
            self._policy(key).update(changes)
        if isinstance(decision, Waiting):
            self.waiting(key, decision)

    def frozen(self, key: str) -> None:
        FROZEN.labels(key).inc()

    def waiting(self, key: str, waiting: Waiting) -> None:
        with self._lock:
            self._policy(key).update(waits_for=waiting.sentence, numbers=waiting.numbers)

    def running(self, run: Run, *, resumed: bool = False) -> None:
        RUNNING.labels(run.key).set(1)
        shown = {"run": run.id, "trigger": run.trigger, "batch": run.batch, "parent": run.parent, "since": run.time}
        with self._lock:
            self._policy(run.key).update(running={**shown, "resumed": resumed}, waits_for="the run under way to end")

    def held_up(self, run: Run, why: str) -> None:
        with self._lock:
            self._policy(run.key)["waits_for"] = f"the registry, to publish run {run.id}: {why}"

    def ended(self, run: Run) -> None:
        RUNNING.labels(run.key).set(0)
        RUNS.labels(run.key, run.state.value).inc()
        STEPS.labels(run.key).inc(run.metrics.get("steps", 0))
        ROLLOUTS.labels(run.key).inc(run.metrics.get("rollouts", 0))
        for gauge, name in ((SECONDS, "seconds"), (KL, "kl"), (REWARD, "rollout_reward")):
            if name in run.metrics:
                gauge.labels(run.key).set(run.metrics[name])
        with self._lock:
            self._policy(run.key).update(running=None, last_run=_brief(run.model_dump(mode="json")))
            self.mismatches.take(run.key, run.model_dump(mode="json"))
            if run_order(run) is not None:
                self._answer(run)

    def _answer(self, run: Run) -> None:
        failed = run.state is RunState.FAILED
        self.commands[str(run_order(run))] = {"done": not failed, "says": run.reason, "run": run.id}
        while len(self.commands) > REMEMBERED:
            self.commands.popitem(last=False)

    def policies(self) -> dict[str, Any]:
        """A copy, the run under way with how far it is."""
        with self._lock:
            shown = {key: dict(policy) for key, policy in self._policies.items()}
        for key, policy in shown.items():
            policy["mismatch"] = self.mismatches.shown(key)
            if policy["running"] is not None:
                policy["running"] = {**policy["running"], **self._progress(policy["running"]["run"])}
        return shown

    def _progress(self, run: str) -> dict[str, Any]:
        path = Path(self._home.root) / "runs" / run / "progress.json"
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError):
            return {"phase": "starting"}

    def _policy(self, key: str) -> dict[str, Any]:
        fresh = {
            "paused": False,
            "live": "base",
            "running": None,
            "last_run": None,
            "waits_for": "Ray to start",
            "numbers": {},
        }
        return self._policies.setdefault(key, fresh)


def _brief(run: dict[str, Any]) -> dict[str, Any]:
    names = ("id", "state", "reason", "trigger", "adapter", "parent", "batch", "seed", "metrics", "time")
    return {name: run[name] for name in names}
