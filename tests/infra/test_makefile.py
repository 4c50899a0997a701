"""What the Makefile installs where another index's torch is asked for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
INDEX = "https://torch.example/cpu"


def make(*arguments: str) -> str:
    command = ["make", "--no-print-directory", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def names(lock: str) -> set[str]:
    return set(re.findall(r"^([\w.-]+)==", lock, re.MULTILINE))


def test_the_lock_for_another_torch_has_everything_but_torch_and_cuda(tmp_path: Path) -> None:
    make(f"VENV={tmp_path}", f"TORCH_INDEX={INDEX}", f"{tmp_path}/torchless.lock")
    whole, kept = (ROOT / "requirements.lock").read_text(), (tmp_path / "torchless.lock").read_text()
    gone = names(whole) - names(kept)
    assert {"torch", "triton"} < gone
    assert all(re.match("torch$|triton$|nvidia-|cuda-", name) for name in gone)
    assert not any(name.startswith("nvidia-") for name in names(kept))
    assert {"numpy", "safetensors", "tokenizers"} <= names(kept)
    blocks = set(re.split(r"^(?=\S)", whole, flags=re.MULTILINE))
    assert set(re.split(r"^(?=\S)", kept, flags=re.MULTILINE)) <= blocks, "each with its own hashes"


def test_the_choice_takes_effect_on_what_is_installed_and_is_remembered(tmp_path: Path) -> None:
    (tmp_path / ".installed").touch()
    assert "pip sync" not in make("-n", f"VENV={tmp_path}", "install")
    asked = make("-n", f"VENV={tmp_path}", f"TORCH_INDEX={INDEX}", "install")
    assert f"--require-hashes {tmp_path}/torchless.lock" in asked
    assert f'--default-index "{INDEX}"' in asked
    (tmp_path / ".torch-index").write_text(INDEX)
    assert make("-n", f"VENV={tmp_path}", "install") == asked
    assert "pip sync" not in make("-n", f"VENV={tmp_path}", "TORCH_INDEX=", "install")
