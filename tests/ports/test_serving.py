"""One suite over every backend of the serving port: the engine in this process, behind HTTP, a real vLLM, a provider.

A backend is an entry of ``BACKENDS``: a context that gives an engine which serves the base in a folder, under the
folder's path as the model's name, loads adapters from ``home/adapters``, runs 8 answers at once and lets 8 wait. A
provider is asked through the same port, and gives no token ids and holds no adapters: tests that are ``everywhere`` run
over it too, and it answers by an engine of ours, behind an endpoint that refuses what OpenAI refuses.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from everloop.config import ServingConfig
from everloop.errors import AdapterRefused, Overloaded, ServingError, UnknownAdapter
from everloop.provider_config import ProviderConfig
from everloop.serving.base import Serving

from services.gateway.provider import Provider
from tests.engines import EngineProcess, running
from tests.provider import KEY, StrictProvider

pytestmark = [pytest.mark.models, pytest.mark.processes]
CHAT = "chat/completions"
Opener = Callable[[], Awaitable[Serving]]


class Backend(NamedTuple):
    """How to open an engine, and its home."""

    opened: Opener
    home: Path


@contextmanager
def embedded(request: pytest.FixtureRequest) -> Iterator[Backend]:
    from trainer.rollout.embedded import EmbeddedServing

    policy = request.getfixturevalue("policy")

    async def opened() -> Serving:
        return EmbeddedServing([policy], ServingConfig(threads=1, max_batch=8, queue=8))

    yield Backend(opened, new_folder(request))


@contextmanager
def over_http(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with running(EngineProcess(new_folder(request), request.getfixturevalue("untrained"))) as engine:
        yield Backend(engine.opened, engine.home)


@contextmanager
def vllm(request: pytest.FixtureRequest) -> Iterator[Backend]:
    engine = request.getfixturevalue("vllm_engine")
    yield Backend(engine.opened, engine.home)


@contextmanager
def provider(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with running(EngineProcess(new_folder(request), request.getfixturevalue("untrained"))) as engine:
        strict = StrictProvider((f"http://127.0.0.1:{engine.port}", str(engine.base)))
        config = ProviderConfig.model_validate(strict.config() | {"key_env": None, "key_file": engine.home / "key"})
        (engine.home / "key").write_text(KEY)

        async def opened() -> Serving:
            return Provider(config, "bank/assistant")

        yield Backend(opened, engine.home)
        assert not [why for why in strict.refused if "Unrecognized" in why]
        strict.close()


def new_folder(request: pytest.FixtureRequest) -> Path:
    factory: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
    return factory.mktemp("home")


BACKENDS: dict[str, Callable[[pytest.FixtureRequest], AbstractContextManager[Backend]]] = {
    "embedded": embedded,
    "http": over_http,
    "vllm": vllm,
}
MARKED = [pytest.param(name, marks=[pytest.mark.vllm] if name == "vllm" else []) for name in BACKENDS]
BACKENDS["provider"] = provider
everywhere = pytest.mark.parametrize("backend", [*MARKED, "provider"], indirect=True, scope="module")


@pytest.fixture(scope="module", params=MARKED)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with BACKENDS[request.param](request) as made:
        yield made


@pytest.fixture
async def serving(backend: Backend) -> AsyncIterator[Serving]:
    made = await backend.opened()
    yield made
    await made.close()


@pytest.fixture
def loadable(on_attention: list[Path], backend: Backend) -> list[Path]:
    """The folders of two adapters that every engine can serve, in the backend's home."""
    folders = [backend.home / "adapters" / adapter.name for adapter in on_attention]
    for adapter, folder in zip(on_attention, folders, strict=True):
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
    return folders


@pytest.fixture
def ask(untrained: Path) -> dict[str, Any]:
    messages = [{"role": "user", "content": "where is my card"}]
    return {"model": str(untrained), "messages": messages, "max_tokens": 12, "seed": 1, "return_token_ids": True}


async def chunks_of(serving: Serving, body: dict[str, Any]) -> list[dict[str, Any]]:
    return [chunk async for chunk in serving.stream(CHAT, {**body, "stream": True})]


def logprobs_of(answer: dict[str, Any]) -> list[float]:
    return [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]


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
        assert [i for c in its for i in c.get("token_ids") or ()] == choice["token_ids"]
        logprobs = [t["logprob"] for c in its for t in (c["logprobs"] or {"content": []})["content"]]
        expected = [t["logprob"] for t in choice["logprobs"]["content"]]
        assert logprobs == pytest.approx(expected, abs=1e-4)
        assert [c["finish_reason"] for c in its if c["finish_reason"]] == [choice["finish_reason"]]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"].items() <= whole["usage"].items()


@everywhere
async def test_the_words_of_a_stream_are_those_of_the_whole_answer(serving: Serving, ask: dict[str, Any]) -> None:
    whole = await serving.complete(CHAT, {**ask, "n": 2})
    chunks = await chunks_of(serving, {**ask, "n": 2, "stream_options": {"include_usage": True}})
    for choice in whole["choices"]:
        its = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["delta"].get("content") or "" for c in its) == choice["message"]["content"]
        assert [c["finish_reason"] for c in its if c["finish_reason"]] == [choice["finish_reason"]]
    assert whole["usage"]["completion_tokens"] > 0
    assert [c["usage"]["completion_tokens"] for c in chunks if c.get("usage")][-1:] == [
        whole["usage"]["completion_tokens"]
    ]


async def test_n_answers_differ_and_a_seed_repeats_them(serving: Serving, ask: dict[str, Any]) -> None:
    one, again = [(await serving.complete(CHAT, {**ask, "n": 4}))["choices"] for _ in range(2)]
    assert len({tuple(choice["token_ids"]) for choice in one}) == 4
    assert [choice["token_ids"] for choice in one] == [choice["token_ids"] for choice in again]


@everywhere
async def test_a_stop_string_ends_the_answer_before_it(serving: Serving, ask: dict[str, Any]) -> None:
    ask = {**ask, "temperature": 0, "max_tokens": 30}
    text = (await serving.complete(CHAT, ask))["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:2]
    whole = (await serving.complete(CHAT, {**ask, "stop": [stop]}))["choices"][0]
    assert (whole["finish_reason"], whole["message"]["content"]) == ("stop", text[: text.index(stop)])
    chunks = await chunks_of(serving, {**ask, "stop": [stop]})
    streamed = "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])
    assert streamed == whole["message"]["content"]


@everywhere
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


@everywhere
@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"messages": [{"role": "user", "content": "x " * 300}]}, 400, "context length"),
        ({"max_tokens": -1}, 400, "max_(completion_)?tokens"),
        ({"temperature": -1}, 400, "temperature"),
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


async def test_adapters_answer_beside_their_base_until_they_are_unloaded(
    serving: Serving, ask: dict[str, Any], loadable: list[Path]
) -> None:
    names = [folder.name for folder in loadable]
    for folder in [*loadable, *loadable]:
        await serving.load(folder.name, folder)
    assert await serving.adapters() >= set(names)
    ask = {**ask, "logprobs": True}
    asked = (serving.complete(CHAT, {**ask, "model": model}) for model in (ask["model"], *names, ask["model"]))
    based, one, other, again = [logprobs_of(answer) for answer in await asyncio.gather(*asked)]
    assert again == pytest.approx(based, abs=1e-4)
    for a, b in ((based, one), (one, other), (based, other)):
        assert max(abs(x - y) for x, y in zip(a, b, strict=False)) > 0.01
    await serving.unload(names[0])
    assert names[0] not in await serving.adapters()
    with pytest.raises(UnknownAdapter):
        await serving.complete(CHAT, {**ask, "model": names[0]})
    assert logprobs_of(await serving.complete(CHAT, {**ask, "model": names[1]})) == pytest.approx(other, abs=1e-4)
    await serving.unload(names[1])


async def test_a_broken_adapter_is_refused_and_nothing_else_suffers(
    serving: Serving, ask: dict[str, Any], on_attention: list[Path], backend: Backend
) -> None:
    folder = backend.home / "adapters" / ("f" * 32)
    shutil.copytree(on_attention[0], folder, dirs_exist_ok=True)
    with pytest.raises(AdapterRefused):
        await serving.load("f" * 32, folder)
    assert "f" * 32 not in await serving.adapters()
    assert await serving.complete(CHAT, ask)


@everywhere
async def test_what_is_too_much_is_refused_with_429_and_the_rest_is_answered(
    serving: Serving, ask: dict[str, Any]
) -> None:
    many = [serving.complete(CHAT, {**ask, "seed": seed, "max_tokens": 24}) for seed in range(64)]
    given = await asyncio.gather(*many, return_exceptions=True)
    refused = [one for one in given if isinstance(one, Overloaded)]
    assert refused
    assert all(one.status == 429 and one.retry_after > 0 for one in refused)
    answered = [one for one in given if isinstance(one, dict)]
    assert len(answered) >= 8
    assert len(answered) + len(refused) == len(many)
    assert await serving.complete(CHAT, ask)


@everywhere
async def test_streams_that_are_left_make_room(serving: Serving, ask: dict[str, Any]) -> None:
    for _ in range(3):
        long = {**ask, "max_tokens": 240, "temperature": 0, "stream": True}
        streams = [serving.stream(CHAT, long) for _ in range(8)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        await asyncio.gather(*(stream.aclose() for stream in streams))
    async with asyncio.timeout(20):
        assert await serving.complete(CHAT, ask)


@everywhere
async def test_it_is_healthy(serving: Serving) -> None:
    assert await serving.healthy()
