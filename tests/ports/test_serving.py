"""One suite over every backend of the serving port: the engine in this process, and behind HTTP.

A backend is an entry of ``BACKENDS``: a context that gives an engine which serves the base in a folder, under the
folder's path as the model's name, and loads adapters from ``home/adapters``.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from everloop.config import ServingConfig
from everloop.errors import AdapterRefused, ServingError, UnknownAdapter
from everloop.serving.base import Serving

from services.gateway.upstream import HttpServing
from tests.conftest import until

pytestmark = [pytest.mark.models, pytest.mark.processes]
CHAT = "chat/completions"
Opener = Callable[[], Awaitable[Serving]]


@contextmanager
def embedded(base_folder: Path, home: Path) -> Iterator[Opener]:
    from trainer.policy import base
    from trainer.rollout.embedded import EmbeddedServing

    policy = base.load(str(base_folder), home)

    async def opened() -> Serving:
        return EmbeddedServing([policy], ServingConfig(threads=1))

    yield opened


@contextmanager
def over_http(base_folder: Path, home: Path) -> Iterator[Opener]:
    process, url = start_engine(base_folder, home)

    async def opened() -> Serving:
        return HttpServing(url)

    try:
        yield opened
    finally:
        process.terminate()
        assert process.wait(90) == 0


def start_engine(base_folder: Path, home: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A process of ``services.engine`` that is ready, and its URL."""
    settings = {"EVERLOOP_HOME": str(home), "EVERLOOP_SERVING__PORT": "0", "EVERLOOP_SERVING__THREADS": "1"}
    config = home / "everloop.toml"
    home.mkdir(parents=True, exist_ok=True)
    config.write_text(f'cache = "{home}/cache"\n[tenants.default.policies.assistant]\nbase = "{base_folder}"\n')
    environment = {**os.environ, **settings, "EVERLOOP_CONFIG": str(config), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "services.engine"], env=environment)
    announcement = home / "run" / "engine.json"

    def ready() -> str | None:
        assert process.poll() is None, "the engine ended before it was ready"
        if not announcement.exists():
            return None
        url = json.loads(announcement.read_text())["url"]
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return url if answer.status == 200 else None

    return process, str(until(ready, deadline=120))


BACKENDS: dict[str, Callable[[Path, Path], AbstractContextManager[Opener]]] = {
    "embedded": embedded,
    "http": over_http,
}


@pytest.fixture(scope="module")
def home_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module", params=BACKENDS)
def opener(request: pytest.FixtureRequest, untrained: Path, home_folder: Path) -> Iterator[Opener]:
    with BACKENDS[request.param](untrained, home_folder) as opened:
        yield opened


@pytest.fixture
async def serving(opener: Opener) -> AsyncIterator[Serving]:
    made = await opener()
    yield made
    await made.close()


@pytest.fixture
def loadable(adapter: Path, home_folder: Path) -> Path:
    folder = home_folder / "adapters" / adapter.name
    if not folder.exists():
        shutil.copytree(adapter, folder)
    return folder


@pytest.fixture
def ask(untrained: Path) -> dict[str, Any]:
    messages = [{"role": "user", "content": "where is my card"}]
    return {"model": str(untrained), "messages": messages, "max_tokens": 12, "seed": 1, "return_token_ids": True}


async def chunks_of(serving: Serving, body: dict[str, Any]) -> list[dict[str, Any]]:
    return [chunk async for chunk in serving.stream(CHAT, {**body, "stream": True})]


async def test_an_answer_has_ids_logprobs_and_usage(serving: Serving, ask: dict[str, Any]) -> None:
    answer = await serving.complete(CHAT, {**ask, "logprobs": True})
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == answer["usage"]["completion_tokens"]
    assert all(token["logprob"] <= 0 for token in choice["logprobs"]["content"])
    assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]


async def test_a_stream_says_what_the_whole_answer_says(serving: Serving, ask: dict[str, Any]) -> None:
    body = {**ask, "n": 2, "logprobs": True}
    whole = await serving.complete(CHAT, body)
    chunks = await chunks_of(serving, {**body, "stream_options": {"include_usage": True}})
    for choice in whole["choices"]:
        its = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["delta"].get("content") or "" for c in its) == choice["message"]["content"]
        assert [i for c in its for i in c["token_ids"]] == choice["token_ids"]
        logprobs = [t["logprob"] for c in its for t in (c["logprobs"] or {"content": []})["content"]]
        expected = [t["logprob"] for t in choice["logprobs"]["content"]]
        assert logprobs == pytest.approx(expected, abs=1e-4)
        assert [c["finish_reason"] for c in its if c["finish_reason"]] == [choice["finish_reason"]]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]


async def test_n_answers_differ_and_a_seed_repeats_them(serving: Serving, ask: dict[str, Any]) -> None:
    one, again = [(await serving.complete(CHAT, {**ask, "n": 4}))["choices"] for _ in range(2)]
    assert len({tuple(choice["token_ids"]) for choice in one}) == 4
    assert [choice["token_ids"] for choice in one] == [choice["token_ids"] for choice in again]


async def test_a_stop_string_ends_the_answer_before_it(serving: Serving, ask: dict[str, Any]) -> None:
    ask = {**ask, "temperature": 0, "max_tokens": 30}
    text = (await serving.complete(CHAT, ask))["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:2]
    whole = (await serving.complete(CHAT, {**ask, "stop": [stop]}))["choices"][0]
    assert (whole["finish_reason"], whole["message"]["content"]) == ("stop", text[: text.index(stop)])
    chunks = await chunks_of(serving, {**ask, "stop": [stop]})
    streamed = "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])
    assert streamed == whole["message"]["content"]


async def test_alternatives_are_given_where_asked_for(serving: Serving, ask: dict[str, Any]) -> None:
    body = {**ask, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    (choice,) = (await serving.complete(CHAT, body))["choices"]
    for token in choice["logprobs"]["content"]:
        assert len(token["top_logprobs"]) == 3
        assert token["top_logprobs"][0]["logprob"] == pytest.approx(token["logprob"], abs=1e-6)


async def test_a_bare_prompt_is_completed(serving: Serving, ask: dict[str, Any]) -> None:
    body = {"model": ask["model"], "prompt": "my card", "max_tokens": 5, "logprobs": 1, "return_token_ids": True}
    (choice,) = (await serving.complete("completions", body))["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"])
    assert isinstance(choice["text"], str)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"messages": [{"role": "user", "content": "x " * 300}]}, 400, "context length"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"temperature": 7}, 400, "temperature"),
    ],
)
async def test_a_request_that_cannot_be_done_is_refused(
    serving: Serving, ask: dict[str, Any], changes: dict[str, Any], status: int, words: str
) -> None:
    for asked in (serving.complete(CHAT, {**ask, **changes}), chunks_of(serving, {**ask, **changes})):
        with pytest.raises(ServingError, match=words) as refused:
            await asked
        assert refused.value.status == status


async def test_a_model_that_is_not_there_is_unknown(serving: Serving, ask: dict[str, Any]) -> None:
    for asked in (serving.complete(CHAT, {**ask, "model": "0" * 32}), chunks_of(serving, {**ask, "model": "0" * 32})):
        with pytest.raises(UnknownAdapter):
            await asked


async def test_an_adapter_answers_beside_its_base_until_it_is_unloaded(
    serving: Serving, ask: dict[str, Any], loadable: Path
) -> None:
    name = loadable.name
    await serving.load(name, loadable)
    await serving.load(name, loadable)
    assert name in await serving.adapters()
    based, adapted, again = await asyncio.gather(
        *(serving.complete(CHAT, {**ask, "model": model}) for model in (ask["model"], name, ask["model"]))
    )
    assert adapted["choices"][0]["token_ids"] != based["choices"][0]["token_ids"]
    assert again["choices"][0]["token_ids"] == based["choices"][0]["token_ids"]
    await serving.unload(name)
    assert name not in await serving.adapters()
    with pytest.raises(UnknownAdapter):
        await serving.complete(CHAT, {**ask, "model": name})


async def test_a_broken_adapter_is_refused_and_nothing_else_suffers(
    serving: Serving, ask: dict[str, Any], adapter: Path, home_folder: Path
) -> None:
    folder = home_folder / "adapters" / ("f" * 32)
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    with pytest.raises(AdapterRefused):
        await serving.load("f" * 32, folder)
    assert "f" * 32 not in await serving.adapters()
    assert await serving.complete(CHAT, ask)


async def test_streams_that_are_left_make_room(serving: Serving, ask: dict[str, Any]) -> None:
    for _ in range(3):
        long = {**ask, "max_tokens": 240, "temperature": 0, "stream": True}
        streams = [serving.stream(CHAT, long) for _ in range(8)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        await asyncio.gather(*(stream.aclose() for stream in streams))
    async with asyncio.timeout(20):
        assert await serving.complete(CHAT, ask)


async def test_it_is_healthy(serving: Serving) -> None:
    assert await serving.healthy()
