"""The embedded engine's own promises: bounded queue, requests that leave, a broken model that harms no other."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import torch
from everloop.config import ServingConfig
from everloop.errors import Overloaded, ServingError
from everloop.event import Sampling

from trainer.policy.base import Policy
from trainer.rollout.embedded import EmbeddedServing
from trainer.rollout.running import Answer
from trainer.rollout.worker import Job, Worker

pytestmark = pytest.mark.models
CHAT = "chat/completions"


def ask(policy: Policy, **changes: object) -> dict:
    return {"model": policy.name, "messages": [{"role": "user", "content": "where is it"}], "max_tokens": 4, **changes}


def long_ask(policy: Policy, **changes: object) -> dict:
    """Greedy, this model says one word for ever."""
    return ask(policy, temperature=0, max_tokens=240, **changes)


@pytest.fixture
async def serving(policy: Policy) -> AsyncIterator[EmbeddedServing]:
    made = EmbeddedServing([policy], ServingConfig(max_batch=4, queue=4, threads=1))
    yield made
    await made.close()


async def until_counted(serving: EmbeddedServing, name: str, value: int) -> None:
    async with asyncio.timeout(30):
        while getattr(serving.counts, name) < value:
            await asyncio.sleep(0.005)


async def test_a_full_queue_refuses_and_recovers(serving: EmbeddedServing, policy: Policy) -> None:
    long = long_ask(policy, n=4)
    running = asyncio.create_task(serving.complete(CHAT, long))
    await until_counted(serving, "running", 4)
    waiting = [asyncio.create_task(serving.complete(CHAT, long)) for _ in range(4)]
    await until_counted(serving, "waiting", 4)
    with pytest.raises(Overloaded) as refused:
        await serving.complete(CHAT, ask(policy))
    assert refused.value.status == 429
    for task in (running, *waiting):
        task.cancel()
    await asyncio.gather(running, *waiting, return_exceptions=True)
    assert (await serving.complete(CHAT, ask(policy)))["choices"]
    assert serving.counts.refused == 1


async def test_who_leaves_stops_the_generation(serving: EmbeddedServing, policy: Policy) -> None:
    task = asyncio.create_task(serving.complete(CHAT, long_ask(policy, n=4)))
    await until_counted(serving, "running", 4)
    task.cancel()
    await until_counted(serving, "cancelled", 1)
    stream = serving.stream(CHAT, long_ask(policy))
    await anext(stream)
    await anext(stream)
    await stream.aclose()
    await until_counted(serving, "cancelled", 2)
    sampled = serving.counts.sampled_tokens
    await serving.complete(CHAT, ask(policy, max_tokens=1))
    assert serving.counts.sampled_tokens == sampled + 1
    assert all(resident.uses == 0 for resident in serving.residents.bases)


async def test_a_request_that_is_too_large_for_any_batch_is_refused(serving: EmbeddedServing, policy: Policy) -> None:
    with pytest.raises(ServingError, match="at most 4 answers") as refused:
        await serving.complete(CHAT, ask(policy, n=5))
    assert refused.value.status == 400


async def test_memory_is_bounded_by_what_answers_may_become(policy: Policy) -> None:
    worker = Worker(rows=64, queue=64, tokens=100)
    serving = EmbeddedServing([policy], ServingConfig(threads=1))
    resident = serving.residents.lease(policy.name)
    loop = asyncio.get_running_loop()
    jobs = []
    for _ in range(5):  # each may become 50 tokens long: two at a time
        answer = Answer((5,) * 10, Sampling(temperature=0), 40, frozenset(), random.Random(0))
        jobs.append(Job(resident, [answer], True, loop))
        worker.submit(jobs[-1])
    most = 0
    for job in jobs:
        while (await job.news.get()).finish is None:
            most = max(most, worker.counts.running)
    assert most == 2
    await asyncio.to_thread(worker.close)
    await serving.close()


async def test_a_seeded_answer_does_not_depend_on_the_batch(serving: EmbeddedServing, policy: Policy) -> None:
    seeded = ask(policy, seed=11, max_tokens=30, return_token_ids=True)
    alone = (await serving.complete(CHAT, seeded))["choices"][0]["token_ids"]
    noise = [serving.complete(CHAT, ask(policy, max_tokens=1 + 9 * i)) for i in range(3)]
    answers = await asyncio.gather(*noise[:2], serving.complete(CHAT, seeded), noise[2])
    assert answers[2]["choices"][0]["token_ids"] == alone


async def test_weights_that_are_broken_fail_their_own_requests_alone(policy: Policy) -> None:
    model = copy.deepcopy(policy.model)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    broken = replace(policy, name="broken", model=model)
    serving = EmbeddedServing([policy, broken], ServingConfig(threads=1))
    good = asyncio.create_task(serving.complete(CHAT, ask(policy, max_tokens=60)))
    with pytest.raises(ServingError, match="not finite") as failed:
        await serving.complete(CHAT, ask(policy, model="broken"))
    assert failed.value.status == 500
    assert (await good)["usage"]["completion_tokens"] > 0
    assert serving.counts.failed == 1
    await serving.close()


async def test_what_torch_raises_fails_that_batch_and_no_more(serving: EmbeddedServing, policy: Policy) -> None:
    out_of_range = ask(policy)
    resident = serving.residents.bases[0]
    module, resident.module = resident.module, torch.nn.Identity()
    with pytest.raises(ServingError, match="the engine failed"):
        await serving.complete(CHAT, out_of_range)
    resident.module = module
    assert await serving.complete(CHAT, ask(policy))
    assert await serving.healthy()


async def test_a_closed_engine_answers_503(policy: Policy) -> None:
    serving = EmbeddedServing([policy], ServingConfig(threads=1))
    running = asyncio.create_task(serving.complete(CHAT, long_ask(policy)))
    await until_counted(serving, "requests", 1)
    await serving.close()
    for answer in (running, serving.complete(CHAT, ask(policy))):
        with pytest.raises(ServingError) as refused:
            await answer
        assert refused.value.status == 503
    assert not await serving.healthy()
