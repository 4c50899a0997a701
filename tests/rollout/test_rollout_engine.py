"""Rollouts: log-probabilities are those that the trainer recomputes, and samples do not depend on their company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from everloop.errors import ConfigError, ServingError

from trainer.policy import lora
from trainer.policy.base import Policy
from trainer.rollout.engine import Completion, Engine
from trainer.rollout.running import check_decodable

pytestmark = pytest.mark.models
WORDS = ["hi", "where is my card", "x", "block my card now please, it was stolen from my bag in town " * 3, "", "who"]


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[list[int]]:
    return [policy.encode_chat([{"role": "user", "content": words}]) for words in WORDS]


@torch.no_grad()
def recomputed(module: torch.nn.Module, prompt: list[int], completion: Completion) -> list[float]:
    """As the trainer does: one forward pass over prompt and answer, no cache, no padding."""
    ids = torch.tensor([prompt + completion.ids])
    logprobs = torch.log_softmax(module(input_ids=ids).logits[0], dim=-1)
    return [logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(completion.ids)]


def worst(module: torch.nn.Module, prompts: list[list[int]], completions: list[Completion]) -> float:
    pairs = zip(prompts, completions, strict=True)
    return max(
        abs(a - b)
        for prompt, completion in pairs
        for a, b in zip(recomputed(module, prompt, completion), completion.logprobs, strict=True)
    )


def test_logprobs_are_the_trainers_for_prompts_of_mixed_lengths(policy: Policy, prompts: list[list[int]]) -> None:
    completions = Engine(policy).generate(prompts * 3, max_tokens=40, seed=1)
    assert len({len(c.ids) for c in completions}) > 1  # some end earlier: rows leave, columns are dropped
    assert worst(policy.model, prompts * 3, completions) < 1e-4


def test_logprobs_with_an_adapter_are_those_of_peft(policy: Policy, adapter: Path, prompts: list[list[int]]) -> None:
    module = lora.merged(policy, adapter)
    completions = Engine(policy, batch=4).generate(prompts * 2, module=module, max_tokens=30, seed=1)
    attached = lora.attach(policy, 1, 1, parent=adapter).eval()
    assert worst(attached, prompts * 2, completions) < 1e-4
    assert worst(policy.model, prompts * 2, completions) > 1e-2


def test_greedy_is_what_transformers_generates(policy: Policy, prompts: list[list[int]]) -> None:
    completions = Engine(policy).generate(prompts, max_tokens=12, temperature=0)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        expected = policy.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert completion.ids == expected[0, len(prompt) :].tolist()


def test_a_sample_does_not_depend_on_its_company(policy: Policy, prompts: list[list[int]]) -> None:
    together = Engine(policy).generate(prompts, max_tokens=20, seed=7)
    few_at_a_time = Engine(policy, batch=2).generate(prompts, max_tokens=20, seed=7)
    assert [c.ids for c in together] == [c.ids for c in few_at_a_time]
    first = Engine(policy).generate(prompts[:1], max_tokens=20, seed=7)
    assert first[0].ids == together[0].ids


def test_samples_of_one_prompt_differ_and_their_seed_repeats_them(policy: Policy, prompts: list[list[int]]) -> None:
    engine = Engine(policy)
    one, again = (engine.generate(prompts[:1] * 8, max_tokens=20, seed=3) for _ in range(2))
    other = engine.generate(prompts[:1] * 8, max_tokens=20, seed=4)
    assert one == again
    assert len({tuple(c.ids) for c in one}) == 8
    assert [c.ids for c in one] != [c.ids for c in other]


def test_raw_and_processed_differ_where_the_draw_was_shaped(policy: Policy, prompts: list[list[int]]) -> None:
    plain = Engine(policy).generate(prompts[:2], max_tokens=10)
    cold = Engine(policy).generate(prompts[:2], max_tokens=10, temperature=0.2, top_k=5)
    assert all(c.logprobs == pytest.approx(c.raw_logprobs, abs=1e-6) for c in plain)
    for prompt, completion in zip(prompts[:2], cold, strict=True):
        assert completion.raw_logprobs == pytest.approx(recomputed(policy.model, prompt, completion), abs=1e-4)
        assert sum(completion.logprobs) > sum(completion.raw_logprobs) + 1


def test_an_answer_ends_by_itself_or_by_its_length(policy: Policy, prompts: list[list[int]]) -> None:
    completions = Engine(policy).generate(prompts * 20, max_tokens=60, seed=2)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        ended = completion.ids[-1] in policy.stop_ids
        assert ended == (completion.finish_reason == "stop")
        assert len(completion.ids) <= 60
        assert not policy.stop_ids & set(completion.ids[:-1])


def test_a_prompt_that_fills_the_context_is_refused(policy: Policy) -> None:
    engine = Engine(policy)
    with pytest.raises(ServingError, match="prompt 1 has 256 tokens") as refused:
        engine.generate([[5, 6], [5] * policy.context])
    assert refused.value.code == "context_length_exceeded"
    assert len(engine.generate([[5] * (policy.context - 1)], max_tokens=9)[0].ids) == 1


def test_a_model_that_forgets_columns_is_refused() -> None:
    class Sliding:
        model_type = "gemma3"
        layer_types = ["sliding_attention", "full_attention"]

    with pytest.raises(ConfigError, match="vLLM"):
        check_decodable(Sliding())
