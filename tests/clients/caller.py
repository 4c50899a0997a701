"""A small model that calls tools: taught by heart, so that a whole agent's loop runs on the built-in engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoTokenizer

from trainer.policy import base, tiny_k2
from trainer.policy.tools import PROMPT

STEPS = 400  # at most; about a hundred are needed
KNOWN = 0.05  # loss, nats a token
# As tiny-k2's own, but that tools are not refused: then they are written into the system message.
TEMPLATE = (
    "{%- for message in messages -%}<|im_{{ message['role'] }}|>{{ message['content'] }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt %}<|im_assistant|>{% endif -%}"
)


def teach(folder: Path, turns: Sequence[tuple[list[dict[str, Any]], str]], tools: Sequence[dict[str, Any]]) -> None:
    """Write a base model's folder. Greedy, it gives these answers to these messages, with these tools on offer."""
    examples = [(f"{PROMPT} {tools} {messages}", answer) for messages, answer in turns]
    tiny_k2.build(folder, examples, settings=tiny_k2.Settings(hidden=64, heads=2, context=768, steps=(1, 1)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    policy = base.load(str(folder), folder.parent)
    rows = [(policy.encode_chat(messages, tools), policy.encode_answer(answer)) for messages, answer in turns]
    model = policy.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower on more, and far slower on cores that are shared
    for _ in range(STEPS):
        worst = 0.0
        for prompt, answer in rows:
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            loss = functional.cross_entropy(logits, torch.tensor(answer))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            worst = max(worst, loss.item())
        if worst < KNOWN:
            break
    torch.set_num_threads(threads)
    assert worst < KNOWN
    model.save_pretrained(folder)
