"""The SDK installed alone, from its wheel, in a clean environment: it brings pydantic and an HTTP client, no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = ROOT / ".venv/uv/bin/uv"
USE = """
import importlib.util, json, sys
import everloop
everloop.configure("http://127.0.0.1:9", "ek_x", exit_timeout=0.0)
with everloop.record() as episode:
    episode.thumb(True)
assert everloop.stats().queued == 2, everloop.stats()
for name in ("torch", "numpy", "aiohttp", "duckdb", "services", "pipelines", "reward", "trainer"):
    assert importlib.util.find_spec(name) is None, name
print("alone")
"""


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return str(done.stdout)


def build_wheel(folder: Path) -> Path:
    """From a copy: a build leaves folders beside its sources."""
    source = folder / "sdk"
    run("cp", "-r", ROOT / "sdk", source)
    backend = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    run(sys.executable, "-c", backend, cwd=source)
    return next(folder.glob("*.whl"))


def install(wheel: Path, environment: Path) -> Path:
    """The environment's python. Versions are those of the lock; uv where ``make install`` left it, else pip."""
    python = environment / "bin/python"
    pins = ("--constraint", ROOT / "requirements.lock")
    if UV.exists():
        run(UV, "venv", "--quiet", "--python", sys.executable, environment)
        run(UV, "pip", "install", "--quiet", "--python", python, *pins, wheel)
    else:
        run(sys.executable, "-m", "venv", environment)
        versions = environment / "versions.txt"
        versions.write_text("".join(f"{line.split()[0]}\n" for line in _pinned()))
        run(python, "-m", "pip", "install", "--quiet", "--constraint", versions, wheel)
    return python


def _pinned() -> list[str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line for line in lines if "==" in line and not line.startswith((" ", "#"))]


@pytest.mark.processes
def test_the_wheel_works_alone(tmp_path: Path) -> None:
    python = install(build_wheel(tmp_path), tmp_path / "clean")
    assert run(python, "-I", "-c", USE, cwd=tmp_path) == "alone\n"
    installed = run(python, "-I", "-c", "import importlib.metadata as m; print(*(d.name for d in m.distributions()))")
    assert "everloop" in installed.split()
    assert "torch" not in installed.split()
    assert len([name for name in installed.split() if name not in ("pip", "setuptools", "wheel")]) <= 16, installed
