"""The reward models' numbers as Prometheus metrics, read from the handler's status when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

GAUGES = {
    "everloop_reward_auc": ("auc", "Predict-then-learn AUC over the recent window of labels"),
    "everloop_reward_calibration_error": ("calibration_error", "Expected calibration error over the same window"),
    "everloop_reward_mean": ("reward_mean", "Mean reward of the newest scored calls, -1 to 1"),
    "everloop_reward_fall": ("reward_fall", "Mean reward of the window before less that of the newest"),
    "everloop_reward_thumbs_up_share": ("thumbs_up_share", "Mean of the newest labels, 0 to 1"),
    "everloop_reward_success_estimate": (
        "success_estimate",
        "Mean of the newest labels, each for the calls that it stands for, 0 to 1",
    ),
    "everloop_reward_shadow_labels": ("shadow_labels", "Labels on which the next snapshot is judged beside this one"),
    "everloop_reward_known_answers": ("answers_known", "Recurring answers whose ratings are remembered"),
    "everloop_reward_frozen": ("frozen", "Whether opinions are kept from training, since something has drifted"),
}
COUNTERS = {
    "everloop_reward_updates": ("updates", "Labels and preferences that a reward model learned from"),
    "everloop_reward_snapshots_refused": ("snapshots_refused", "Snapshots that were refused"),
    "everloop_reward_snapshots_waited": ("snapshots_waited", "Snapshots that more labels, or a person, may let over"),
    "everloop_reward_refused": ("refused", "Labels that were not learned because they were not finite"),
    "everloop_reward_drifts_inputs": ("drift_inputs", "Times that what is asked has changed"),
    "everloop_reward_drifts_labels": ("drift_labels", "Times that how answers are rated has changed"),
    "everloop_reward_drifts_calibration": ("drift_calibration", "Times that what probabilities mean has changed"),
}
Status = Callable[[], dict[str, dict[str, Any]]]


class RewardMetrics(Collector):
    """One series for each configured policy; a number that is not known yet is left out."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """The label is the configured policy as ``tenant/policy``: as many as the configuration names."""
        desks = self._status()
        info = GaugeMetricFamily(
            "everloop_reward_version_info", "1 for the version that scores", labels=["policy", "version"]
        )
        for policy, numbers in desks.items():
            if numbers.get("version"):
                info.add_metric([policy, numbers["version"]], 1)
        yield info
        yield from _sources(desks)
        for family, names in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, (field, words) in names.items():
                metric = family(name, words, labels=["policy"])
                for policy, numbers in desks.items():
                    if numbers.get(field) is not None:
                        metric.add_metric([policy], numbers[field])
                yield metric


def _sources(desks: dict[str, dict[str, Any]]) -> Iterator[Metric]:
    """What each source's words weigh: as many series as sources were heard, 64 a policy at most."""
    weights = GaugeMetricFamily(
        "everloop_reward_source_weight",
        "Log-odds that a word of the source adds (up: a good one) or takes (down: a bad one)",
        labels=["policy", "source", "direction"],
    )
    words = GaugeMetricFamily(
        "everloop_reward_source_words",
        "Words of the source that others were compared with",
        labels=["policy", "source"],
    )
    for policy, numbers in desks.items():
        for source, its in (numbers.get("sources") or {}).items():
            for direction in ("up", "down"):
                weights.add_metric([policy, source, direction], its[direction])
            words.add_metric([policy, source], its["words"])
    yield weights
    yield words


class SaidMetrics(Collector):
    """What checks or judges said and how they failed: ``<prefix>_words`` by policy and source, ``<prefix>_failures`` by
    policy, source and failure. As many series as the declarations name sources."""

    def __init__(self, prefix: str, status: Status) -> None:
        self._prefix = prefix
        self._status = status

    def collect(self) -> Iterator[Metric]:
        words = CounterMetricFamily(
            f"{self._prefix}_words", "Words said of answers, taken back ones not included", labels=["policy", "source"]
        )
        failures = CounterMetricFamily(
            f"{self._prefix}_failures", "Answers without an opinion, by why", labels=["policy", "source", "failure"]
        )
        for policy, its in self._status().items():
            for source, count in its["words"].items():
                words.add_metric([policy, source], count)
            for name, count in its["failures"].items():
                failures.add_metric([policy, *name.split(" ", 1)], count)
        yield words
        yield failures
