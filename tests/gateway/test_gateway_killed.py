"""A real gateway process: kill -9 before, during and after answers, and what it says of itself."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import aiohttp
import pytest
from everloop.home import Home

from services.gateway.keys import Keys
from tests.gateway.conftest import recorded

pytestmark = pytest.mark.processes


async def test_what_was_acknowledged_survives_kill_9_exactly_once(
    home: Home, engine_url: str, soon: Any, process_of: Any, agent_of: Any
) -> None:
    process = process_of(home.folder(), engine_url)
    key = Keys(home.root / "keys.db").create("default")
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http:
        agent = agent_of(process, key, http)
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
    assert all(each.checked and len(each.completion) == 20 for each in tokens)
    # The keys make a turn that was durable when its gateway died the answer to its retry, not a second turn.
    assert len(calls) == agent.asked


async def test_without_an_engine_it_is_alive_and_not_ready_and_says_what_it_does(home: Home, process_of: Any) -> None:
    process = process_of(home.folder(), "http://127.0.0.1:1")
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
    assert json.loads(status)["replicas"][0]["url"] == "http://127.0.0.1:1"
    (event,) = recorded(home)
    assert "no engine answers" in event.payload.error
