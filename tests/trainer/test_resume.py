"""A run in a process of its own, killed in the middle of a step, ends with the weights of one left in peace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.batch import Batch, BatchItem
from trainer import recipe
from trainer.policy import lora
from trainer.policy.base import Policy
from trainer.request import Request, Trained, sampled

pytestmark = pytest.mark.models
TRAIN = """
import sys
from pathlib import Path
from trainer.learner import Learner
from trainer.request import Request
print(Learner().train(Request.load(Path(sys.argv[1]))).adapter, flush=True)
"""
SLOW = """
import time
from trainer.engine_torch import TorchEngine
step = TorchEngine.step
def slow(self, *arguments):
    steps = getattr(self, "steps", 0)
    self.steps = steps + 1
    if steps == 3:
        Path(sys.argv[2]).touch()
        time.sleep(600)
    return step(self, *arguments)
TorchEngine.step = slow
"""


def batch(policy: Policy, folder: Path) -> Path:
    items = []
    for i in range(24):
        prompt = policy.encode_chat([{"role": "user", "content": f"my thing {i} is gone"}])
        answer = policy.encode_answer(["lost_card", "refund"][i % 2])
        items.append(
            BatchItem(
                episode=f"e{i}",
                version=1,
                call=f"c{i}",
                subject=None,
                prompt_messages=[{"role": "user", "content": f"my thing {i} is gone"}],
                answer=["lost_card", "refund"][i % 2],
                correction="stolen_card" if i % 5 == 0 else None,
                reward=[0.8, -0.8][i % 2],
                mask=True,
                source="feedback",
                label=[1.0, 0.0][i % 2],
                tokens=np.asarray([*prompt, *answer], np.int32),
                logprobs=np.asarray([0.0] * len(prompt) + [-1.0] * len(answer), np.float32),
                span=(len(prompt), len(prompt) + len(answer)),
                policy_version="base",
                temperature=1.0,
                trainable=True,
                turn=0,
                turns=1,
            )
        )
    return Batch("t", "p", "", items).save(folder)


def request(policy: Policy, folder: Path, name: str) -> Request:
    fields = {
        "name": "test",
        "checkpoint_every": 2,
        "reward": {"source": "feedback"},
        "adapter": {"rank": 2},
        "optimizer": {"minibatch": 8, "epochs": 2},
    }
    asked = Request(
        run=name,
        folder=str(folder / name),
        adapters=str(folder / f"{name}-adapters"),
        base=str(policy.folder),
        cache=str(folder),
        batch=str(batch(policy, folder)),
        recipe=recipe.parse(fields, "test").model_dump(),
        seed=5,
        samples=2,
    )
    asked.save()
    return asked


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_killed_in_a_step_it_goes_on_to_the_same_weights(policy: Policy, tmp_path: Path, until: Callable[..., object]):
    asked, left_alone = request(policy, tmp_path, "killed"), request(policy, tmp_path, "undisturbed")
    in_a_step = tmp_path / "in-a-step"
    head, tail = TRAIN.split("print(")
    process = start(head + SLOW + "print(" + tail, asked.folder, str(in_a_step))
    until(in_a_step.exists, deadline=60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Trained.load(Path(asked.folder)) is None
    assert not Path(asked.adapters).exists()
    first, second = start(TRAIN, asked.folder), start(TRAIN, left_alone.folder)
    names = [process.communicate(timeout=120)[0].strip() for process in (first, second)]
    assert names[0] == names[1] != ""
    done = [Trained.load(Path(one.folder)) for one in (asked, left_alone)]
    assert done[0] is not None
    assert done[1] is not None
    assert done[0].curves == done[1].curves
    assert done[0].metrics["steps"] == 6
    assert (Path(asked.adapters) / names[0]).is_dir()
    kept = [sampled(Path(one.folder)) for one in (asked, left_alone)]
    assert kept[0] == kept[1]
    assert [step for step, _ in kept[0]] == [4, 6], "the newest two, of one each second step"
    assert kept[0][-1][1] == names[0]
    for one in (asked, left_alone):
        folders = [path for path in (Path(one.folder) / "adapters").iterdir() if path.is_dir()]
        assert {path.name for path in folders} == {adapter for _, adapter in kept[0]}
        for path in folders:
            lora.check(path, policy, expected_hash=path.name)


def test_a_run_that_is_done_gives_its_result_again(policy: Policy, tmp_path: Path):
    from trainer.learner import Learner

    asked = request(policy, tmp_path, "once")
    learner = Learner()
    done = learner.train(asked)
    (Path(asked.folder) / "round-0.parquet").unlink()
    assert learner.train(asked) == done
    assert done.metrics["mismatch_calls_tokens"] > 0
    assert done.metrics["mismatch_calls_mean"] > 0.01, "this batch's log-probabilities are made up"
    other = learner.train(replace(request(policy, tmp_path, "other"), seed=6))
    assert other.adapter != done.adapter


def test_a_file_of_ones_own_changes_the_algorithm(policy: Policy, tmp_path: Path):
    from trainer import algorithm
    from trainer.learner import Learner

    mine = tmp_path / "mine.py"
    mine.write_text(Path(algorithm.__file__).read_text().replace("* 0.5 * (1 + math.cos", "* 0.25 * (1 + math.cos"))
    asked = request(policy, tmp_path, "mine")
    with_mine = replace(asked, recipe={**asked.recipe, "algorithm": str(mine)})
    plain = request(policy, tmp_path, "plain")
    assert Learner().train(with_mine).adapter != Learner().train(plain).adapter
