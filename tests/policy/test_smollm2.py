"""smollm2: real weights out of the package, a template with and without tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from everloop.errors import ConfigError

from trainer.policy import base, smollm2
from trainer.policy.base import Policy
from trainer.sampling import Sampling, rollouts

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return base.load("smollm2", tmp_path_factory.mktemp("cache"))


def test_it_speaks(real: Policy) -> None:
    prompt = real.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    greedy = Sampling(samples=1, max_tokens=16, temperature=0)
    ((answer,),) = rollouts(real.model, [prompt], greedy, stop_ids=real.stop_ids, seed=0)
    assert "Paris" in real.decode(answer.completion)


def test_its_turn_ends_with_its_own_end_token(real: Policy) -> None:
    assert real.tokenizer.convert_ids_to_tokens(real.end_id) == "<|im_end|>"
    assert real.stop_ids == {real.end_id}
    assert real.decode(real.encode_answer("Yes , it 's fine .")) == "Yes , it 's fine ."


def test_tools_are_told_to_a_model_whose_template_has_none(real: Policy) -> None:
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "here"},
    ]
    prompt = real.tokenizer.decode(real.encode_chat(messages, [tool]))
    assert json.dumps(tool) in prompt
    assert "<tool_response>\nhere\n</tool_response>" in prompt


def test_attention_and_dense_weights_carry_lora(real: Policy) -> None:
    wanted = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert real.lora_targets() == {"target_modules": wanted, "target_parameters": None}


def test_without_the_package_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="make install"):
        smollm2.cached(tmp_path)
