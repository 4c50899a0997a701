"""What each engine is made to hold, over stub engines that can be told to fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from everloop.errors import AdapterRefused, ServingError
from everloop.release import Release

from services.gateway.replicas import Replicas
from services.releaser.residents import ENDS, Residents
from tests.releaser.conftest import Engine

ROOM = 3
Soon = Callable[[Callable[[], object]], Any]


def release(adapter: str) -> Release:
    return Release(id=f"r-{adapter}", tenant="t", policy="p", adapter=adapter, uri="", time=1.0)


class Manager:
    """Residents of two engines."""

    def __init__(self, a: Engine, b: Engine) -> None:
        self.a, self.b = a, b
        self.replicas = Replicas([f"http://127.0.0.1:{engine.port}" for engine in (a, b)])
        self.residents = Residents(self.replicas, ROOM, self._files)
        self._task: asyncio.Task[None] | None = None

    async def _files(self, release: Release) -> Path:
        return Path("/adapters") / release.adapter

    def want(self, *adapters: str, known: str = "abcdefgh") -> None:
        self.residents.keep({name: release(name) for name in adapters}, set(known), {})

    async def hold(self, adapter: str) -> None:
        await self.residents.hold(release(adapter))

    def reconcile(self) -> None:
        self._task = asyncio.create_task(self.residents.keep_reconciled())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.replicas.close()


@pytest.fixture
async def manager() -> AsyncIterator[Manager]:
    a, b = Engine(), Engine()
    made = Manager(a, b)
    yield made
    await made.close()
    for engine in (a, b):
        engine.first_token.set()
        await asyncio.to_thread(engine.stop)


@pytest.fixture
def soon() -> Soon:
    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.01)

    return wait


async def test_an_adapter_is_held_once_every_engine_has_answered_with_it(manager: Manager, soon: Soon) -> None:
    manager.b.first_token.clear()
    held = asyncio.create_task(manager.hold("a"))
    await soon(lambda: ("first token", "a") in manager.a.orders and "a" in manager.b.adapters)
    assert manager.residents.held == frozenset()
    assert not held.done()
    manager.b.first_token.set()
    await held
    assert manager.residents.held == {"a"}
    for engine in (manager.a, manager.b):
        assert engine.orders == [("load", "a"), ("first token", "a")]
    await manager.hold("a")
    assert len(manager.a.orders) == 2, "what is warm is asked no more"


async def test_one_that_is_away_holds_nobody_up_and_gets_its_adapters_when_it_is_back(
    manager: Manager, soon: Soon
) -> None:
    await asyncio.to_thread(manager.b.stop)
    manager.want("a")
    await manager.hold("a")
    assert manager.residents.held == {"a"}
    manager.reconcile()
    await soon(lambda: str(manager.b.port) in (manager.residents.trouble or ""))
    manager.b.first_token.clear()
    await asyncio.to_thread(manager.b.start)
    await soon(lambda: "a" in manager.b.adapters)
    assert manager.residents.held == frozenset(), "it is up, and has not answered yet"
    manager.b.first_token.set()
    await soon(lambda: manager.residents.held == {"a"})
    await soon(lambda: manager.residents.trouble is None)
    assert [its["holds"] for its in manager.residents.described()] == [["a"], ["a"]]


async def test_where_no_engine_is_up_nothing_is_held(manager: Manager) -> None:
    await manager.hold("a")
    for engine in (manager.a, manager.b):
        await asyncio.to_thread(engine.stop)
    with pytest.raises(ServingError, match="no engine answers"):
        await manager.hold("a")
    assert manager.residents.held == frozenset()


async def test_one_that_is_up_and_does_not_take_it_is_no_replica_that_may_be_skipped(manager: Manager) -> None:
    manager.b.refuses = "no room"
    with pytest.raises(ServingError, match="no room"):
        await manager.hold("a")
    assert manager.residents.held == frozenset()
    manager.b.refuses = None
    await manager.hold("a")
    assert manager.residents.held == {"a"}


async def test_an_engine_that_was_started_anew_between_two_looks_has_nothing_warm(manager: Manager, soon: Soon) -> None:
    manager.want("a")
    manager.reconcile()
    await soon(lambda: manager.residents.held == {"a"})
    manager.b.adapters.clear()
    manager.b.orders.clear()
    await soon(lambda: len(manager.b.orders) == 2)
    assert manager.b.orders == [("load", "a"), ("first token", "a")]


async def test_a_manager_that_is_started_anew_asks_what_is_loaded_once(manager: Manager) -> None:
    await manager.hold("a")
    another = Manager(manager.a, manager.b)
    assert another.residents.held == frozenset()
    await another.hold("a")
    assert another.residents.held == {"a"}
    assert [what for what, _ in manager.a.orders].count("first token") == 2
    await another.close()


async def test_the_one_that_was_wanted_longest_ago_makes_room(manager: Manager) -> None:
    manager.a.adapters["z: somebody else's"] = 0.0
    for wanted in ("b", "c", "a"):  # one after the other is live, then the first again
        manager.want(wanted)
        await manager.hold(wanted)
    assert set(manager.a.adapters) == {"z: somebody else's", "c", "a"}
    assert set(manager.b.adapters) == {"a", "b", "c"}
    manager.want("c")
    manager.want("d")
    await manager.hold("d")
    assert set(manager.a.adapters) == {"z: somebody else's", "c", "d"}
    assert set(manager.b.adapters) == {"a", "c", "d"}
    assert manager.residents.held == {"c", "d"}


async def test_none_that_is_wanted_or_in_use_is_dropped(manager: Manager) -> None:
    manager.want("a", "b")
    for adapter in "ab":
        await manager.hold(adapter)
    with manager.residents.using("c"):
        await manager.hold("c")
        await manager.hold("d")
        assert set(manager.a.adapters) == {"a", "b", "c", "d"}, "beyond its room, rather than without one in use"
    await manager.hold("e")
    assert set(manager.a.adapters) == {"a", "b", "e"}
    manager.want("b")
    await manager.hold("f")
    assert set(manager.a.adapters) == {"a", "b", "f"}, "'a' was wanted after 'e' was in use"


async def test_an_adapter_over_which_engines_end_again_and_again_is_refused(manager: Manager) -> None:
    engine = manager.a
    await asyncio.to_thread(manager.b.stop)
    engine.ends_over = "a"
    for _ in range(ENDS):
        with pytest.raises(ServingError):
            await manager.hold("a")
        await asyncio.to_thread(engine.stop)
        await asyncio.to_thread(engine.start)
    loads = engine.orders.count(("load", "a"))
    assert loads == ENDS
    with pytest.raises(AdapterRefused, match="3 engines ended while they loaded adapter a"):
        await manager.hold("a")
    assert engine.orders.count(("load", "a")) == loads, "it is not tried again"
    await manager.hold("b")
    assert manager.residents.held == {"b"}


async def test_engines_that_end_by_themselves_are_not_blamed_on_what_they_loaded(manager: Manager) -> None:
    engine = manager.a
    await asyncio.to_thread(manager.b.stop)
    for _ in range(ENDS):
        engine.adapters.clear()
        engine.ends_over = "a"
        with pytest.raises(ServingError):
            await manager.hold("a")
        await asyncio.to_thread(engine.stop)
        await asyncio.to_thread(engine.start)
        engine.ends_over = None
        await manager.hold("a")
    assert manager.residents.held == {"a"}
