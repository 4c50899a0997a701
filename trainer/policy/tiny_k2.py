"""tiny-k2: Kimi K2's architecture at about two million parameters, built and given its small prior here.

The architecture is transformers' DeepseekV3: latent attention, a first dense layer, then 8 routed experts of which
2 are active beside 1 shared. The prior is a short supervised training on a few examples (message, answer), so that
reinforcement learning has something to start from. Everything is a function of examples, settings and seed.

Answers are short texts; each word of an answer is one token, whatever was in the examples, and any other text is
spelled in bytes. The chat template folds the case of what the user says (two million parameters learn no case) and
refuses tools.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from trainer.policy import builtin

Example = tuple[str, str]
"""A message, and the right answer to it."""

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|im_end|>", "<|im_system|>", "<|im_user|>", "<|im_assistant|>"
TEMPLATE = (
    "{%- if tools %}{{ raise_exception('tiny-k2 has no tools') }}{% endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'tool' or message['tool_calls'] %}{{ raise_exception('tiny-k2 has no tools') }}"
    "{%- elif message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}" + END + ""
    "{%- elif message['role'] == 'user' %}" + USER + " {{ message['content'] | lower }}" + END + ""
    "{%- else %}" + SYSTEM + " {{ message['content'] | lower }}" + END + "{% endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}" + ASSISTANT + "{% endif -%}"
)
WORDS = r"[ _]?\p{L}+|[ _]?\p{N}|[ _]?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+|_+"


@dataclass(frozen=True)
class Settings:
    """Sizes, and the schedule of the supervised prior.

    It is few passes over the examples, within ``steps``: a small prior is what the loop starts from. ``sharpness``
    multiplies the logits at the end. So short a training leaves the policy far less sure than it is right (on
    banking77: 35% right when greedy, 17% when sampled), and half its samples would be no topic at all; sharpened,
    samples at temperature 1 are 27% right, and still explore.
    """

    vocabulary: int = 1536
    hidden: int = 160
    layers: int = 3
    heads: int = 4
    dense_width: int = 384
    expert_width: int = 128
    context: int = 512
    passes: float = 9.0
    steps: tuple[int, int] = (80, 400)
    batch: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    sharpness: float = 1.5


def cached(cache: Path, examples: Sequence[Example] = (), *, seed: int = 0, settings: Settings = Settings()) -> Path:
    """The folder of the base made from these examples, built on the first call; none: the built-in help desk."""
    folder = cache / "bases" / f"tiny-k2-{key(examples, seed, settings)}"
    if not folder.exists():
        build(folder, examples, seed=seed, settings=settings)
    return folder


def key(examples: Sequence[Example], seed: int, settings: Settings) -> str:
    """16 hex digits over everything that the weights depend on, this module's source included."""
    source = inspect.getsource(inspect.getmodule(key)) + inspect.getsource(builtin)  # type: ignore[arg-type]
    parts = json.dumps([list(examples), seed, asdict(settings), torch.__version__, source])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def build(folder: Path, examples: Sequence[Example], *, seed: int = 0, settings: Settings = Settings()) -> None:
    """Write a Hugging Face folder: configuration, safetensors, tokenizer. It appears whole or not at all."""
    examples = list(examples) or builtin.desk(seed)
    tokenizer = make_tokenizer(examples, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DeepseekV3ForCausalLM(make_config(tokenizer, settings))
        teach(model, tokenizer, examples, seed=seed, settings=settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        _write(making, model, tokenizer)
        os.replace(making, folder)
    except OSError:
        if not folder.exists():  # another process may have made the same one meanwhile
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _write(folder: Path, model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # vLLM needs them; transformers drops them
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    folder.chmod(0o755)


def make_tokenizer(examples: Sequence[Example], settings: Settings) -> PreTrainedTokenizerFast:
    """Byte-level BPE: the words of the answers whole, then the commonest words and pieces of the messages."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[AddedToken(t, special=True) for t in (PAD, END, SYSTEM, USER, ASSISTANT)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    answers = sorted({answer for _, answer in examples})
    messages = [" " + message.lower() for message, _ in examples]
    weight = len(messages) // len(answers) + 10  # so that a word of an answer is merged before a word of a message
    tokenizer.train_from_iterator([*answers * weight, *messages, builtin.WORDS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def make_config(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> DeepseekV3Config:
    """Kimi K2's proportions where they carry over: one group of experts, sigmoid scores, a scaled sum."""
    return DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.dense_width,
        moe_intermediate_size=settings.expert_width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        n_shared_experts=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        routed_scaling_factor=1.0,
        n_group=1,
        topk_group=1,
        kv_lora_rank=48,
        q_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=1,
        max_position_embeddings=settings.context,
        num_mtp_layers=0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def teach(
    model: DeepseekV3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    *,
    seed: int,
    settings: Settings,
) -> list[float]:
    """The supervised prior: cross-entropy on the answers' tokens alone. Returns the loss of each step."""
    rows = {example: _row(tokenizer, example) for example in examples}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    fewest, most = settings.steps
    steps = min(most, max(fewest, round(len(examples) * settings.passes / settings.batch)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    model.train()
    losses = []
    for batch in _batches(examples, steps, settings.batch, random.Random(seed)):
        ids, labels = _collate([rows[example] for example in batch], tokenizer)
        logits = model(input_ids=ids, attention_mask=ids.ne(tokenizer.pad_token_id).long(), use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(settings.sharpness)
    return losses


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: 5% linear warm-up, then a cosine to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _batches(examples: Sequence[Example], steps: int, size: int, chance: random.Random) -> list[list[Example]]:
    """``steps`` batches out of reshuffled passes; of each four, rows of like length go together (less padding)."""
    rows: list[Example] = []
    while len(rows) < steps * size:
        rows += chance.sample(list(examples), len(examples))
    batches = []
    for start in range(0, steps * size, 4 * size):
        pool = sorted(rows[start : start + 4 * size], key=lambda example: len(example[0]))
        four = [pool[i : i + size] for i in range(0, len(pool), size)]
        batches += chance.sample(four, len(four))
    return batches[:steps]


def _row(tokenizer: PreTrainedTokenizerFast, example: Example) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the answer of one example."""
    message, answer = example
    turn = [{"role": "user", "content": message}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ask, said = tokenizer([prompt, answer + END], add_special_tokens=False)["input_ids"]
    return ask, said


def _collate(
    rows: list[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded (ids, labels), both (rows, longest); labels are -100 outside the answers."""
    longest = max(len(ask) + len(answer) for ask, answer in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for i, (ask, answer) in enumerate(rows):
        ids[i, : len(ask) + len(answer)] = torch.tensor(ask + answer)
        labels[i, len(ask) : len(ask) + len(answer)] = torch.tensor(answer)
    return ids, labels
