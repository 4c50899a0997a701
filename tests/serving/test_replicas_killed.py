"""Two engines in processes of their own, behind a gateway and a releaser: what a kill -9 of one costs, and of both."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from everloop import wire
from everloop.config import Config
from everloop.event import Event
from everloop.home import Home
from everloop.log import NewRecord, open_log
from everloop.release import Release, ReleaseState
from everloop.serving.base import LOST
from everloop.topics import EVENTS, RELEASES

from services.gateway.keys import Keys
from services.gateway.replicas import Replicas
from services.releaser.residents import Residents
from tests.engines import EngineProcess, free_port

pytestmark = [pytest.mark.models, pytest.mark.processes]
CHAT = "chat/completions"
LONG = {"messages": [{"role": "user", "content": "where is my card"}], "temperature": 0, "max_tokens": 240}
SHORT = {**LONG, "max_tokens": 2}
PATIENCE = 120.0


def sharing(made: EngineProcess, adapters: Path) -> EngineProcess:
    """An engine with a home of its own that loads adapters from another one's."""
    (made.home / "adapters").symlink_to(adapters)
    return made


@pytest.fixture
def engines(home: Home, untrained: Path, tmp_path: Path) -> Iterator[list[EngineProcess]]:
    made = []
    for name in "ab":
        (tmp_path / name).mkdir()
        made.append(sharing(EngineProcess(tmp_path / name, untrained), home.folder("adapters")))
    with ThreadPoolExecutor() as pool:
        list(pool.map(EngineProcess.start, made))
    yield made
    for engine in made:
        engine.kill()


class Platform:
    """A gateway and a releaser of one home, before the engines."""

    def __init__(self, home: Home, engines: list[EngineProcess], base: Path, http: aiohttp.ClientSession) -> None:
        self.home, self.http = home, http
        self.urls = [f"http://127.0.0.1:{engine.port}" for engine in engines]
        self.gateway, self.releaser = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        config = home.folder() / "everloop.toml"
        config.write_text(
            f'home = "{home.root}"\ncache = "{home.root}/cache"\n[serving]\nurl = {json.dumps(self.urls)}\n'
            f"[gateway]\nport = {self.gateway.rpartition(':')[2]}\n"
            f'[services]\nreleaser_port = {self.releaser.rpartition(":")[2]}\n[mlflow]\nuri = "http://127.0.0.1:9"\n'
            f'[tenants.default.policies.assistant]\nbase = "{base}"\n'
            "[tenants.default.policies.assistant.canary]\nshare = 0.5\n"
        )
        self.log = open_log(Config.model_validate({"home": home.root}))
        self.key = Keys(home.root / "keys.db").create("default")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
        self._environment |= {"EVERLOOP_CONFIG": str(config), "OMP_NUM_THREADS": "1"}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._people = 0

    def start(self, name: str) -> None:
        with (self.home.root / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", f"services.{name}"], env=self._environment, stdout=log, stderr=log
            )

    def kill(self, name: str) -> None:
        self._processes[name].kill()
        self._processes[name].wait()

    def close(self) -> None:
        for name in self._processes:
            self.kill(name)
        self.log.close()

    async def get(self, url: str) -> tuple[int, Any]:
        try:
            async with self.http.get(url) as response:
                return response.status, await response.json(content_type=None)
        except aiohttp.ClientError:
            return 0, {}

    async def seen(self, name: str) -> list[Any]:
        """What the gateway says of each engine."""
        _, said = await self.get(f"{self.gateway}/status")
        return [its[name] for its in said.get("replicas", [])]

    def everloop(self, *words: str) -> str:
        """What a command prints."""
        command = [sys.executable, "-m", "everloop.cli.main", *words]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, check=True).stdout

    async def metrics(self, prefix: str) -> dict[str, float]:
        async with self.http.get(f"{self.gateway}/metrics") as response:
            lines = (await response.text()).splitlines()
        pairs = (line.removeprefix(prefix).rsplit(" ", 1) for line in lines if line.startswith(prefix))
        return {name: float(value) for name, value in pairs}

    async def until(self, condition: Callable[[], Any]) -> Any:
        async with asyncio.timeout(PATIENCE):
            while not (found := await condition()):
                await asyncio.sleep(0.05)
            return found

    async def until_seen(self, name: str, *values: Any) -> None:
        async def it_is() -> bool:
            return await self.seen(name) == list(values)

        await self.until(it_is)

    async def canary(self) -> dict[str, Any]:
        """The running canary as the releaser reports it; empty where there is none."""
        _, said = await self.get(f"{self.releaser}/status")
        its = said.get("policies", {}).get("default/assistant", {}).get("in_progress") or {}
        return its if its.get("state") == "canary" and "arms" in its else {}

    def ask(self, **body: Any) -> Any:
        """A request of somebody new: the arms of a canary are drawn by person."""
        self._people += 1
        headers = {"Authorization": f"Bearer {self.key}", "X-Everloop-Subject": f"person-{self._people}"}
        return self.http.post(f"{self.gateway}/v1/{CHAT}", json={"model": "assistant", **body}, headers=headers)

    async def answered(self, statuses: list[int], stop: asyncio.Event) -> None:
        """Ask until told to stop, and note how it went."""
        while not stop.is_set():
            async with self.ask(**SHORT) as response:
                statuses.append(response.status if (await response.json()).get("choices") else -1)

    def errors(self) -> list[str | None]:
        """The error code of every call in the log, None of those that were answered."""
        found = []
        for partition in range(self.log.partitions(EVENTS.name)):
            for record in self.log.read(EVENTS.name, partition, 0, 100_000):
                found.append(wire.decode(Event, record.value or b"", self.home.blobs).payload.error_code)
        return found


@pytest.fixture
async def platform(home: Home, engines: list[EngineProcess], untrained: Path) -> AsyncIterator[Platform]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as http:
        made = Platform(home, engines, untrained, http)
        yield made
        made.close()


async def served(engine: EngineProcess, http: aiohttp.ClientSession) -> float:
    """How many chats an engine has answered."""
    async with http.get(f"http://127.0.0.1:{engine.port}/metrics") as response:
        lines = (await response.text()).splitlines()
    chats = (line for line in lines if line.startswith("everloop_engine_requests_total") and CHAT in line)
    return sum(float(line.rpartition(" ")[2]) for line in chats)


async def test_a_replica_is_killed_in_the_middle_of_a_canary_and_comes_back(
    platform: Platform, engines: list[EngineProcess], on_attention: list[Path]
) -> None:
    adapter = on_attention[0].name
    shutil.copytree(on_attention[0], platform.home.folder("adapters") / adapter)
    passed = Release(id="rel_1", tenant="default", policy="assistant", adapter=adapter, uri="u", time=time.time())
    versions = [passed, passed.to(ReleaseState.GATED, "Passed.", time.time())]
    records = [NewRecord(RELEASES.name, f"{one.key}/{one.id}", wire.encode(one)) for one in versions]
    platform.log.append(records)
    platform.start("gateway")
    platform.start("releaser")
    await platform.until(platform.canary)
    await platform.until_seen("complete", True, True)

    # Killed in the middle of streams, while others ask without pause.
    statuses: list[int] = []
    stop = asyncio.Event()
    asking = [asyncio.create_task(platform.answered(statuses, stop)) for _ in range(3)]
    streams = [await platform.ask(**LONG, stream=True) for _ in range(8)]
    for stream in streams:
        assert stream.status == 200
        assert await stream.content.readline()
    killed, other = engines
    assert killed.process is not None
    killed.process.send_signal(signal.SIGSTOP)  # so that nothing of it ends by itself any more
    before = len(statuses)
    killed.kill()
    ends = [(await stream.read()).strip().rsplit(b"\n\n", 1)[-1] for stream in streams]
    broken = [json.loads(end.removeprefix(b"data: "))["error"] for end in ends if end != b"data: [DONE]"]
    assert 0 < len(broken) < len(streams)
    assert {error["code"] for error in broken} == {LOST}
    await platform.until_seen("up", False, True)
    async with asyncio.timeout(PATIENCE):
        while len(statuses) < before + 20:
            await asyncio.sleep(0.01)
    stop.set()
    await asyncio.gather(*asking)
    assert set(statuses) == {200}, "who was not being answered by it did not notice"
    assert (await platform.get(f"{platform.gateway}/readyz"))[0] == 200

    told = await asyncio.to_thread(platform.everloop, "status")
    rows = {line.split()[0]: line for line in told.splitlines() if line.startswith("http://")}
    assert "away for" in rows[platform.urls[0]]
    assert adapter[:12] not in rows[platform.urls[0]]
    assert "takes calls" in rows[platform.urls[1]]
    assert adapter[:12] in rows[platform.urls[1]]
    metrics = await platform.metrics("everloop_gateway_replica_")
    a, b = (f'{{replica="{url.removeprefix("http://")}"}}' for url in platform.urls)
    assert (metrics[f"up{a}"], metrics[f"up{b}"]) == (0, 1)
    assert (metrics[f"complete{a}"], metrics[f"complete{b}"]) == (0, 1)
    assert (metrics[f"in_flight_requests{a}"], metrics[f"in_flight_requests{b}"]) == (0, 0)
    assert metrics[f"lost_total{a}"] >= len(broken)

    # It is nobody's fault.
    calls = platform.errors()
    assert calls.count(LOST) == len(broken)
    assert set(calls) == {None, LOST}

    async def all_read() -> bool:
        arms = (await platform.canary()).get("arms", {})
        return bool(arms) and arms["canary"]["calls"] + arms["control"]["calls"] == calls.count(None)

    await platform.until(all_read)
    arms = (await platform.canary())["arms"]
    assert arms["canary"]["failed"] == arms["control"]["failed"] == 0

    # It comes back while the releaser is away: nobody gives it its adapter, so it gets no calls.
    platform.kill("releaser")
    await asyncio.to_thread(killed.start)
    await platform.until_seen("up", True, True)
    assert await platform.seen("complete") == [False, True]
    answers, refused = await served(other, platform.http), 0
    for _ in range(10):
        async with platform.ask(**SHORT) as response:
            refused += response.status != 200
    assert refused == 0
    assert await served(killed, platform.http) == 0
    assert await served(other, platform.http) == answers + 10

    platform.start("releaser")
    await platform.until_seen("complete", True, True)

    async def both_answer() -> bool:
        async with platform.ask(**SHORT) as response:
            assert response.status == 200
        return await served(killed, platform.http) > 0

    await platform.until(both_answer)
    assert (await platform.until(platform.canary))["release"] == "rel_1"

    # Both away.
    for engine in engines:
        engine.kill()
    await platform.until_seen("up", False, False)
    async with platform.ask(**SHORT) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (503, "engine_unavailable")
        assert response.headers["Retry-After"] == "1"
    status, said = await platform.get(f"{platform.gateway}/readyz")
    assert status == 503
    assert all(url in json.dumps(said) for url in platform.urls)


@pytest.mark.vllm
async def test_vllm_and_the_embedded_engine_are_replicas_of_each_other(
    vllm_engine: EngineProcess, untrained: Path, on_attention: list[Path], tmp_path: Path
) -> None:
    adapters = Home(vllm_engine.home).folder("adapters")
    for adapter in on_attention:
        shutil.copytree(adapter, adapters / adapter.name, dirs_exist_ok=True)
    embedded = sharing(EngineProcess(tmp_path, untrained), adapters)
    await asyncio.to_thread(embedded.start)
    try:
        urls = [f"http://127.0.0.1:{engine.port}" for engine in (vllm_engine, embedded)]
        replicas = Replicas(urls)

        async def files(release: Release) -> Path:
            return adapters / release.adapter

        residents = Residents(replicas, 6, files)
        names = [adapter.name for adapter in on_attention]
        for name in names:
            await residents.hold(Release(id=name, tenant="t", policy="p", adapter=name, uri="", time=0.0))
        assert residents.held == set(names)
        await replicas.look(lambda: frozenset(names))
        assert all(replica.complete for replica in replicas.each)

        asked = [replicas.complete(CHAT, {"model": model, **SHORT}) for model in (*names, str(untrained)) * 4]
        assert all(answer["choices"] for answer in await asyncio.gather(*asked))

        embedded.kill()
        for _ in range(4):
            assert [chunk async for chunk in replicas.stream(CHAT, {"model": names[0], **SHORT})]
        assert [replica.up for replica in replicas.each] == [True, False]
        for name in names:
            await replicas.each[0].serving.unload(name)
        await replicas.close()
    finally:
        embedded.kill()
