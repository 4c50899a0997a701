"""What every test may use: a condition with a deadline, an empty home, a broker, a base model that knows nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
from everloop.home import Home

if TYPE_CHECKING:
    from services.broker.process import Broker
    from trainer.policy.base import Policy

T = TypeVar("T")
DESK = [("where is my card", "card_arrival"), ("block my card now", "block_card"), ("how old must I be", "age_limit")]


def until(condition: Callable[[], T], deadline: float = 30.0, every: float = 0.02) -> T:
    """Wait for ``condition`` to be true and return what it gave; fails after ``deadline`` seconds."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            pytest.fail(f"not true within {deadline:g} s: {condition}")
        time.sleep(every)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """A command run inside a test leaves its options in the environment, as for its services: not for other tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(name="until")
def until_fixture() -> Callable[..., object]:
    return until


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One real Kafka broker for all tests that leave it as it is; each takes a prefix of its own in ``log.url``."""
    from services.broker.process import Broker

    made = Broker(tmp_path_factory.mktemp("broker"), tied=True)
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny-k2 after one step of training: made in a second, and as good as random."""
    from trainer.policy import tiny_k2

    folder = tmp_path_factory.mktemp("bases") / "untrained"
    tiny_k2.build(folder, DESK, settings=tiny_k2.Settings(hidden=64, heads=2, context=256, steps=(1, 1)))
    return folder


@pytest.fixture(scope="session")
def policy(untrained: Path) -> Policy:
    """It as a policy. Its weights are shared by all tests: no test changes them."""
    from trainer.policy import base

    return base.load(str(untrained), untrained.parent)


@pytest.fixture(scope="session")
def adapter(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, named by its hash, of an adapter that changes every weight that can carry LoRA."""
    import torch

    from trainer.policy import lora

    model = lora.attach(policy, 4, 8, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    folder = tmp_path_factory.mktemp("adapters")
    return folder / lora.save(model, folder)
