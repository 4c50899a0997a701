"""A run's rollouts in the store: every one that was drawn, before the first step, the same after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from everloop.config import RewardConfig

from pipelines.batch import Batch, BatchItem
from pipelines.store import Store
from reward.features import Example
from reward.model import Label, RewardModel
from trainer import recipe
from trainer.learner import Learner
from trainer.policy.base import Policy
from trainer.request import Request

pytestmark = pytest.mark.models
ANSWERS = ("lost_card", "refund")


def asked(number: int) -> str:
    return f"my thing {'abcdefgh'[number % 8] * (number // 8 + 1)} is gone"


def batch(policy: Policy) -> Batch:
    items = []
    for number in range(12):
        prompt = policy.encode_chat([{"role": "user", "content": asked(number)}])
        answer = policy.encode_answer(ANSWERS[number % 2])
        items.append(
            BatchItem(
                episode=f"e{number}",
                version=1,
                call=f"c{number}",
                subject=f"s{number}",
                prompt_messages=[{"role": "user", "content": asked(number)}],
                answer=ANSWERS[number % 2],
                correction="stolen_card",
                reward=0.0,
                mask=False,
                source="model",
                label=None,
                tokens=np.asarray([*prompt, *answer], np.int32),
                logprobs=np.zeros(len(prompt) + len(answer), np.float32),
                span=(len(prompt), len(prompt) + len(answer)),
                policy_version="base",
                temperature=1.0,
                trainable=True,
                turn=0,
                turns=1,
            )
        )
    return Batch("t", "p", "", items)


def judged_by(folder: Path, letters: Any) -> Path:
    model = RewardModel(RewardConfig(), letters)
    for number in range(40):
        example = Example(asked(number), ANSWERS[number % 2])
        model.learn([Label(f"l{number}", example, float(number % 2 == 0))])
    return folder / model.save(folder)


def request(policy: Policy, folder: Path, name: str, letters: Any) -> Request:
    fields = {
        "name": "test",
        "adapter": {"rank": 2},
        "rollouts": {"prompts": 8, "samples": 4, "max_tokens": 4},
        "optimizer": {"minibatch": 8, "epochs": 1, "rounds": 2},
    }
    made = Request(
        run=name,
        folder=str(folder / name),
        adapters=str(folder / "adapters"),
        base=str(policy.folder),
        cache=str(folder),
        batch=str(batch(policy).save(folder)),
        recipe=recipe.parse(fields, "test").model_dump(),
        seed=5,
        reward=str(judged_by(folder / "rewards", letters)),
        encoder="letters",
        store=str(folder / "store"),
        time=1_763_900_000.0,
    )
    made.save()
    return made


class Killed(BaseException):
    """As a kill: nothing catches it."""


def test_every_rollout_is_in_the_store_before_the_first_step(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, letters: Any
):
    learner, store = Learner(), Store(tmp_path / "store")
    learner.share(letters)
    given = request(policy, tmp_path, "run_1", letters)

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("trainer.engine_torch.TorchEngine.step", killed)
        with pytest.raises(Killed):
            learner.train(given)
    first = store.rows("SELECT * FROM rollouts ORDER BY number")
    assert sum(row["count"] for row in first) == 8 * 4
    assert {row["round"] for row in first} == {0}

    learner.train(given)
    rows = store.rows("SELECT * FROM rollouts ORDER BY round, number")
    assert rows[: len(first)] == first  # drawn once, and not again after the kill
    assert sum(row["count"] for row in rows) == 2 * 8 * 4
    assert {(row["round"], row["policy_version"], row["parent"]) for row in rows} == {
        (0, "base", "base"),
        (1, f"run_1@{rows[-1]['steps']}", "base"),
    }
    assert all(row["synthetic"] for row in rows)
    one = rows[0]
    assert (one["tenant"], one["policy"], one["run"], one["batch"]) == ("t", "p", "run_1", Path(given.batch).stem)
    assert one["reward_version"] == Path(str(given.reward)).name
    assert one["subject"] == "s" + one["episode"][1:]
    assert len(one["tokens"]) == len(one["logprobs"])
    assert store.rows("SELECT count(*) AS n FROM episodes") == [{"n": 0}]
