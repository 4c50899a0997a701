"""A real gateway process: kill -9 before, during and after answers, and what it says of itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from everloop.event import Event
from everloop.home import Home
from everloop.log import connect
from everloop.wire import decode

from services.gateway.keys import Keys

pytestmark = pytest.mark.processes
WORDS = [f"w{at} " for at in range(20)]


async def engine(request: web.Request) -> web.StreamResponse:
    """A real HTTP engine in vLLM's dialect: a word each 2 ms when streamed, at once when not."""
    if request.path != "/v1/chat/completions":
        return web.json_response({})
    body = await request.json()
    if not body.get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": "".join(WORDS)}, "finish_reason": "stop"}
        logprobs = {"content": [{"token": word, "logprob": -0.5} for word in WORDS]}
        choice |= {"token_ids": list(range(len(WORDS))), "logprobs": logprobs}
        return web.json_response({"choices": [choice], "prompt_token_ids": [1, 2]})
    response = web.StreamResponse()
    await response.prepare(request)
    for at, word in enumerate(WORDS):
        choice = {"index": 0, "delta": {"content": word}, "token_ids": [at], "finish_reason": None}
        choice["logprobs"] = {"content": [{"token": word, "logprob": -0.5}]}
        choice["finish_reason"] = "stop" if at == len(WORDS) - 1 else None
        await response.write(
            b"data: " + json.dumps({"choices": [choice], "prompt_token_ids": [1, 2]}).encode() + b"\n\n"
        )
        await asyncio.sleep(0.002)
    await response.write(b"data: [DONE]\n\n")
    return response


@pytest.fixture
async def engine_url() -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", engine)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


class Process:
    """A gateway in a process of its own, on one port however often it is started."""

    def __init__(self, home: Path, engine_url: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._environment = {
            **os.environ,
            "EVERLOOP_HOME": str(home),
            "EVERLOOP_GATEWAY__PORT": str(self.port),
            "EVERLOOP_SERVING__URL": engine_url,
        }
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self, http: aiohttp.ClientSession, path: str = "/readyz") -> None:
        errors = (self._home / "gateway.log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.gateway"],
            env=self._environment,
            stderr=errors,
            cwd=Path(__file__).parents[2],
        )
        async with asyncio.timeout(60):
            while True:
                try:
                    async with http.get(self.url + path) as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                assert self._process.poll() is None, (self._home / "gateway.log").read_text()
                await asyncio.sleep(0.05)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(30)


class Agent:
    """Keeps asking, streamed and not, and notes every answer that it was given to the end."""

    def __init__(self, process: Process, key: str, http: aiohttp.ClientSession) -> None:
        self._process = process
        self._headers = {"Authorization": f"Bearer {key}"}
        self._http = http
        self.acknowledged: list[str] = []
        self.asked = 0
        self.stopped = False

    async def ask_until_stopped(self, stream: bool) -> None:
        """Each request has a key, and is tried again with it until it is answered."""
        while not self.stopped:
            self.asked += 1
            headers = {**self._headers, "Idempotency-Key": f"k{self.asked}"}
            while not await self._ask(stream, headers):
                if self.stopped:
                    return
                await asyncio.sleep(0.02)

    async def _ask(self, stream: bool, headers: dict[str, str]) -> bool:
        body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        try:
            url = f"{self._process.url}/v1/chat/completions"
            async with self._http.post(url, json=body, headers=headers) as response:
                raw = await response.read()
                whole = raw.endswith(b"data: [DONE]\n\n") if stream else response.status == 200
                if whole:
                    self.acknowledged.append(response.headers["X-Everloop-Call"])
                return whole
        except aiohttp.ClientError:
            return False


def recorded(home: Home) -> list[Event]:
    log = connect(f"sqlite:///{home.root / 'log.db'}")
    events = []
    for partition in range(log.partitions("events")):
        offset = 0
        while records := log.read("events", partition, offset):
            events += [decode(Event, record.value or b"", home.blobs) for record in records]
            offset = records[-1].offset + 1
    log.close()
    return events


async def test_what_was_acknowledged_survives_kill_9_exactly_once(home: Home, engine_url: str, soon: Any) -> None:
    process = Process(home.folder(), engine_url)
    key = Keys(home.root / "keys.db").create("default")
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http:
        agent = Agent(process, key, http)
        await process.start(http)
        asking = [asyncio.create_task(agent.ask_until_stopped(stream=at % 2 == 0)) for at in range(4)]
        for kills in range(1, 4):
            await soon(lambda kills=kills: len(agent.acknowledged) >= 15 * kills, deadline=60)
            process.kill()
            await process.start(http)
        await soon(lambda: len(agent.acknowledged) >= 60, deadline=60)
        agent.stopped = True
        await asyncio.gather(*asking)
        assert process.end() == 0
    calls = Counter(event.payload.id for event in recorded(home) if event.payload.error is None)
    assert len(agent.acknowledged) == len(set(agent.acknowledged)), "no answer was given for two requests"
    assert {calls[call] for call in agent.acknowledged} == {1}
    assert set(calls.values()) == {1}
    tokens = [event.payload.tokens for event in recorded(home) if event.payload.error is None]
    assert all(each.checked and len(each.completion) == len(WORDS) for each in tokens)
    # The keys make a turn that was durable when its gateway died the answer to its retry, not a second turn.
    assert len(calls) == agent.asked


async def test_without_an_engine_it_is_alive_and_not_ready_and_says_what_it_does(home: Home) -> None:
    process = Process(home.folder(), "http://127.0.0.1:1")
    key = Keys(home.root / "keys.db").create("default")
    async with aiohttp.ClientSession() as http:
        await process.start(http, "/healthz")

        async def get(path: str) -> tuple[int, str]:
            async with http.get(process.url + path) as response:
                return response.status, await response.text()

        async with asyncio.timeout(30):
            while "no engine answers" not in (await get("/readyz"))[1]:
                await asyncio.sleep(0.05)
        assert (await get("/readyz"))[0] == 503
        body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
        headers = {"Authorization": f"Bearer {key}", "X-Everloop-Subject": "anna"}
        async with http.post(f"{process.url}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "engine_unavailable"
        _, metrics = await get("/metrics")
        _, status = await get("/status")
        assert process.end() == 0
    ours = [line for line in metrics.splitlines() if line.startswith("everloop_gateway_")]
    assert 'everloop_gateway_requests_total{code="503",route="/v1/chat/completions"} 1.0' in ours
    assert any(line.startswith("everloop_gateway_route_epoch ") for line in ours)
    assert "everloop_gateway_dropped_total 0.0" in ours
    assert not any(word in line for line in ours for word in ("default", "assistant", "anna", "ep_"))
    assert json.loads(status)["gateway"]["engine"] == "http://127.0.0.1:1"
    (event,) = recorded(home)
    assert "no engine answers" in event.payload.error
