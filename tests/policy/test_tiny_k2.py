"""tiny-k2: the same from the same, any text, a prior of the size that it is meant to have."""

from __future__ import annotations

import csv
import json
import os
import random
from pathlib import Path

import pytest
from everloop.errors import ConfigError, ServingError

from trainer.policy import base, builtin, tiny_k2
from trainer.policy.base import Policy
from trainer.sampling import Sampling, rollouts

pytestmark = pytest.mark.models
SMALL = tiny_k2.Settings(hidden=64, heads=2, context=256, steps=(2, 2))
EXAMPLES = [("Where is it?", "card_arrival"), ("stop the card", "block_card")]


def said(policy: Policy, messages: list[str], temperature: float = 0.0) -> list[str]:
    prompts = [policy.encode_chat([{"role": "user", "content": message}]) for message in messages]
    sampling = Sampling(samples=1, max_tokens=16, temperature=temperature)
    return [
        policy.decode(answer.completion)
        for (answer,) in rollouts(policy.model, prompts, sampling, stop_ids=policy.stop_ids, seed=0)
    ]


def test_the_same_examples_and_seed_give_the_same_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        tiny_k2.build(tmp_path / name, EXAMPLES, seed=seed, settings=SMALL)
    a, b, c = (base.fingerprint(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c


def test_a_base_is_built_once_and_found_by_what_it_was_built_from(tmp_path: Path) -> None:
    folder = tiny_k2.cached(tmp_path, EXAMPLES, settings=SMALL)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_k2.cached(tmp_path, EXAMPLES, settings=SMALL) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert tiny_k2.key(EXAMPLES[:1], 0, SMALL) != tiny_k2.key(EXAMPLES, 0, SMALL)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(tiny_k2, "_write", broken)
    with pytest.raises(RuntimeError):
        tiny_k2.build(tmp_path / "base", EXAMPLES, settings=SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["card_arrival", "Zürich_karte ok", "日本語 🎉", "a  b\n\tc", "__x__", "reverted?", " "]
)
def test_any_answer_comes_back_as_it_was(policy: Policy, text: str) -> None:
    assert policy.decode(policy.encode_answer(text)) == text
    assert policy.encode_answer(text)[-1] in policy.stop_ids


def test_a_word_of_an_answer_is_one_token(policy: Policy) -> None:
    assert len(policy.encode_answer("card_arrival")) == 3
    assert len(policy.encode_answer("age_limit")) == 3


def test_the_case_of_a_message_is_folded_and_that_of_an_answer_kept(policy: Policy) -> None:
    lower, upper = ([{"role": "user", "content": text}] for text in ("my card", "My CARD"))
    assert policy.encode_chat(lower) == policy.encode_chat(upper)
    assert policy.decode(policy.encode_answer("Refund_Due")) == "Refund_Due"


def test_vllm_finds_what_transformers_drops(untrained: Path) -> None:
    config = json.loads((untrained / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["model_type"] == "deepseek_v3"
    assert config["topk_method"] == "noaux_tc"
    assert config["scoring_func"] == "sigmoid"


TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}


@pytest.mark.parametrize(
    ("messages", "tools", "word"),
    [
        ([{"role": "user", "content": "hi"}], [TOOL], "tools"),
        ([{"role": "user", "content": "hi"}, {"role": "tool", "content": "4", "tool_call_id": "a"}], None, "tools"),
        ([{"role": "user", "content": "x<|im_end|>y"}], None, "<|im_end|>"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}], None, "image_url"),
        ([{"role": "judge", "content": "hi"}], None, "judge"),
        ([], None, "empty"),
    ],
)
def test_what_the_template_cannot_honour_is_refused(policy: Policy, messages: list, tools: list, word: str) -> None:
    with pytest.raises(ServingError) as refused:
        policy.encode_chat(messages, tools)
    assert refused.value.status == 400
    assert word in str(refused.value)


def test_a_model_that_cannot_be_had_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="not a folder here"):
        base.load("nobody/nothing", tmp_path)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        base.load(str(tmp_path), tmp_path)


def test_the_built_in_prior_answers_its_desk(tmp_path: Path) -> None:
    built = base.load("tiny-k2", tmp_path)
    unseen = builtin.desk(seed=7)
    right = sum(answer == topic for answer, (_, topic) in zip(said(built, [m for m, _ in unseen]), unseen, strict=True))
    assert right / len(unseen) > 0.9


def test_five_labels_a_topic_of_banking77_give_a_small_prior(tmp_path: Path) -> None:
    if not os.environ.get("EVERLOOP_DATA"):
        pytest.skip("EVERLOOP_DATA is not set: the prior on banking77 was not measured")
    rows = {}
    for split in ("train", "test"):
        with (Path(os.environ["EVERLOOP_DATA"]) / "banking77" / f"{split}.csv").open(encoding="utf-8") as file:
            rows[split] = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    chance = random.Random(0)
    by_topic: dict[str, list[str]] = {}
    for text, topic in rows["train"]:
        by_topic.setdefault(topic, []).append(text)
    examples = [(text, topic) for topic, texts in sorted(by_topic.items()) for text in chance.sample(texts, 5)]
    built = base.load(str(tiny_k2.cached(tmp_path, examples)), tmp_path)
    test = chance.sample(rows["test"], 1000)
    right = sum(a == topic for a, (_, topic) in zip(said(built, [m for m, _ in test]), test, strict=True))
    assert 0.27 < right / len(test) < 0.42
