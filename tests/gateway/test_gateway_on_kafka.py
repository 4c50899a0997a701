"""A real gateway on a real broker that goes away: killed, frozen, a full disk. What was acknowledged is in Kafka."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from everloop.event import Event
from everloop.home import Home
from everloop.log import connect
from everloop.wire import decode

from services.broker.process import Broker
from services.gateway.keys import Keys

pytestmark = [pytest.mark.kafka, pytest.mark.processes]
FROZEN_SECONDS = float(os.environ.get("SOAK_FROZEN_SECONDS", "60"))
PATIENCE = 90.0


class OnKafka:
    """A gateway process before a broker, an agent with four episodes, and what is seen of them."""

    def __init__(self, home: Home, broker: Broker, process: Any, http: aiohttp.ClientSession, agent_of: Any) -> None:
        self.home = home
        self.url = f"kafka://{broker.address}/{home.root.parent.name}"
        self.process = process
        self.http = http
        self.key = Keys(home.root / "keys.db").create("default")
        self._agent_of = agent_of
        self.agents: list[Any] = []
        self._asking: list[asyncio.Task[None]] = []

    def ask(self) -> None:
        """Four agents begin, streaming or not, each with its own episode, and ask until :meth:`stop_asking`."""
        for at in range(4):
            agent = self._agent_of(self.process, self.key, self.http)
            self.agents.append(agent)
            self._asking.append(asyncio.create_task(agent.ask_until_stopped(at % 2 == 0, f"trip {at}")))

    async def stop_asking(self) -> None:
        for agent in self.agents:
            agent.stopped = True
        await asyncio.gather(*self._asking)

    @property
    def acknowledged(self) -> int:
        return sum(len(agent.acknowledged) for agent in self.agents)

    async def more(self, count: int) -> None:
        """Wait until so many more were acknowledged."""
        wanted = self.acknowledged + count
        async with asyncio.timeout(PATIENCE):
            while self.acknowledged < wanted:
                await asyncio.sleep(0.02)

    async def get(self, path: str) -> str:
        async with self.http.get(self.process.url + path) as response:
            return await response.text()

    async def metric(self, name: str) -> float:
        """Of the spool's; -1: it is not known yet."""
        begins = f"everloop_gateway_spool_{name} "
        found = [line for line in (await self.get("/metrics")).splitlines() if line.startswith(begins)]
        return float(found[0].split()[1]) if found else -1.0

    async def caught_up(self) -> None:
        """While requests go on there is always something in the spool; it is young once the broker takes it."""
        async with asyncio.timeout(PATIENCE):
            while not 0 <= await self.metric("oldest_seconds") < 3 or await self.metric("drained_total") <= 0:
                await asyncio.sleep(0.2)

    async def drained(self) -> None:
        """Once nobody asks any more."""
        async with asyncio.timeout(PATIENCE):
            while await self.metric("records") != 0 or await self.metric("drained_total") <= 0:
                await asyncio.sleep(0.2)

    def check(self) -> None:
        """Every acknowledged call is in Kafka, and each episode's are in the order in which they were acknowledged."""
        calls = [event.payload.id for event in self._events()]
        firsts = list(dict.fromkeys(calls))
        place = {call: at for at, call in enumerate(firsts)}
        for agent in self.agents:
            assert set(agent.acknowledged) <= set(firsts)
            assert len(set(agent.acknowledged)) == len(agent.acknowledged)
            places = [place[call] for call in agent.acknowledged]
            assert places == sorted(places)
        print(f"acknowledged {self.acknowledged}, in Kafka {len(calls)}, unique {len(firsts)}")

    def _events(self) -> Iterator[Event]:
        log = connect(self.url)
        try:
            for partition in range(log.partitions("events")):
                offset = 0
                while records := log.read("events", partition, offset):
                    offset = records[-1].offset + 1
                    yield from (decode(Event, record.value or b"", self.home.blobs) for record in records)
        finally:
            log.close()


@pytest.fixture
def on_kafka(own: Broker, engine_url: str, process_of: Any, agent_of: Any) -> Callable[..., Any]:
    @asynccontextmanager
    async def started(home: Home, **environment: str) -> AsyncIterator[OnKafka]:
        url = f"kafka://{own.address}/{home.root.parent.name}"
        process = process_of(home.folder(), engine_url, EVERLOOP_LOG__URL=url, **environment)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as http:
            bench = OnKafka(home, own, process, http, agent_of)
            await process.start(http)
            yield bench
            await bench.stop_asking()

    return started


async def test_kill_9_of_scribe_and_gateway_without_a_broker_loses_nothing(
    home: Home, own: Broker, on_kafka: Any, soon: Any
) -> None:
    async with on_kafka(home) as bench:
        bench.ask()
        await bench.more(20)
        own.kill()
        await bench.more(20)
        os.kill(bench.process.scribe, 9)
        await bench.more(20)
        bench.process.kill()
        await bench.process.start(bench.http)
        assert (await bench.metric("drained_total")) <= 0
        await bench.more(20)
        assert bench.process.scribe
        os.kill(bench.process.scribe, 9)
        await bench.more(20)
        own.start()
        await bench.more(20)
        await bench.stop_asking()
        await bench.drained()
        assert bench.process.end() == 0
        bench.check()


def resident(pid: int) -> float:
    """MB of memory of a process."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    return 0.0


async def test_while_the_broker_is_frozen_requests_are_served_in_flat_memory_and_it_recovers_by_itself(
    home: Home, own: Broker, on_kafka: Any
) -> None:
    async with on_kafka(home) as bench:
        bench.ask()
        await bench.more(200)
        before = resident(bench.process.pid), resident(bench.process.scribe)
        own.freeze()
        try:
            at_freeze, most = bench.acknowledged, before
            for _ in range(round(FROZEN_SECONDS)):
                await asyncio.sleep(1.0)
                now = resident(bench.process.pid), resident(bench.process.scribe)
                most = max(most[0], now[0]), max(most[1], now[1])
            served = bench.acknowledged - at_freeze
            waiting, oldest = await bench.metric("records"), await bench.metric("oldest_seconds")
            ready = await bench.get("/readyz")
        finally:
            own.thaw()
        thawed = time.monotonic()
        await bench.caught_up()
        took = time.monotonic() - thawed
        rebuilds = await bench.metric("rebuilds_total")
        await bench.stop_asking()
        await bench.drained()
        refused = [status for agent in bench.agents for status in agent.refused]
        slowest = max(agent.slowest for agent in bench.agents)
        assert bench.process.end() == 0
        bench.check()
    print(f"served {served} in {FROZEN_SECONDS:g} s, the slowest in {slowest:.2f} s; client rebuilt {rebuilds:g} times")
    print(f"{waiting:g} events in the spool at the end of the freeze, caught up {took:.1f} s after it")
    print(
        f"resident MB before and at most: gateway {before[0]:.0f}, {most[0]:.0f}; scribe {before[1]:.0f}, {most[1]:.0f}"
    )
    assert served > FROZEN_SECONDS
    assert refused == []
    assert waiting >= served * 0.9
    assert oldest > FROZEN_SECONDS * 0.8
    assert '"ok": true' in ready
    assert rebuilds >= 1 or FROZEN_SECONDS < 45
    assert most[0] < before[0] + 150, "answers are kept for retries, 64 MB of them at most"
    assert most[1] < before[1] + 100


@pytest.mark.parametrize("small_disk", [112], indirect=True)  # MB, of which the spool leaves 64 free
async def test_a_full_disk_refuses_and_recovers_without_a_person(
    small_disk: Path, own: Broker, on_kafka: Any, soon: Any
) -> None:
    async with on_kafka(Home(small_disk / "home")) as bench:
        body = {"model": "assistant", "messages": [{"role": "user", "content": "x" * 200_000}]}

        async def call(**headers: str) -> tuple[int, dict[str, str]]:
            auth = {"Authorization": f"Bearer {bench.key}", **headers}
            async with bench.http.post(f"{bench.process.url}/v1/chat/completions", json=body, headers=auth) as answer:
                if answer.status == 200 and not headers:
                    taken.append(answer.headers["X-Everloop-Call"])
                return answer.status, dict(answer.headers)

        taken: list[str] = []
        own.kill()
        async with asyncio.timeout(PATIENCE):
            while (outcome := await call())[0] == 200:
                pass
        assert outcome[0] == 503
        assert outcome[1]["Retry-After"] == "5"
        assert len(taken) > 50
        assert (await call(**{"X-Everloop-Capture": "off"}))[0] == 200
        with suppress(OSError), (small_disk / "ballast").open("wb") as ballast:  # others take the rest
            while ballast.write(bytes(1_000_000)):
                ballast.flush()
        own.start()
        assert (await call())[0] == 503
        (small_disk / "ballast").unlink()
        async with asyncio.timeout(PATIENCE):
            while (await call())[0] != 200:
                await asyncio.sleep(0.1)
        await bench.drained()
        assert bench.process.end() == 0
        found = {event.payload.id for event in bench._events()}
        assert set(taken) <= found
        print(f"acknowledged {len(taken)}, in Kafka {len(found)}")
