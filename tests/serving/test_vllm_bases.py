"""vLLM computes what the trainer computes for SmolLM2, on attention and dense layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import random_adapter
from trainer.policy import base, lora
from trainer.policy.base import Policy

pytestmark = [pytest.mark.models, pytest.mark.processes, pytest.mark.vllm]
TEXTS = ["Where is my card?", "Tell me of the sea.", "List three fruits.", "Who wrote Hamlet, and when was it?"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return base.load("smollm2", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3)])
def test_smollm2_with_adapters_is_the_trainers(smollm2: Policy, tmp_path: Path, dtype: str, bound: float) -> None:
    adapters = [random_adapter(smollm2, tmp_path, ("attention", "dense"), seed, size=0.02) for seed in (1, 2)]
    prompts = [smollm2.encode_chat([{"role": "user", "content": text}]) for text in TEXTS]
    job = {"base": str(smollm2.folder), "dtype": dtype, "adapters": [str(a) for a in adapters], "prompts": prompts}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "tests.serving.offline", str(tmp_path / "job.json"), str(tmp_path / "out.json")]
    subprocess.run(command, check=True)
    said = json.loads((tmp_path / "out.json").read_text())
    models = [smollm2.model, *(lora.merged(smollm2, adapter) for adapter in adapters)]
    found = [[worst(model, prompts, answers) for model in models] for answers in said]
    print(dtype, found)
    for at, row in enumerate(found):
        assert row[at] <= bound, found
        assert min(each for other, each in enumerate(row) if other != at) > 2 * bound, found


@torch.no_grad()
def worst(model: torch.nn.Module, prompts: list[list[int]], answers: list[list[list[float]]]) -> float:
    """The 99th percentile of |difference in log-probability| over all sampled tokens."""
    found = []
    for prompt, (ids, said) in zip(prompts, answers, strict=True):
        taken = torch.tensor(ids, dtype=torch.long)
        logits = model(input_ids=torch.tensor([[*prompt, *taken.tolist()]])).logits[0, len(prompt) - 1 : -1]
        found.append((logits.float().log_softmax(-1).gather(1, taken[:, None])[:, 0] - torch.tensor(said)).abs())
    return float(torch.cat(found).quantile(0.99))
