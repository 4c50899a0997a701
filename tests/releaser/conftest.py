"""A small engine that speaks the dialect, and a home with a log, for the releaser's tests."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from everloop import wire
from everloop.config import Config
from everloop.contract import Contract
from everloop.episode import Episode, Turn
from everloop.event import Call, Event, Message
from everloop.feedback import Feedback
from everloop.home import Home
from everloop.log import NewRecord, open_log
from everloop.release import Adapter, Release, Route
from everloop.run import STANDING, Command, CommandKind
from everloop.topics import ADAPTERS, COMMANDS, EPISODES, EVENTS, PAUSES, RELEASES, ROUTES, Topic

from pipelines.gold import GoldItem, GoldSet
from services.gateway.replicas import Replicas
from services.releaser.examiner import Examiner
from services.releaser.porter import Porter
from services.releaser.releaser import Releaser
from services.releaser.report import Board

TENANT, POLICY = "default", "assistant"
TOPICS = ("card", "loan", "cash", "app", "fee")


class Engine:
    """An engine over HTTP in a thread: holds adapters, answers gold questions, forgets all at a restart."""

    def __init__(self) -> None:
        self.adapters: dict[str, float] = {}
        self.right: dict[str, Callable[[str], str]] = {}
        self.refuses: str | None = None
        self.delay = 0.0
        self.asked = 0
        self.orders: list[tuple[str, str]] = []  # what was loaded, dropped, or asked for a first token
        self.first_token = threading.Event()  # it gives none before
        self.first_token.set()
        self.ends_over: str | None = None  # it dies of this adapter's first token
        self.ends_under: str | None = None  # it dies of a question to this adapter
        self.base = "tiny-k2"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.start()

    def start(self) -> None:
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def stop(self) -> None:
        """As a killed process: nobody answers, and the adapters are gone."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self.adapters.clear()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._score)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await self._site.start()

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        named = [{"id": self.base}, *({"id": name, "parent": self.base} for name in self.adapters)]
        return web.json_response({"data": named})

    async def _load(self, request: web.Request) -> web.Response:
        if self.refuses:
            return web.json_response({"error": {"message": self.refuses}}, status=503)
        name = (await request.json())["lora_name"]
        self.orders.append(("load", name))
        self.adapters.setdefault(name, time.time())
        return web.json_response({"ok": True})

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.orders.append(("unload", name))
        self.adapters.pop(name, None)
        return web.json_response({"ok": True})

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked += 1
        await asyncio.sleep(self.delay)
        if body["model"] == self.ends_under:
            await self._end(request)
        if body["model"] != self.base and body["model"] not in self.adapters:
            return web.json_response({"error": {"message": "no such model", "code": "model_not_found"}}, status=404)
        text = self.right.get(body["model"], lambda _: "other")(body["messages"][-1]["content"])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        choice["token_ids"] = [7, 2]
        return web.json_response({"id": "x", "choices": [choice], "prompt_token_ids": [1, 5]})

    async def _score(self, request: web.Request) -> web.Response:
        body = await request.json()
        if isinstance(body["prompt"], str):
            return await self._first(request, body["model"])
        logprob = -0.1 if body["model"] != self.base else -0.4
        rows = [None, *({str(token): {"logprob": logprob}} for token in body["prompt"][1:])]
        return web.json_response({"choices": [{"index": 0, "text": "", "prompt_logprobs": rows}]})

    async def _first(self, request: web.Request, model: str) -> web.Response:
        if model == self.ends_over:
            await self._end(request)
        while not self.first_token.is_set():
            await asyncio.sleep(0.01)
        if model not in self.adapters:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        self.orders.append(("first token", model))
        return web.json_response({"choices": [{"index": 0, "text": "x"}]})

    async def _end(self, request: web.Request) -> None:
        """As a process that dies of a request."""
        await self._site.stop()
        self.adapters.clear()
        assert request.transport is not None
        request.transport.abort()


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.stop()


class World:
    """One installation on disk, with what a gateway, an assembler and a learner would have written to its log."""

    def __init__(self, home: Home, engine: Engine, **policy: Any) -> None:
        self.home = home
        self.engine = engine
        fields: dict[str, Any] = {
            "home": home.root,
            "cache": home.root / "cache",
            "serving": {"url": f"http://127.0.0.1:{engine.port}"},
            "mlflow": {"uri": "http://127.0.0.1:9", "poll": 0},  # nobody answers there
            "tenants": {TENANT: {"policies": {POLICY: {"base": "tiny-k2", "max_tokens": 8, **policy}}}},
        }
        self.fields = fields
        self.config = Config.model_validate(fields)
        self.log = open_log(self.config)
        self._count = itertools.count()

    def append(self, topic: Topic, *contracts: Any) -> None:
        keys = [f"{one.key}/{one.id}" if topic is RELEASES else getattr(one, "log_key", one.key) for one in contracts]
        self.log.append([NewRecord(topic.name, k, wire.encode(o)) for k, o in zip(keys, contracts, strict=True)])

    def read(self, topic: Topic, contract: type[Contract]) -> list[Any]:
        return [
            wire.decode(contract, record.value)
            for partition in range(self.log.partitions(topic.name))
            for record in self.log.read(topic.name, partition, 0, 100_000)
            if record.value is not None
        ]

    def releases(self) -> list[Release]:
        return self.read(RELEASES, Release)

    def routes(self) -> list[Route]:
        return self.read(ROUTES, Route)

    def newest(self, adapter: str) -> Release | None:
        return max((r for r in self.releases() if r.adapter == adapter), key=lambda r: r.step, default=None)

    def state(self, adapter: str) -> str:
        newest = self.newest(adapter)
        return "" if newest is None else newest.state.value

    def route(self) -> Route | None:
        return max(self.routes(), key=lambda r: r.epoch, default=None)

    def live(self) -> str:
        route = self.route()
        return "base" if route is None else route.live

    def gold(self, items: int = 200) -> None:
        made = [
            GoldItem.of(f"question {i} about {TOPICS[i % 5]}", TOPICS[i % 5], slice=TOPICS[i % 5], split="gate")
            for i in range(items)
        ]
        GoldSet(self.home.root / "gold").add(TENANT, POLICY, made)

    def knows(self, name: str, skill: float) -> None:
        """The engine answers this share of the gold questions right with that adapter."""
        self.engine.right[name] = answering(skill)

    def announce(self, name: str, *, skill: float | None = 1.0, files: bool = True) -> Adapter:
        """A trained adapter; ``skill`` is the share of gold questions that it answers right."""
        if files:
            self.home.folder("adapters", name)
        if skill is not None:
            self.knows(name, skill)
        adapter = Adapter(
            hash=name, tenant=TENANT, policy=POLICY, base="tiny-k2", run=f"run-{name}", batch="b",
            uri=f"models:/default.assistant/{len(self.engine.right)}", rank=4, targets=("q",), time=time.time(),
        )  # fmt: skip
        self.append(ADAPTERS, adapter)
        return adapter

    def order(self, kind: CommandKind, **arguments: Any) -> Command:
        command = Command(
            id=f"cmd-{next(self._count)}", kind=kind, tenant=TENANT, policy=POLICY, arguments=arguments, by="ann",
            time=time.time(),
        )  # fmt: skip
        self.append(PAUSES if kind in STANDING else COMMANDS, command)
        return command

    def traffic(
        self,
        units: int,
        liked: dict[str, float],
        *,
        error: str | None = None,
        first: int = 0,
        says: dict[str, Any] | None = None,
    ) -> int:
        """Rated episodes of new people, assigned by the route that is in force. ``liked``: success by arm.

        ``says``: fields of the canary's calls. Returns how many of them were the canary's.
        """
        route = self.route()
        assert route is not None
        events, episodes = [], []
        for i in range(first, first + units):
            version, arm, probability = route.assign(f"person {i}")
            good = i % 100 < 100 * liked.get(arm, 0.6)
            failed = error if arm == "canary" else None
            fields: dict[str, Any] = {
                "output": Message(role="assistant", content=None if failed else "card"),
                "error": failed,
            }
            fields |= (says or {}) if arm == "canary" else {}
            call = Call(
                id=f"call-{i}", messages=(Message(role="user", content="hi"),), policy_version=version, arm=arm,
                release=route.release, probability=probability, **fields,
            )  # fmt: skip
            thumb = Feedback(id=f"f-{i}", kind="thumb", value=1 if good else -1, call=call.id, time=1.0)
            events.append(Event(id=f"ev-{i}", tenant=TENANT, policy=POLICY, episode=f"ep-{i}", time=1.0, payload=call))
            episodes.append(Episode(
                tenant=TENANT, policy=POLICY, id=f"ep-{i}", version=1, subject=f"person {i}", started=1.0, updated=1.0,
                turns=(Turn(call=call, feedback=() if failed else (thumb,)),),
            ))  # fmt: skip
        self.append(EVENTS, *events)
        self.append(EPISODES, *episodes)
        return sum(one.turns[0].call.arm == "canary" for one in episodes)


class Running:
    """A releaser in a thread, as its service runs it."""

    def __init__(self, world: Any) -> None:
        self.examiner = Examiner(world.config, Replicas(world.config.serving.urls))
        self.releaser = Releaser(world.config, world.log, self.examiner)
        self.board = Board()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.releaser.run, args=(self._stop, self.board.update))
        self.examiner.start()
        self._thread.start()

    def end(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join(10)
            self.examiner.close()

    def policy(self) -> dict[str, Any]:
        return self.board.policies.get("default/assistant", {})

    def answer(self, command: Any) -> dict[str, Any]:
        return self.board.commands.get(command.id, {})


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the files process would have been asked; the files are there already."""
    asked: list[dict[str, Any]] = []

    async def ask(self: Porter, do: str, **arguments: Any) -> None:
        asked.append({"do": do, **arguments})

    monkeypatch.setattr(Porter, "ask", ask)
    return asked


@pytest.fixture
def start(brought: list[dict[str, Any]]) -> Iterator[Callable[[Any], Running]]:
    made: list[Running] = []

    def starter(world: Any) -> Running:
        made.append(Running(world))
        return made[-1]

    yield starter
    for running in made:
        running.end()


class Process:
    """``python -m services.releaser`` on a world's home."""

    def __init__(self, world: Any, base: str, canary: dict[str, Any]) -> None:
        self.world = world
        self.config = world.home.root / "everloop.toml"
        world.home.folder()
        self.config.write_text(
            f'home = "{world.home.root}"\ncache = "{world.home.root}/cache"\n'
            f'[serving]\nurl = "http://127.0.0.1:{world.engine.port}"\n[services]\nreleaser_port = 0\n'
            f'[mlflow]\nuri = "http://127.0.0.1:9"\n'
            f'[tenants.default.policies.assistant]\nbase = "{base}"\nmax_tokens = 8\n'
            "[tenants.default.policies.assistant.canary]\n"
            + "\n".join(f"{name} = {value}" for name, value in canary.items())
        )
        self.running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
        with (self.world.home.root / "releaser.log").open("ab") as log:
            self.running = subprocess.Popen(
                [sys.executable, "-m", "services.releaser"],
                env={**environment, "EVERLOOP_CONFIG": str(self.config), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        assert self.running is not None
        self.running.send_signal(signal.SIGKILL)
        self.running.wait()

    def killed_and_started(self) -> None:
        self.kill()
        self.start()


@pytest.fixture
def process_of() -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def make(world: World, base: str, canary: dict[str, Any]) -> Process:
        made.append(Process(world, base, canary))
        return made[-1]

    yield make
    for one in made:
        if one.running is not None and one.running.poll() is None:
            one.kill()


def answering(skill: float) -> Callable[[str], str]:
    def answer(question: str) -> str:
        if not question.startswith("question"):
            return "card"
        number = int(question.split()[1])
        right = question.split()[-1]
        return right if number % 20 < 20 * skill else "fee" if right != "fee" else "card"

    return answer


@pytest.fixture
def world(home: Home, engine: Engine) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(**policy: Any) -> World:
        made.append(World(home, engine, **policy))
        return made[-1]

    yield make
    for one in made:
        one.log.close()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of Kimi K2's architecture that knows next to nothing, made in a moment."""
    from trainer.policy import tiny_k2

    folder = tmp_path_factory.mktemp("bases") / "tiny"
    small = tiny_k2.Settings(
        steps=(1, 1), hidden=32, vocabulary=400, dense_width=32, expert_width=16, batch=4, context=64
    )
    tiny_k2.build(folder, [("hello there", "greet"), ("bye now", "leave")] * 4, settings=small)
    return folder


@pytest.fixture
def adapters(tiny_base: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Write some real adapters of that base into a folder; returns their hashes."""

    def make(folder: Path, count: int) -> list[str]:
        import torch

        from trainer.policy import base, lora

        policy = base.load(str(tiny_base), tmp_path)
        made = []
        for seed in range(count):
            model = lora.attach(policy, 2, 4.0, seed=seed)
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed)
                for name, weights in model.named_parameters():
                    if "lora_B" in name:
                        weights.normal_(0.0, 0.02)
            made.append(lora.save(model, folder))
        return made

    return make
