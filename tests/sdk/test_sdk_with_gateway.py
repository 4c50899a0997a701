"""What the SDK sends, taken by the real gateway and assembled: an agent's run becomes one complete episode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import everloop
import openai
import pytest
from aiohttp import web
from everloop.config import Config
from everloop.episode import Episode, Split
from everloop.event import Event
from everloop.feedback import FeedbackKind
from everloop.home import Home
from everloop.log import open_log
from everloop.log.base import Log
from everloop.wire import decode

from pipelines.assemble import Placed, assemble
from services.gateway.app import Gateway

ASK = {"model": "desk", "messages": [{"role": "user", "content": "Where is my card?"}]}


class OneWordEngine:
    """The serving port: always the same answer, with a token and its log-probability."""

    async def complete(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        logprobs = {"content": [{"token": "card", "logprob": -0.5, "bytes": None, "top_logprobs": []}]}
        message = {"role": "assistant", "content": "card"}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "token_ids": [7], "logprobs": logprobs}
        return {
            "id": "e",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [choice],
            "prompt_token_ids": [1, 2],
            "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
        }

    async def healthy(self) -> bool:
        return True

    async def close(self) -> None: ...


class Platform:
    def __init__(self, url: str, key: str, log: Log, home: Home) -> None:
        self.url = url
        self.key = key
        self._log = log
        self._home = home

    def episodes(self) -> dict[str, Episode]:
        """Assembled from all events in the log, by id."""
        placed: dict[str, list[Placed]] = {}
        for partition in range(self._log.partitions("events")):
            for record in self._log.read("events", partition, 0, 10_000):
                event = decode(Event, record.value or b"", self._home.blobs)
                placed.setdefault(event.episode, []).append(Placed(record.offset, event))
        made = [one.episode for events in placed.values() for one in assemble(events, lambda *_: Split.TRAIN)]
        return {episode.id: episode for episode in made}

    @property
    def ids(self) -> Any:
        return self._home.ids


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    config = Config.model_validate(
        {"home": tmp_path / "home", "tenants": {"bank": {"policies": {"desk": {"base": "tiny"}}}}}
    )
    home, log = Home(config.home), open_log(config)
    gateway = Gateway(config, home, log, OneWordEngine())  # type: ignore[arg-type]
    gateway.prepare()
    app = web.Application()
    gateway.add_to(app)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    key = gateway.keys.create("bank")
    everloop.configure(url, key, strict=True)
    yield Platform(url, key, log, home)
    await asyncio.to_thread(everloop.configure, None, None)
    await runner.cleanup()
    gateway.close()


async def test_an_agents_run_is_one_complete_episode(platform: Platform) -> None:
    client = everloop.wrap(openai.AsyncOpenAI(base_url=platform.url, api_key=platform.key))
    async with everloop.record("ticket-1", policy="desk", subject="ann") as episode:
        first = await client.chat.completions.create(**ASK)
        episode.tool("route", {"topic": "card"}, "cards")
        second = await client.chat.completions.create(**ASK)
    episode.thumb(True, call=first, rater="ann")
    episode.correct("lost_card", call=second)
    episode.outcome(1.0, name="solved")
    assert await asyncio.to_thread(everloop.flush)
    assert (everloop.stats().sent, everloop.stats().dropped) == (5, {})
    found = platform.episodes()[platform.ids.episode_named("bank", "ticket-1")]
    assert found.complete
    assert found.subject == platform.ids.pseudonym("bank", "subject", "ann")
    assert [[tool.result for tool in turn.tools] for turn in found.turns] == [["cards"], []]
    assert [[word.kind for word in turn.feedback] for turn in found.turns] == [
        [FeedbackKind.THUMB],
        [FeedbackKind.CORRECTION],
    ]
    assert found.turns[1].correction == "lost_card"
    assert found.outcome == 1.0


async def test_capture_off_leaves_nothing(platform: Platform) -> None:
    client = everloop.wrap(openai.AsyncOpenAI(base_url=platform.url, api_key=platform.key))
    async with everloop.record(capture=False) as episode:
        answer = await client.chat.completions.create(**ASK)
        episode.tool("route")
    assert answer.choices[0].message.content == "card"
    assert await asyncio.to_thread(everloop.flush)
    assert not platform.episodes()


async def test_recorded_calls_and_feedback_by_response_id(platform: Platform) -> None:
    with everloop.record("replayed", policy="desk") as episode:
        call = episode.call(ASK["messages"], {"role": "assistant", "content": "lost_card"}, model="elsewhere")
        episode.tool("route", "{}", "Error: none", error=True)
    client = openai.AsyncOpenAI(base_url=platform.url, api_key=platform.key)
    answer = await client.chat.completions.create(**ASK)
    everloop.give_feedback(response_id=answer.id, thumb=-1)
    assert await asyncio.to_thread(everloop.flush)
    assert everloop.stats().dropped == {}
    replayed = platform.episodes()[platform.ids.episode_named("bank", "replayed")]
    assert (replayed.complete, replayed.turns[0].call.id, replayed.turns[0].tools[0].error) == (True, call, True)
    other = next(one for one in platform.episodes().values() if one.id != replayed.id)
    assert other.turns[0].feedback[0].value == -1.0


async def test_a_token_gives_feedback_about_its_episode(platform: Platform) -> None:
    async with everloop.record("ticket-2", policy="desk") as episode:
        token = await asyncio.to_thread(episode.feedback_token, 60)
    assert token is not None
    assert token.startswith("ft_")


async def test_one_bad_item_takes_no_other_with_it(platform: Platform) -> None:
    everloop.give_feedback(response_id="chatcmpl-nobodys", thumb=1)
    for number in range(5):
        everloop.give_feedback(episode=f"e{number}", thumb=1)
    assert await asyncio.to_thread(everloop.flush)
    assert everloop.stats().sent == 5
    assert list(everloop.stats().dropped) == ["http 404 response_not_found"]
