"""What ``model`` may name beside a policy; a pinned adapter that the engine lacks is asked for and waited for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from everloop.errors import LogError
from everloop.home import Home
from everloop.log.base import NewRecord
from everloop.log.embedded import EmbeddedLog
from everloop.names import Checkpoint, Checkpoints, Pin, PinState, checkpoint_name
from everloop.release import Adapter
from everloop.wire import decode, encode

from services.gateway.routes import Routes

A, B, C = "7aaa" + "1" * 28, "7bbb" + "2" * 28, "cccc" + "3" * 28
RUN = "run_4711"
ASKED: list[Any] = [{"role": "user", "content": "Where is my card?"}]


def announce(bench: Any, hash: str, version: int | str = "", tenant: str = "bank") -> None:
    uri = f"models:/{tenant}.assistant/{version}" if version else ""
    made = {"policy": "assistant", "base": "tiny", "run": "r", "batch": "b", "rank": 8, "targets": ()}
    adapter = Adapter(hash=hash, tenant=tenant, uri=uri, time=1.0, **made)
    append(bench, "adapters", adapter)


def append(bench: Any, topic: str, contract: Any) -> None:
    bench.log.append([NewRecord(topic, contract.key, encode(contract))])
    bench.gateway.routes.catch_up()


def trained(bench: Any, *steps: tuple[int, str], tenant: str = "bank", running: bool = True) -> None:
    kept = tuple(Checkpoint(step=step, adapter=adapter) for step, adapter in steps)
    its = {"run": RUN, "policy": "assistant", "running": running, "time": 5.0}
    append(bench, "checkpoints", Checkpoints(tenant=tenant, kept=kept, **its))


async def version(bench: Any, model: str, key: str) -> str:
    status, said, headers = await bench.chat(model=model, key=key)
    return headers["X-Everloop-Policy-Version"] if status == 200 else f"{status} {said['error']['code']}"


class Releaser:
    """Hears what is asked for, and answers as it is told: ``says`` gives state and reason for an adapter."""

    def __init__(self, bench: Any) -> None:
        self.heard: list[Pin] = []
        self.says: Callable[[str], tuple[PinState, str] | None] = lambda adapter: None
        self._bench = bench
        self._stop = threading.Event()
        self._following = threading.Thread(target=bench.gateway.routes.follow, args=(self._stop,))
        self._following.start()
        self._task = asyncio.create_task(self._answer())

    async def _answer(self) -> None:
        offset = 0
        while True:
            for record in self._bench.log.read("pins", 0, offset):
                offset = record.offset + 1
                pin = decode(Pin, record.value)
                said = self.says(pin.adapter) if pin.state is PinState.ASKED else None
                if pin.state is PinState.ASKED:
                    self.heard.append(pin)
                if said is not None:
                    if said[0] is PinState.HELD:
                        self._bench.engine.held.add(pin.adapter)
                    self._bench.log.append([self._record(pin, *said)])
            await asyncio.sleep(0.01)

    @staticmethod
    def _record(pin: Pin, state: PinState, reason: str) -> Any:
        answer = pin.model_copy(update={"state": state, "reason": reason, "time": time.time()})
        return NewRecord("pins", pin.key, encode(answer))

    async def close(self) -> None:
        self._task.cancel()
        self._stop.set()
        await asyncio.to_thread(self._following.join)


@pytest.fixture
async def releaser(bench: Any) -> AsyncIterator[Releaser]:
    made = Releaser(bench)
    yield made
    await made.close()


async def test_up_to_five_digits_are_the_registrys_version_and_all_else_begins_a_hash(bench: Any) -> None:
    key = bench.new_key(scope="research")
    bench.engine.held |= {A, B, C}
    announce(bench, A, 12)
    announce(bench, B, 7)
    announce(bench, C)
    announce(bench, "d" * 32, 3, tenant="airline")
    said = {"assistant@7": B, "assistant@12": A, "assistant@7b": B, "assistant@c": C, f"assistant@{A}": A}
    assert {name: await version(bench, name, key) for name in said} == said
    for name in ("assistant@1", "assistant@77", "assistant@3", "assistant@d", "assistant@7a1", "assistant@v7"):
        assert await version(bench, name, key) == "404 model_not_found", name
    _, said, _ = await bench.chat(model="assistant@1", key=key)
    assert "no version 1" in said["error"]["message"]
    announce(bench, "7abc" + "4" * 28, 8)
    _, said, _ = await bench.chat(model="assistant@7a", key=key)
    assert "2 adapters begin so" in said["error"]["message"]


async def test_a_checkpoint_is_named_by_run_and_step_and_belongs_to_its_tenant(bench: Any) -> None:
    key = bench.new_key(scope="research")
    bench.engine.held |= {A, B}
    trained(bench, (10, A), (20, B))
    assert await version(bench, checkpoint_name(RUN, 10), key) == A
    assert await version(bench, checkpoint_name(RUN, "latest"), key) == B
    status, said, _ = await bench.chat(model=checkpoint_name(RUN, 15), key=key)
    assert (status, said["error"]["code"]) == (404, "model_not_found")
    assert "kept: 10, 20" in said["error"]["message"]
    for name in (checkpoint_name("run_0", 10), f"everloop://{RUN}", f"everloop://{RUN}/checkpoints/-1", "everloop://"):
        assert await version(bench, name, key) == "404 model_not_found", name
    airline = bench.new_key("airline", "research")
    assert await version(bench, checkpoint_name(RUN, 10), airline) == "404 model_not_found"
    assert await version(bench, checkpoint_name(RUN, 10), bench.key) == "403 insufficient_scope"
    trained(bench, (20, B), (30, A))
    assert await version(bench, checkpoint_name(RUN, 10), key) == "404 model_not_found", "its files are gone"
    assert await version(bench, checkpoint_name(RUN, "latest"), key) == A


async def test_what_was_pinned_is_recorded_as_it_was_and_marked(bench: Any) -> None:
    bench.engine.held |= {A}
    bench.route(1, live="base", canary=B, share=0.5, release="r1", uris={B: ""})
    trained(bench, (10, A))
    assert await version(bench, checkpoint_name(RUN, 10), bench.new_key(scope="research")) == A
    assert await version(bench, "assistant", bench.key) == "base"
    pinned, plain = (event.payload for event in bench.events())
    assert (pinned.pinned, pinned.policy_version, pinned.release) == (True, A, None)
    assert (plain.pinned, plain.policy_version, plain.release) == (False, "base", "r1")


async def test_a_list_of_models_has_what_may_be_pinned_for_those_who_may(bench: Any) -> None:
    announce(bench, A, 12)
    announce(bench, C)
    trained(bench, (10, A), (20, B))
    policies = ["assistant", "writer"]
    assert [model.id for model in (await bench.client().models.list()).data] == policies
    research = bench.client(bench.new_key(scope="research"))
    names = ["assistant@12", f"assistant@{C}", checkpoint_name(RUN, 20), checkpoint_name(RUN, 10)]
    models = (await research.models.list()).data
    assert [model.id for model in models] == [*policies, *names]
    assert {model.id: model.root for model in models[2:]} == dict(zip(names, (A, C, B, A), strict=True))
    assert (await research.models.retrieve("assistant@12")).root == A
    assert (await research.models.retrieve(checkpoint_name(RUN, 20))).root == B
    with pytest.raises(openai.NotFoundError):
        await bench.client().models.retrieve("assistant@12")
    trained(bench, (20, B), running=False)
    assert [model.id for model in (await research.models.list()).data] == [*policies, *names[:2]]


async def test_an_adapter_that_the_engine_lacks_is_asked_for_once_and_answers(bench: Any, releaser: Releaser) -> None:
    key = bench.new_key(scope="research")
    announce(bench, A, 7)
    releaser.says = lambda adapter: (PinState.HELD, "")
    asked = [version(bench, "assistant@7", key) for _ in range(4)]
    assert await asyncio.gather(*asked) == [A] * 4
    assert [(pin.adapter, pin.tenant, pin.policy) for pin in releaser.heard] == [(A, "bank", "assistant")]
    stream = await bench.client(key).chat.completions.create(model="assistant@7", messages=ASKED, stream=True)
    assert "".join([part.choices[0].delta.content or "" async for part in stream if part.choices]) == bench.engine.says
    bench.engine.held.discard(A)  # it was restarted
    assert await version(bench, "assistant@7", key) == A
    assert len(releaser.heard) == 2
    assert await version(bench, "writer@base", key) == "base"


@pytest.mark.parametrize(
    ("state", "status", "code", "after"),
    [
        (PinState.REFUSED, 422, "adapter_refused", None),
        (PinState.FULL, 503, "model_not_resident", "30"),
        (PinState.FAILED, 503, "model_not_resident", "5"),
    ],
)
async def test_the_releasers_reason_is_what_is_told(
    bench: Any, releaser: Releaser, state: PinState, status: int, code: str, after: str | None
) -> None:
    key = bench.new_key(scope="research")
    announce(bench, A, 7)
    releaser.says = lambda adapter: (state, "six others are live")
    for stream in (False, True):
        got, said, headers = await bench.chat(model="assistant@7", key=key, stream=stream)
        assert (got, said["error"]["code"], headers.get("Retry-After")) == (status, code, after)
        assert "six others are live" in said["error"]["message"]
    assert bench.events() == [], "nobody answered, and nobody failed to"


async def test_a_silent_releaser_is_not_waited_for_without_end(
    start: Callable[..., Awaitable[Any]], soon: Callable[..., Awaitable[None]]
) -> None:
    bench = await start(gateway={"pin_timeout": 0.2})
    announce(bench, A, 7)
    key = bench.new_key(scope="research")
    status, said, headers = await bench.chat(model="assistant@7", key=key)
    assert (status, said["error"]["code"], headers["Retry-After"]) == (503, "model_not_resident", "5")
    assert "within 0.2 s" in said["error"]["message"], "a pinned version never falls back"


async def test_an_adapter_in_use_is_asked_for_again(
    start: Callable[..., Awaitable[Any]], soon: Callable[..., Awaitable[None]]
) -> None:
    bench = await start(serving={"keep_pinned": "1s"})
    announce(bench, A, 7)
    bench.engine.held.add(A)
    key = bench.new_key(scope="research")

    def asked() -> list[Pin]:
        return [decode(Pin, record.value) for record in bench.log.read("pins", 0)]

    for _ in range(3):
        assert await version(bench, "assistant@7", key) == A
    await soon(asked)
    seen = asked()
    assert {pin.adapter for pin in seen} == {A}

    async with asyncio.timeout(30):  # once more, after a tenth of a second
        while len(asked()) == len(seen):
            assert await version(bench, "assistant@7", key) == A


def test_pins_are_followed_also_where_the_log_was_away_at_the_start(home: Home, tmp_path: Path) -> None:
    log = EmbeddedLog(tmp_path / "log.db")
    routes = Routes(log, home.blobs)
    with pytest.MonkeyPatch.context() as away:
        away.setattr(log, "end_offsets", lambda topic: (_ for _ in ()).throw(LogError("nobody answers")))
        with pytest.raises(LogError):
            routes.catch_up()
    routes.catch_up()
    routes.names.awaited.add("pin_1")
    its = {"tenant": "bank", "policy": "assistant", "adapter": A, "time": 1.0}
    for id, state in (("pin_1", "asked"), ("pin_2", "held"), ("pin_1", "held")):
        pin = Pin(id=id, state=PinState(state), **its)
        log.append([NewRecord("pins", pin.key, encode(pin))])
    routes.catch_up()
    assert {id: pin.state for id, pin in routes.names.said.items()} == {"pin_1": PinState.HELD}
    log.close()
