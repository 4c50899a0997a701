"""A gateway on a free port, over the embedded log, before an engine that answers as a test tells it; and one in a
process of its own, before an HTTP engine, with an agent that keeps asking."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from everloop.config import Config
from everloop.errors import ServingError, UnknownAdapter
from everloop.event import Event
from everloop.home import Home
from everloop.log import connect, open_log
from everloop.log.base import Log, NewRecord
from everloop.release import Route
from everloop.serving.base import Serving
from everloop.wire import decode, encode

from services.gateway.app import Gateway
from tests.provider import KEY, StrictProvider

BASE_MODEL = "tiny"
TENANTS = {
    "bank": {"policies": {"assistant": {"base": BASE_MODEL}, "writer": {"base": BASE_MODEL, "max_tokens": 7}}},
    "airline": {"policies": {"assistant": {"base": BASE_MODEL}}},
}


class Engine:
    """The serving port, told what to say. One token a word; ``paused`` holds a stream after its first chunk."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.says = "the card is on its way"
        self.tool_calls: list[dict[str, Any]] = []
        self.held = {BASE_MODEL}
        self.error: Exception | None = None
        self.break_after: int | None = None
        self.resume = asyncio.Event()
        self.resume.set()
        self.cancelled = 0
        self.gives_raw = False
        self.change: Callable[[dict[str, Any]], None] = lambda body: None

    def _hear(self, body: dict[str, Any]) -> None:
        self.asked.append(body)
        if self.error is not None:
            raise self.error
        if body["model"] not in self.held:
            raise UnknownAdapter(f"no model {body['model']}")

    async def _wait(self) -> None:
        try:
            await self.resume.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def complete(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        self._hear(body)
        await self._wait()
        choices = [self._choice(route, body, at) for at in range(body.get("n", 1))]
        answer = {"id": "engine-1", "object": "chat.completion", "created": 1, "model": body["model"]}
        answer |= {"choices": choices, "usage": self._usage(len(choices)), "prompt_token_ids": [1, 2, 3]}
        self.change(answer)
        return answer

    async def stream(self, route: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        self._hear(body)
        head = {"id": "engine-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        words = self.says.split(" ")
        count = body.get("n", 1)
        for at, word in enumerate(words):
            if at == 1:
                await self._wait()
            if self.break_after == at:
                raise ServingError("the engine broke off", code="upstream_broken")
            last = at == len(words) - 1
            for index in range(count):
                choice = self._part(route, body, index, at, (" " if at else "") + word, last)
                chunk = {**head, "choices": [choice]}
                if at == 0 and index == 0:
                    chunk["prompt_token_ids"] = [1, 2, 3]
                yield chunk
        yield {**head, "choices": [], "usage": self._usage(count)}

    def _choice(self, route: str, body: dict[str, Any], index: int) -> dict[str, Any]:
        words = self.says.split(" ")
        choice: dict[str, Any] = {"index": index, "finish_reason": "stop", "logprobs": None}
        if route == "completions":
            choice["text"] = self.says
        else:
            choice["message"] = {"role": "assistant", "content": self.says}
            if self.tool_calls:
                choice["message"] = {"role": "assistant", "content": None, "tool_calls": self.tool_calls}
        return choice | self._recorded(route, body, words, 0)

    def _part(self, route: str, body: dict[str, Any], index: int, at: int, text: str, last: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": "stop" if last else None, "logprobs": None}
        if route == "completions":
            choice["text"] = text
        else:
            choice["delta"] = ({"role": "assistant"} if at == 0 else {}) | {"content": text}
            if self.tool_calls:
                calls = (
                    [self._called(call, n, last) for n, call in enumerate(self.tool_calls)] if at == 0 or last else []
                )
                choice["delta"] = {"role": "assistant", "tool_calls": calls} if calls else {}
        return choice | self._recorded(route, body, [text], at)

    def _called(self, call: dict[str, Any], index: int, last: bool) -> dict[str, Any]:
        """A tool call's first half, then its second."""
        arguments = call["function"]["arguments"]
        if last:
            return {"index": index, "function": {"arguments": arguments[3:]}}
        function = {"name": call["function"]["name"], "arguments": arguments[:3]}
        return {"index": index, "id": call["id"], "type": "function", "function": function}

    def _recorded(self, route: str, body: dict[str, Any], words: list[str], at: int) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if body.get("return_token_ids"):
            fields["token_ids"] = [100 + at + n for n in range(len(words))]
            if self.gives_raw:
                fields["raw_logprobs"] = [-0.5] * len(words)
        if body.get("logprobs") is not None and route == "chat/completions":
            content = [{"token": w, "logprob": -0.25, "bytes": None, "top_logprobs": []} for w in words]
            fields["logprobs"] = {"content": content}
        elif body.get("logprobs") is not None:
            fields["logprobs"] = {"tokens": words, "token_logprobs": [-0.25] * len(words)}
        return fields

    def _usage(self, count: int) -> dict[str, int]:
        completion = count * len(self.says.split(" "))
        return {"prompt_tokens": 3, "completion_tokens": completion, "total_tokens": 3 + completion}

    async def load(self, name: str, folder: Path) -> None:
        self.held.add(name)

    async def unload(self, name: str) -> None:
        self.held.discard(name)

    async def adapters(self) -> frozenset[str]:
        return frozenset(self.held - {BASE_MODEL})

    async def healthy(self) -> bool:
        return True

    async def close(self) -> None: ...


class Bench:
    """A running gateway and everything around it."""

    def __init__(self, home: Home, config: Config, log: Log, engine: Engine, gateway: Gateway, url: str) -> None:
        self.home = home
        self.config = config
        self.log = log
        self.engine = engine
        self.gateway = gateway
        self.url = url
        self.key = gateway.keys.create("bank")
        self.http = aiohttp.ClientSession()
        self._clients: list[openai.AsyncOpenAI] = []

    def new_key(self, tenant: str = "bank", scope: str = "agent") -> str:
        return self.gateway.keys.create(tenant, scope)

    def client(self, key: str | None = None, retries: int = 0) -> openai.AsyncOpenAI:
        made = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=retries)
        self._clients.append(made)
        return made

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        await self.http.close()

    async def post(
        self, path: str, body: Any, key: str | None = None, **headers: str
    ) -> tuple[int, dict[str, Any], Any]:
        """(status, JSON body, response headers); ``body`` may be bytes. Underscores in header names are dashes."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        auth = {"Authorization": f"Bearer {key or self.key}"}
        sent = {"data": body} if isinstance(body, bytes) else {"json": body}
        async with self.http.post(self.url + path, headers=auth | named, **sent) as response:
            return response.status, await response.json(content_type=None), response.headers

    async def chat(self, text: str = "Where is my card?", **more: Any) -> tuple[int, dict[str, Any], Any]:
        headers = {name: more.pop(name) for name in list(more) if name[0].isupper()}
        key = more.pop("key", None)
        body = {"model": "assistant", "messages": [{"role": "user", "content": text}], **more}
        return await self.post("/v1/chat/completions", body, key, **headers)

    def events(self) -> list[Event]:
        """Everything in the log, in time order."""
        found = []
        for partition in range(self.log.partitions("events")):
            for record in self.log.read("events", partition, 0, 10_000):
                event = decode(Event, record.value or b"", self.home.blobs)
                assert record.headers["id"] == event.id
                assert record.headers["schema"] == "Event"
                assert record.key == event.key
                found.append(event)
        return sorted(found, key=lambda event: event.time)

    def route(self, epoch: int, tenant: str = "bank", policy: str = "assistant", **fields: Any) -> None:
        route = Route(tenant=tenant, policy=policy, epoch=epoch, time=1.0, **fields)
        self.log.append([NewRecord("routes", route.key, encode(route), {"schema": "Route"})])
        self.gateway.routes.catch_up()


def recorded(home: Home) -> list[Event]:
    """Everything in the embedded log of a home that another process has, partition by partition."""
    log = connect(f"sqlite:///{home.root / 'log.db'}")
    events = []
    for partition in range(log.partitions("events")):
        offset = 0
        while records := log.read("events", partition, offset):
            events += [decode(Event, record.value or b"", home.blobs) for record in records]
            offset = records[-1].offset + 1
    log.close()
    return events


def config_for(home: Home, **sections: Any) -> Config:
    return Config.model_validate({"home": home.root, "tenants": TENANTS, **sections})


async def serve(gateway: Gateway) -> tuple[web.AppRunner, str]:
    app = web.Application()
    gateway.add_to(app)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


@pytest.fixture
async def start(home: Home) -> AsyncIterator[Callable[..., Awaitable[Bench]]]:
    """Start a gateway; config sections as keyword arguments. Started again, it is another one on the same home.

    ``engine``: before that one, instead of one that the test tells what to say.
    """
    async with AsyncExitStack() as stack:

        async def started(
            wrap: Callable[[Log], Log] = lambda log: log, engine: Serving | None = None, **sections: Any
        ) -> Bench:
            config = config_for(home, **sections)
            log = wrap(open_log(config))
            told = Engine()
            gateway = Gateway(config, home, log, engine or told)
            gateway.prepare()
            runner, url = await serve(gateway)
            bench = Bench(home, config, log, told, gateway, url)
            stack.callback(gateway.close)
            stack.push_async_callback(runner.cleanup)
            stack.push_async_callback(bench.close)
            return bench

        yield started


@pytest.fixture
async def bench(start: Callable[..., Awaitable[Bench]]) -> Bench:
    return await start()


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictProvider]:
    """A provider that takes OpenAI's own parameters alone, its key in the environment."""
    monkeypatch.setenv("PROVIDER_KEY_OF_THIS_TEST", KEY)
    made = StrictProvider()
    yield made
    made.close()


@pytest.fixture
def soon() -> Callable[..., Awaitable[None]]:
    """Wait, inside the event loop, until a condition is true; fails after 30 seconds."""

    async def wait(condition: Callable[[], object], deadline: float = 30.0) -> None:
        async with asyncio.timeout(deadline):
            while not condition():
                await asyncio.sleep(0.01)

    return wait


WORDS = [f"w{at} " for at in range(20)]


async def word_engine(request: web.Request) -> web.StreamResponse:
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
    """Where such an engine answers."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", word_engine)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


class Process:
    """A gateway in a process of its own, on one port however often it is started."""

    def __init__(self, home: Path, engine_url: str, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._environment = {
            **os.environ,
            "EVERLOOP_HOME": str(home),
            "EVERLOOP_GATEWAY__PORT": str(self.port),
            "EVERLOOP_SERVING__URL": engine_url,
            **environment,
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

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def scribe(self) -> int:
        """The pid of its scribe; 0 while there is none."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        named = [
            int(pid) for pid in children if b"services.gateway.scribe" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return named[0] if named else 0

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(30)

    def gone(self) -> bool:
        return self._process is None or self._process.poll() is not None


class Agent:
    """Keeps asking, streamed and not, and notes every answer that it was given to the end."""

    def __init__(self, process: Process, key: str, http: aiohttp.ClientSession) -> None:
        self._process = process
        self._headers = {"Authorization": f"Bearer {key}"}
        self._http = http
        self.acknowledged: list[str] = []
        self.refused: list[int] = []
        self.slowest = 0.0
        self.asked = 0
        self.stopped = False

    async def ask_until_stopped(self, stream: bool, episode: str = "") -> None:
        """Each request has a key, and is tried again with it until it is answered. ``episode``: of all of them."""
        named = {"X-Everloop-Episode": episode} if episode else {}
        while not self.stopped:
            self.asked += 1
            headers = {**self._headers, **named, "Idempotency-Key": f"k{self.asked}"}
            while not await self._ask(stream, headers):
                if self.stopped:
                    return
                await asyncio.sleep(0.02)

    async def _ask(self, stream: bool, headers: dict[str, str]) -> bool:
        body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        began = time.monotonic()
        try:
            url = f"{self._process.url}/v1/chat/completions"
            async with self._http.post(url, json=body, headers=headers) as response:
                raw = await response.read()
                whole = raw.endswith(b"data: [DONE]\n\n") if stream else response.status == 200
                if whole:
                    self.acknowledged.append(response.headers["X-Everloop-Call"])
                    self.slowest = max(self.slowest, time.monotonic() - began)
                else:
                    self.refused.append(response.status)
                return whole
        except aiohttp.ClientError:
            return False


@pytest.fixture
def process_of() -> Iterator[Callable[..., Process]]:
    """Makes a gateway process: home, engine's URL, more of the environment. None of them outlives the test."""
    made: list[Process] = []

    def make(home: Path, engine_url: str, **environment: str) -> Process:
        made.append(Process(home, engine_url, **environment))
        return made[-1]

    yield make
    for process in made:
        if not process.gone():
            process.kill()


@pytest.fixture
def agent_of() -> type[Agent]:
    return Agent
