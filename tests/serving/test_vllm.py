"""A real vLLM: it computes what the trainer computes, the gateway records what it says, and it comes back when it dies.

Equality is of log-probabilities of tokens that vLLM itself sampled, as PPO reads them.
"""

from __future__ import annotations

import asyncio
import copy
import os
import shutil
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from everloop.config import Config
from everloop.event import Event
from everloop.home import Home
from everloop.log import open_log
from everloop.serving.base import Serving
from everloop.wire import decode

from services.gateway.app import Gateway
from tests.conftest import random_adapter
from tests.engines import EngineProcess
from trainer.policy import lora
from trainer.policy.base import Policy

pytestmark = [pytest.mark.models, pytest.mark.processes, pytest.mark.vllm]
BOUND = 1e-3  # nats, at the 99th percentile, in float32
SLOTS = 6  # of adapters: serving.resident_adapters as it is by default
CLEARLY = 20 * BOUND
TEXTS = [
    f"where is my card number {at}, and who can block it" for at in range(5)
]  # with three models at once within its room


def differences(model: Any, answers: Sequence[dict[str, Any]]) -> torch.Tensor:
    """|log-probability that the engine gave - the model's own| of every sampled token."""
    return torch.cat([_of_one(model, answer) for answer in answers])


@torch.no_grad()
def _of_one(model: Any, answer: dict[str, Any]) -> torch.Tensor:
    (choice,) = answer["choices"]
    prompt, ids = answer["prompt_token_ids"], choice["token_ids"]
    said = torch.tensor([token["logprob"] for token in choice["logprobs"]["content"]])
    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return (logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0] - said).abs()


def worst(found: torch.Tensor) -> float:
    return float(found.quantile(0.99))


async def sampled(serving: Serving, model: str) -> list[dict[str, Any]]:
    asked = {"model": model, "max_tokens": 40, "return_token_ids": True, "logprobs": True, "temperature": 1.0}
    bodies = [{**asked, "messages": [{"role": "user", "content": text}], "seed": at} for at, text in enumerate(TEXTS)]
    return list(await asyncio.gather(*(serving.complete("chat/completions", body) for body in bodies)))


@pytest.fixture
async def serving(vllm_engine: EngineProcess) -> AsyncIterator[Serving]:
    made = await vllm_engine.opened()
    yield made
    await made.close()


async def test_it_computes_what_the_trainer_computes_with_base_and_adapters_side_by_side(
    vllm_engine: EngineProcess, serving: Serving, policy: Policy, on_attention: list[Path], tmp_path: Path
) -> None:
    """And the bound would not hold with the adapter dropped, with the other one, or with one of its modules ignored.

    So it is when more adapters have been loaded than there are slots: in the last one lies somebody's weights.
    """
    for seed in range(SLOTS):
        passing = random_adapter(policy, tmp_path, ("attention",), 10 + seed)
        await serving.load(passing.name, copied(passing, vllm_engine))
        await serving.complete("completions", {"model": passing.name, "prompt": "Hello", "max_tokens": 1})
        await serving.unload(passing.name)
    for adapter in on_attention:
        await serving.load(adapter.name, copied(adapter, vllm_engine))
    names = [str(vllm_engine.base), *(adapter.name for adapter in on_attention)]
    models = [policy.model, *(lora.merged(policy, adapter) for adapter in on_attention)]
    said = await asyncio.gather(*(sampled(serving, name) for name in names))
    found = [[worst(differences(model, answers)) for model in models] for answers in said]
    for at, row in enumerate(found):
        assert row[at] <= BOUND, found
        assert min(each for other, each in enumerate(row) if other != at) > CLEARLY, found
    for leaf in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"):
        ignored = without(policy, models[1], leaf)
        assert worst(differences(ignored, said[1])) > CLEARLY, leaf
    for adapter in on_attention:
        await serving.unload(adapter.name)


async def test_positions_matter_to_these_models(policy: Policy, on_attention: list[Path]) -> None:
    """Else the test above would not see positions that are computed wrongly, as the CPU's own kernel does."""
    adapted = lora.merged(policy, on_attention[0])
    prompt = policy.encode_chat([{"role": "user", "content": TEXTS[0]}])
    straight = torch.arange(len(prompt))[None]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        right, wrong = (adapted(input_ids=ids, position_ids=straight * pace).logits for pace in (1, 2))
    assert (right.log_softmax(-1) - wrong.log_softmax(-1)).abs().max() > CLEARLY


def copied(adapter: Path, engine: EngineProcess) -> Path:
    """The adapter in the engine's home."""
    return shutil.copytree(adapter, engine.home / "adapters" / adapter.name, dirs_exist_ok=True)


def without(policy: Policy, adapted: Any, leaf: str) -> Any:
    """An adapted model whose weights of this name are the base's."""
    changed = copy.deepcopy(adapted)
    base = dict(policy.model.named_parameters())
    for name, parameter in changed.named_parameters():
        if name.endswith(f"{leaf}.weight"):
            parameter.data = base[name].data
    return changed


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
async def test_the_gateway_records_ids_and_log_probabilities_that_agree(
    vllm_engine: EngineProcess, serving: Serving, home: Home, route: str, stream: bool
) -> None:
    config = Config.model_validate(
        {"home": home.root, "tenants": {"bank": {"policies": {"assistant": {"base": str(vllm_engine.base)}}}}}
    )
    log = open_log(config)
    gateway = Gateway(config, home, log, serving)
    gateway.prepare()
    app = web.Application()
    gateway.add_to(app)
    async with TestClient(TestServer(app)) as client:
        asked = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in route else {"prompt": "hello"}
        body = {"model": "assistant", "max_tokens": 9, "stream": stream, **asked}
        key = {"Authorization": f"Bearer {gateway.keys.create('bank')}"}
        async with client.post(f"/v1/{route}", json=body, headers=key) as answer:
            assert answer.status == 200
            await answer.read()
    records = [r for part in range(log.partitions("events")) for r in log.read("events", part, 0, 10)]
    gateway.close()
    (tokens,) = [decode(Event, record.value or b"", home.blobs).payload.tokens for record in records]
    assert tokens.checked
    assert tokens.mode == "processed"
    assert len(tokens.prompt) > 0
    assert 1 <= len(tokens.completion) == len(tokens.logprobs) <= 9


async def test_it_says_how_it_is_and_comes_back_without_its_adapters_when_it_was_killed(
    vllm_engine: EngineProcess, on_attention: list[Path]
) -> None:
    """What starts it again here is the supervisor elsewhere: the engine's process ends with its vLLM."""
    status = vllm_engine.status()
    assert (status["base"], status["adapter_targets"]) == (str(vllm_engine.base), ["attention"])
    first = await vllm_engine.opened()
    folder = copied(on_attention[0], vllm_engine)
    await first.load(folder.name, folder)
    process = vllm_engine.process
    assert process is not None
    os.kill(status["pid"], signal.SIGKILL)
    assert await asyncio.to_thread(process.wait, 30) == 1
    vllm_engine.kill()
    assert not await first.healthy()
    await first.close()
    await asyncio.to_thread(vllm_engine.start, 600)
    again = await vllm_engine.opened()
    assert await again.adapters() == frozenset()
    await again.load(folder.name, folder)
    assert (await sampled(again, folder.name))[0]["choices"]
    await again.unload(folder.name)
    await again.close()
