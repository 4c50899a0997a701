"""A policy's base model with its tokenizer, from a name: what sampling, training and serving all start from."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from everloop.errors import ConfigError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging as transformers_logging

from trainer.policy import chat, targets

BROKEN = "\ufffd"  # what decoding gives for the bytes of an unfinished character
NAMED = ("tiny-k2", "smollm2")


@dataclass(frozen=True)
class Policy:
    """A base model in evaluation mode, its parameters frozen.

    ``context`` is the longest prompt and answer together, in tokens. ``stop_ids`` end an answer when sampled.
    ``identity`` names the exact weights ("tiny-k2@" and 16 hex digits): an adapter says by it what it belongs to.
    """

    name: str
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int
    stop_ids: frozenset[int]
    end_id: int

    @property
    def pad_id(self) -> int:
        """Fills rows of a batch to one width; always masked."""
        return int(self.tokenizer.pad_token_id) if self.tokenizer.pad_token_id is not None else self.end_id

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""
        return int(self.model.config.vocab_size)

    @cached_property
    def identity(self) -> str:
        return f"{Path(self.name).name}@{fingerprint(self.folder)[:16]}"

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next answer begins.

        Raises ServingError 400 for what the template cannot honour: images, tools, a role it does not have.
        """
        return self.encode(chat.render(self.tokenizer, messages, tools or ()))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that already has its control tokens in it."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer as the policy should have sampled it, the end token included."""
        return [*self.encode(text), self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids; control tokens are left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def bytes_of(self, token: int) -> list[int] | None:
        """The UTF-8 bytes of one token, also of one that is part of a character; None: its tokenizer does not tell."""
        spelled = str(self.tokenizer.decode([token]))
        if BROKEN not in spelled:
            return list(spelled.encode())
        written = str(self.tokenizer.convert_ids_to_tokens(token))
        if re.fullmatch(r"<0x[0-9A-F]{2}>", written):
            return [int(written[3:5], 16)]
        byte_of = _bytes_by_letter()
        return [byte_of[letter] for letter in written] if set(written) <= set(byte_of) else None

    def lora_targets(self, groups: Sequence[str] = targets.GROUPS) -> dict[str, Any]:
        """Fields of PEFT's LoraConfig that select these groups of weights in this architecture."""
        return targets.of(self.model, groups)


def load(name: str, cache: Path, *, dtype: torch.dtype = torch.float32) -> Policy:
    """The base model called ``name``: "tiny-k2", "smollm2", a Hugging Face folder, or an id of its hub.

    The two named ones are made once below ``cache/bases``. Raises ConfigError where a model cannot be had.
    """
    transformers_logging.disable_progress_bar()
    where = folder(name, cache)
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base model {name!r} cannot be loaded from {where}: {error}") from None
    model.eval().requires_grad_(False)
    tokenizer.clean_up_tokenization_spaces = False  # ids and text must agree to the byte
    stop_ids = _stop_ids(where, model, tokenizer)
    end_id = chat.end_id(tokenizer, stop_ids)
    return Policy(name, where, model, tokenizer, _context(model), stop_ids, end_id)


@cache
def _bytes_by_letter() -> dict[str, int]:
    """How byte-level tokenizers write each byte as a letter, turned round."""
    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def folder(name: str, cache: Path) -> Path:
    """The Hugging Face folder of a base model, made or downloaded where it is not here yet. Raises ConfigError."""
    if name == "tiny-k2":
        from trainer.policy import tiny_k2

        return tiny_k2.cached(cache)
    if name == "smollm2":
        from trainer.policy import smollm2

        return smollm2.cached(cache)
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser().absolute()
    return _from_hub(name, cache)


def _from_hub(name: str, cache: Path) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen unrelated types, all meaning "not to be had"
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ConfigError(
            f"there is no base model {name!r}: it is not one of {', '.join(NAMED)}, not a folder here, and the "
            f"Hugging Face hub did not give it{offline}: {error}. Give a folder with config.json and *.safetensors"
        ) from None


def _stop_ids(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    named: list[Any] = [tokenizer.eos_token_id, model.config.eos_token_id]
    if (folder / "generation_config.json").exists():
        named.append(GenerationConfig.from_pretrained(folder).eos_token_id)
    flat = [i for one in named for i in (one if isinstance(one, list) else [one]) if i is not None]
    if not flat:
        raise ConfigError(f"the model in {folder} names no end token: set eos_token_id in its generation_config.json")
    return frozenset(flat)


def _context(model: PreTrainedModel) -> int:
    return int(getattr(model.config, "max_position_embeddings", 0) or 2048)


def fingerprint(folder: Path) -> str:
    """SHA-256 over a base model's configuration, weights and tokenizer, by name, in hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json", "chat_template.jinja"):
            digest.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
