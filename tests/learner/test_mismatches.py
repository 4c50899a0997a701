"""What runs measured of engine against trainer: shown, counted by few labels, warned about above the limit."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from everloop.run import Run, RunState
from prometheus_client import REGISTRY

from services.learner.mismatches import Mismatches


def run(id: str, parent: str, **means: float | None) -> dict[str, Any]:
    metrics = {
        f"mismatch_{what}_{name}": value
        for what, mean in means.items()
        for name, value in (("tokens", 100.0), ("mean", mean), ("p99", 2 * (mean or 0)), ("kl", 0.0))
    }
    its = {"tenant": "bank", "policy": "mismatched", "state": RunState.PUBLISHED, "batch": "b", "time": 1.0}
    return Run(id=id, parent=parent, **its).model_dump(mode="json") | {"metrics": metrics}


def labels() -> dict[str, float]:
    return {
        sample.labels["version"]: sample.value
        for family in REGISTRY.collect()
        if family.name == "everloop_learner_logprob_mismatch_mean_nats"
        for sample in family.samples
        if sample.labels["policy"] == "bank/mismatched"
    }


def test_the_newest_measure_of_a_policy_is_shown_and_no_label_stays_behind(caplog: pytest.LogCaptureFixture) -> None:
    known = Mismatches(lambda tenant, policy: 0.05)
    with caplog.at_level(logging.WARNING):
        known.take("bank/mismatched", run("run_0", "base"))
        assert known.shown("bank/mismatched") is None
        known.take("bank/mismatched", run("run_1", "base", calls=1e-6, rollouts=2e-6))
        assert labels() == {"base": 1e-6, "rollouts": 2e-6}
        known.take("bank/mismatched", run("run_2", "a" * 32, calls=0.01))
        assert labels() == {"a" * 12: 0.01}
        known.take("bank/mismatched", run("run_3", "base"))
        assert labels() == {"a" * 12: 0.01}, "a run without a call of its parent's measured nothing"
    shown = known.shown("bank/mismatched")
    assert shown is not None
    assert (shown["run"], shown["above"]) == ("run_2", [])
    assert "0.01 nats a token on the mean" in shown["says"]
    assert not caplog.records


@pytest.mark.parametrize("mean", [0.2, None])
def test_above_the_limit_there_is_one_warning(caplog: pytest.LogCaptureFixture, mean: float | None) -> None:
    known = Mismatches(lambda tenant, policy: 0.05)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            known.take("bank/mismatched", run("run_4", "base", calls=mean))
    shown = known.shown("bank/mismatched")
    assert shown is not None
    assert shown["above"] == ["base"]
    assert "WARNING: above train.max_mismatch (0.05) for base" in shown["says"]
    assert len(caplog.records) == 1
