"""How far the engine's log-probabilities are from the trainer's: what runs measured, as metrics and as a warning.

Kept for what each policy's newest measuring run started from, and for its own rollouts: two versions a policy, so that
the metrics' labels stay few however many adapters come and go.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Any

from everloop.event import BASE
from prometheus_client import Gauge

logger = logging.getLogger(__name__)
ROLLOUTS = "rollouts"
LABELS = ("policy", "version")
GAUGES = {
    "mean": Gauge("everloop_learner_logprob_mismatch_mean_nats", "Mean absolute difference a token", LABELS),
    "p99": Gauge("everloop_learner_logprob_mismatch_p99_nats", "99th percentile of the absolute difference", LABELS),
    "kl": Gauge("everloop_learner_logprob_mismatch_kl_nats", "KL(engine || trainer) a token, estimator k3", LABELS),
}


class Mismatches:
    """By policy. ``limit`` gives the mean above which a policy ("tenant", "policy") is warned about. Thread-safe."""

    def __init__(self, limit: Callable[[str, str], float]) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._shown: dict[str, dict[str, Any]] = {}
        self._labels: dict[str, set[str]] = {}

    def take(self, key: str, run: dict[str, Any]) -> None:
        """Note what a run that ended (fields of ``everloop.run.Run``) measured; one that measured nothing is passed
        over, and so is one that was taken before."""
        measured = {
            version: {name: _number(run["metrics"].get(f"mismatch_{what}_{name}")) for name in ("tokens", *GAUGES)}
            for what, version in (("calls", _short(run["parent"])), (ROLLOUTS, ROLLOUTS))
            if f"mismatch_{what}_mean" in run["metrics"]
        }
        with self._lock:
            held = self._shown.get(key)
            if not measured or (held is not None and held["run"] == run["id"]):
                return
            for version in self._labels.get(key, set()) - measured.keys():
                for gauge in GAUGES.values():
                    gauge.remove(key, version)
            self._labels[key] = set(measured)
            for version, its in measured.items():
                for name, gauge in GAUGES.items():
                    gauge.labels(key, version).set(its[name])
            self._shown[key] = self._told(key, run["id"], measured)

    def _told(self, key: str, run: str, measured: dict[str, dict[str, float]]) -> dict[str, Any]:
        tenant, _, policy = key.partition("/")
        limit = self._limit(tenant, policy)
        says = "; ".join(_sentence(version, its) for version, its in measured.items())
        above = [version for version, its in measured.items() if not its["mean"] <= limit]  # also nan
        if above:
            says += (
                f". WARNING: above train.max_mismatch ({limit:g}) for {', '.join(above)}: what is sampled is not what "
                "is trained; look at the engine's precision (serving.vllm.dtype), template and adapter files"
            )
            logger.warning("%s: run %s: %s", key, run, says)
        return {"run": run, "says": says, "versions": measured, "above": above, "limit": limit}

    def shown(self, key: str) -> dict[str, Any] | None:
        with self._lock:
            return self._shown.get(key)


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # JSON has no nan


def _short(version: str) -> str:
    return version if version == BASE else version[:12]


def _sentence(version: str, its: dict[str, float]) -> str:
    whose = "of the run's own rollouts" if version == ROLLOUTS else f"of calls that {version} answered"
    return (
        f"{whose} sampler and trainer differ by {its['mean']:.2g} nats a token on the mean, {its['p99']:.2g} at the "
        f"99th percentile, KL {its['kl']:.2g} ({its['tokens']:,.0f} tokens)"
    )
