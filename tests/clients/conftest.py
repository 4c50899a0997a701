"""Real clients before a real gateway: one process of it before the built-in engine, one before a scripted engine, one
before vLLM. No test may speak to anything outside this machine."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from everloop.event import Event
from everloop.home import Home

from services.gateway.keys import Keys
from tests.clients.node import Node
from tests.clients.scripted import Losing, Scripted, listening
from tests.engines import EngineProcess, running
from tests.gateway.conftest import Process, recorded


class Front:
    """A gateway process: its address with ``/v1``, a key, and what it recorded."""

    def __init__(self, home: Home, url: str, engine: EngineProcess | None = None) -> None:
        self.home = home
        self.root = url
        self.url = f"{url}/v1"
        self.key = Keys(home.root / "keys.db").create("default")
        self.engine = engine

    def events(self, episode: str, kind: str = "call") -> list[Event]:
        """Of the episode that a client called so, in the order in which they came."""
        id = self.home.ids.episode_named("default", episode)
        return [event for event in recorded(self.home) if event.episode == id and event.payload.kind == kind]

    def call(self, response: str) -> str:
        """The call that an answer's id stands for."""
        return self.home.ids.parse_response("default", response)[1]

    def rate(self, response: str) -> None:
        """A thumb up for the answer of this id."""
        body = json.dumps({"response_id": response, "kind": "thumb", "value": 1}).encode()
        asked = urllib.request.Request(f"{self.url}/feedback", body, {"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            assert answer.status == 202

    def cancelled(self) -> int:
        """Requests that the engine stopped because they were left."""
        assert self.engine is not None
        with urllib.request.urlopen(f"{self.engine.service}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return int(float(next(x for x in lines if x.startswith("everloop_engine_cancelled_total ")).split()[1]))


@contextmanager
def front(folder: Path, engine_url: str, base: str, engine: EngineProcess | None = None) -> Iterator[Front]:
    config = folder / "everloop.toml"
    config.write_text(f'[tenants.default.policies.assistant]\nbase = "{base}"\n')
    process = Process(folder, engine_url, EVERLOOP_CONFIG=str(config))

    async def start() -> None:
        async with aiohttp.ClientSession() as http:
            await process.start(http)

    try:
        asyncio.run(start())
        yield Front(Home(folder), process.url, engine)
        assert process.end() == 0
    finally:
        if not process.gone():
            process.kill()


@pytest.fixture(scope="session")
def real(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """Before the built-in engine, on a model that is as good as random."""
    with running(EngineProcess(tmp_path_factory.mktemp("engine"), untrained)) as engine:
        url = f"http://127.0.0.1:{engine.port}"
        with front(tmp_path_factory.mktemp("real"), url, str(untrained), engine) as made:
            yield made


@pytest.fixture(scope="session")
def constrained(vllm_engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """Before vLLM, which can be held to a schema."""
    url = f"http://127.0.0.1:{vllm_engine.port}"
    with front(tmp_path_factory.mktemp("constrained"), url, str(vllm_engine.base), vllm_engine) as made:
        yield made


@pytest.fixture(scope="session")
def script() -> Iterator[tuple[Scripted, str]]:
    engine = Scripted()
    with listening(engine.answer) as url:
        yield engine, url


@pytest.fixture(scope="session")
def scripted(script: tuple[Scripted, str]) -> Scripted:
    return script[0]


@pytest.fixture(scope="session")
def told(script: tuple[Scripted, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """Before the scripted engine."""
    with front(tmp_path_factory.mktemp("told"), script[1], "scripted") as made:
        yield made


@pytest.fixture(scope="session")
def lossy(told: Front) -> Iterator[str]:
    """The way to ``told`` that loses the first answer to every request."""
    with listening(Losing(told.root).answer) as url:
        yield f"{url}/v1"


@pytest.fixture(scope="session")
def node() -> Node:
    return Node()


@pytest.fixture(autouse=True)
def nothing_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clients that report home, or look a tokenizer up, fail the test."""
    outside: list[Any] = []
    look, connect = socket.getaddrinfo, socket.socket.connect

    def looked(host: Any, *rest: Any, **more: Any) -> Any:
        _refuse(host, outside)
        return look(host, *rest, **more)

    def connected(self: socket.socket, address: Any) -> Any:
        _refuse(address[0] if isinstance(address, tuple) else "localhost", outside)
        return connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", looked)
    monkeypatch.setattr(socket.socket, "connect", connected)
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    yield
    assert outside == []


def _refuse(host: Any, outside: list[Any]) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name not in (None, "", "127.0.0.1", "::1", "localhost"):
        outside.append(name)
        raise OSError(f"a test may not speak to {name}")
