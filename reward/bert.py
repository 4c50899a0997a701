"""BERT as a sentence encoder (Devlin et al. 2019; Reimers and Gurevych 2019), in torch alone.

The one architecture of the packaged encoder, without the libraries that bring all others: importing those costs a
service a quarter of a minute of processor time at each start. Equal to sentence-transformers on the same files,
which a test holds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

PLAIN = ["Transformer", "Pooling", "Normalize"]


def fits(folder: Path) -> bool:
    """Whether a sentence-transformers folder is plain BERT: mean pooling, normalised, nothing else on top."""
    modules = [str(module["type"]).rpartition(".")[2] for module in json.loads((folder / "modules.json").read_text())]
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    pooling = folder / "1_Pooling" / "config.json"
    return (
        modules in (PLAIN, PLAIN[:2])
        and (config.get("model_type"), config.get("hidden_act")) == ("bert", "gelu")
        and pooling.exists()
        and [key for key, on in json.loads(pooling.read_text()).items() if on is True] == ["pooling_mode_mean_tokens"]
        and (folder / "model.safetensors").exists()
        and (folder / "tokenizer.json").exists()
    )


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, as (weight, bias) pairs; ``mixed`` is query, key and value in one."""

    mixed: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    out_norm: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    down_norm: tuple[Tensor, Tensor]


class Bert:
    """Weights and tokenizer of one folder. Texts beyond ``max_tokens`` are cut."""

    def __init__(self, folder: Path, dtype: torch.dtype, max_tokens: int) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.heads = int(config["num_attention_heads"])
        self.epsilon = float(config["layer_norm_eps"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(min(max_tokens, int(config["max_position_embeddings"])))
        weights = {
            name.removeprefix("bert."): w.to(dtype) for name, w in load_file(folder / "model.safetensors").items()
        }
        self.words = weights["embeddings.word_embeddings.weight"]
        self.places = (
            weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        )
        self.norm = _pair(weights, "embeddings.LayerNorm")
        self.layers = [_layer(weights, f"encoder.layer.{i}.") for i in range(int(config["num_hidden_layers"]))]

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self.tokenizer.encode_batch_fast(texts)]

    @torch.inference_mode()
    def vectors(self, ids: Tensor) -> Tensor:
        """(n, size) float32, means over the tokens, from ids (n, tokens) without padding."""
        states = self._normed(self.words[ids] + self.places[: ids.shape[1]], self.norm)
        for layer in self.layers:
            states = self._normed(functional.linear(self._attended(states, layer), *layer.out) + states, layer.out_norm)
            wide = functional.gelu(functional.linear(states, *layer.up))
            states = self._normed(functional.linear(wide, *layer.down) + states, layer.down_norm)
        return states.float().mean(1)

    def _normed(self, states: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return functional.layer_norm(states, states.shape[-1:], *norm, self.epsilon)

    def _attended(self, states: Tensor, layer: Layer) -> Tensor:
        n, tokens, size = states.shape
        mixed = functional.linear(states, *layer.mixed).view(n, tokens, 3, self.heads, size // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value)
        return seen.transpose(1, 2).reshape(n, tokens, size)


def _pair(weights: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _layer(weights: dict[str, Tensor], prefix: str) -> Layer:
    mixed: list[Any] = [_pair(weights, f"{prefix}attention.self.{name}") for name in ("query", "key", "value")]
    return Layer(
        mixed=(torch.cat([weight for weight, _ in mixed]), torch.cat([bias for _, bias in mixed])),
        out=_pair(weights, f"{prefix}attention.output.dense"),
        out_norm=_pair(weights, f"{prefix}attention.output.LayerNorm"),
        up=_pair(weights, f"{prefix}intermediate.dense"),
        down=_pair(weights, f"{prefix}output.dense"),
        down_norm=_pair(weights, f"{prefix}output.LayerNorm"),
    )
