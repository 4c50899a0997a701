"""The batch that serving decodes: log-probabilities are the trainer's, and an answer does not depend on its company."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from everloop.errors import ConfigError
from everloop.event import Sampling

from trainer.policy import lora
from trainer.policy.base import Policy
from trainer.rollout.running import Answer, Running, check_decodable

pytestmark = pytest.mark.models
WORDS = ["hi", "where is my card", "x", "block my card now please, it was stolen from my bag in town " * 3, "", "who"]


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[list[int]]:
    return [policy.encode_chat([{"role": "user", "content": words}]) for words in WORDS]


def decoded(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    module: torch.nn.Module | None = None,
    *,
    batch: int = 128,
    most: int = 20,
    seed: int = 0,
    **shape: float,
) -> list[Answer]:
    """An answer to each prompt, which join and leave a batch of so many rows as there is room."""
    sampling = Sampling(**{"temperature": 1.0, **shape})
    answers = [
        Answer(
            tuple(prompt),
            sampling,
            min(most, policy.context - len(prompt)),
            policy.stop_ids,
            random.Random(f"{seed}/{i}"),
        )
        for i, prompt in enumerate(prompts)
    ]
    waiting = sorted(answers, key=lambda answer: len(answer.prompt))
    running = Running(module or policy.model, policy.pad_id)
    while waiting or len(running):
        free = batch - len(running)
        running.admit(waiting[:free])
        del waiting[:free]
        running.step()
    return answers


@torch.no_grad()
def recomputed(module: torch.nn.Module, prompt: list[int], completion: Answer) -> list[float]:
    """As the trainer does: one forward pass over prompt and answer, no cache, no padding."""
    ids = torch.tensor([prompt + completion.ids])
    logprobs = torch.log_softmax(module(input_ids=ids).logits[0], dim=-1)
    return [logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(completion.ids)]


def worst(module: torch.nn.Module, prompts: list[list[int]], completions: list[Answer]) -> float:
    pairs = zip(prompts, completions, strict=True)
    return max(
        abs(a - b)
        for prompt, completion in pairs
        for a, b in zip(recomputed(module, prompt, completion), completion.logprobs, strict=True)
    )


def test_logprobs_are_the_trainers_for_prompts_of_mixed_lengths(policy: Policy, prompts: list[list[int]]) -> None:
    completions = decoded(policy, prompts * 3, most=40, seed=1)
    assert len({len(c.ids) for c in completions}) > 1  # some end earlier: rows leave, columns are dropped
    assert worst(policy.model, prompts * 3, completions) < 1e-4


def test_logprobs_with_an_adapter_are_those_of_peft(policy: Policy, adapter: Path, prompts: list[list[int]]) -> None:
    module = lora.merged(policy, adapter)
    completions = decoded(policy, prompts * 2, module, most=30, seed=1, batch=4)
    attached = lora.attach(policy, 1, 1, parent=adapter).eval()
    assert worst(attached, prompts * 2, completions) < 1e-4
    assert worst(policy.model, prompts * 2, completions) > 1e-2


def test_greedy_is_what_transformers_generates(policy: Policy, prompts: list[list[int]]) -> None:
    completions = decoded(policy, prompts, most=12, temperature=0)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        expected = policy.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert completion.ids == expected[0, len(prompt) :].tolist()


def test_a_sample_does_not_depend_on_its_company(policy: Policy, prompts: list[list[int]]) -> None:
    together = decoded(policy, prompts, seed=7)
    few_at_a_time = decoded(policy, prompts, seed=7, batch=2)
    assert [c.ids for c in together] == [c.ids for c in few_at_a_time]
    first = decoded(policy, prompts[:1], seed=7)
    assert first[0].ids == together[0].ids


def test_samples_of_one_prompt_differ_and_their_seed_repeats_them(policy: Policy, prompts: list[list[int]]) -> None:
    one, again = (decoded(policy, prompts[:1] * 8, seed=3) for _ in range(2))
    other = decoded(policy, prompts[:1] * 8, seed=4)
    assert [(c.ids, c.logprobs) for c in one] == [(c.ids, c.logprobs) for c in again]
    assert len({tuple(c.ids) for c in one}) == 8
    assert [c.ids for c in one] != [c.ids for c in other]


def test_raw_and_processed_differ_where_the_draw_was_shaped(policy: Policy, prompts: list[list[int]]) -> None:
    plain = decoded(policy, prompts[:2], most=10)
    cold = decoded(policy, prompts[:2], most=10, temperature=0.2, top_k=5)
    assert all(c.logprobs == pytest.approx(c.raw_logprobs, abs=1e-6) for c in plain)
    for prompt, completion in zip(prompts[:2], cold, strict=True):
        assert completion.raw_logprobs == pytest.approx(recomputed(policy.model, prompt, completion), abs=1e-4)
        assert sum(completion.logprobs) > sum(completion.raw_logprobs) + 1


def test_an_answer_ends_by_itself_or_by_its_length(policy: Policy, prompts: list[list[int]]) -> None:
    completions = decoded(policy, prompts * 20, most=60, seed=2)
    assert {c.finish for c in completions} == {"stop", "length"}
    for completion in completions:
        ended = completion.ids[-1] in policy.stop_ids
        assert ended == (completion.finish == "stop")
        assert len(completion.ids) <= 60
        assert not policy.stop_ids & set(completion.ids[:-1])


def test_a_model_that_forgets_columns_is_refused() -> None:
    class Sliding:
        model_type = "gemma3"
        layer_types = ["sliding_attention", "full_attention"]

    with pytest.raises(ConfigError, match="vLLM"):
        check_decodable(Sliding())
