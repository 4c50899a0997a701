"""What every test may use: a condition with a deadline, and an empty home."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from everloop.home import Home

T = TypeVar("T")


def until(condition: Callable[[], T], deadline: float = 10.0, every: float = 0.02) -> T:
    """Wait for ``condition`` to be true and return what it gave; fails after ``deadline`` seconds."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            pytest.fail(f"not true within {deadline:g} s: {condition}")
        time.sleep(every)


@pytest.fixture(name="until")
def until_fixture() -> Callable[..., object]:
    return until


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")
