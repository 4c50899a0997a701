"""A provider over the wire: what its answers and failures become, what it gets to see, and whom it is told from."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from everloop.errors import Overloaded, ServingError
from everloop.provider_config import ProviderConfig

from services.gateway.provider import Provider
from tests.provider import KEY, MODEL, StrictProvider, streamed

CHAT = "chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "return_token_ids": True}


@pytest.fixture
async def asking(other: StrictProvider) -> AsyncIterator[Callable[..., Provider]]:
    """Makes what asks it; more of the configuration as keyword arguments."""
    made: list[Provider] = []

    def make(**more: Any) -> Provider:
        made.append(Provider(ProviderConfig.model_validate(other.config() | more), "bank/assistant"))
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def read(provider: Provider) -> str:
    chunks = [chunk async for chunk in provider.stream(CHAT, BODY)]
    return "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])


def saying(status: int, body: Any, **headers: str) -> Any:
    async def answer(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        if isinstance(body, bytes):
            return web.Response(status=status, body=body, headers=headers)
        return web.json_response(body, status=status, headers=headers)

    return answer


def error(message: str, code: Any = None) -> dict[str, Any]:
    return {"error": {"message": message, "code": code}}


async def test_it_answers_whole_and_streamed_below_the_path_of_its_url(other: Any, asking: Any) -> None:
    provider = asking()
    answer = await provider.complete(CHAT, BODY)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": other.says}
    assert answer["usage"]["total_tokens"] == 5 + len(other.says.split())
    assert await read(provider) == other.says
    assert other.asked[0] == {"model": MODEL, "messages": BODY["messages"], "max_completion_tokens": 5}
    assert other.asked[1]["stream_options"] == {"include_usage": True}
    assert other.refused == []
    assert await provider.healthy()
    assert await provider.adapters() == frozenset()


@pytest.mark.parametrize(
    ("status", "body", "became", "code", "words"),
    [
        (401, error("bad key"), 502, "provider_key", "refuses the key"),
        (403, error("not yours"), 502, "provider_key", "operator"),
        (429, error("slow down", "rate_limit_exceeded"), 429, "overloaded", "slow down"),
        (400, error("too long", "context_length_exceeded"), 400, "context_length_exceeded", "too long"),
        (404, error("no such model"), 502, "upstream_error", r"tenants\.bank\.policies\.assistant\.provider"),
        (500, b"<html>oops</html>", 502, "upstream_error", "oops"),
        (503, error("busy"), 503, "provider_unavailable", "busy"),
        (302, b"", 502, "upstream_error", "https://elsewhere.example/v1"),
        (500, error("x" * 5000), 502, "upstream_error", "failed"),
    ],
)
async def test_failures_become_errors_of_the_port(
    other: Any, asking: Any, status: int, body: Any, became: int, code: str, words: str
) -> None:
    more = {"Location": "https://elsewhere.example/v1"} if status == 302 else {}
    other.answer = saying(status, body, **{"Retry-After": "7", **more})
    for ask in (lambda: asking().complete(CHAT, BODY), lambda: read(asking())):
        with pytest.raises(ServingError, match=words) as raised:
            await ask()
        assert (raised.value.status, raised.value.code) == (became, code)
        assert len(str(raised.value)) < 600
        if isinstance(raised.value, Overloaded):
            assert raised.value.retry_after == 7


async def test_the_key_is_read_again_when_it_was_refused_and_never_shown(
    other: Any, asking: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The provider says the wrong key back, as some do."""
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "key"
    file.write_text("sk-the-old-one\n")
    provider = asking(key_env=None, key_file=file)
    with pytest.raises(ServingError) as raised:
        await provider.complete(CHAT, BODY)
    told = f"{raised.value} {provider.trouble} {provider!r} {provider.config!r} {caplog.text}"
    assert "sk-the-old-one" not in told
    assert str(file) in str(raised.value)
    assert provider.failures == {"provider_key": 1}
    assert "refuses the key" in caplog.text
    file.write_text(KEY)
    assert await provider.complete(CHAT, BODY)
    assert provider.trouble is None
    assert "answers again" in caplog.text
    file.unlink()
    with pytest.raises(ServingError, match="cannot be read") as raised:
        await asking(key_env=None, key_file=file).complete(CHAT, BODY)
    assert raised.value.code == "provider_key"


async def test_a_page_is_no_answer(other: Any, asking: Any) -> None:
    other.answer = saying(200, b"<html>log in</html>")
    for ask, code in ((asking().complete(CHAT, BODY), "upstream_garbled"), (read(asking()), "upstream_truncated")):
        with pytest.raises(ServingError) as raised:
            await ask
        assert raised.value.code == code


CHUNK = {"choices": [{"index": 0, "delta": {"content": "a"}}]}
LAST = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("events", "cut", "code"),
    [
        ([CHUNK], False, "upstream_truncated"),
        ([CHUNK, LAST], True, "upstream_broken"),
        ([CHUNK, "{"], False, "upstream_garbled"),
        ([CHUNK, error("died")], False, "upstream_error"),
    ],
)
async def test_a_stream_that_breaks_raises(other: Any, asking: Any, events: Any, cut: bool, code: str) -> None:
    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await streamed(request, events, cut=cut)

    other.answer = answer
    with pytest.raises(ServingError) as raised:
        await read(asking())
    assert raised.value.code == code


async def test_a_stream_without_its_done_is_whole_where_its_answers_have_ended(other: Any, asking: Any) -> None:
    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await streamed(request, [CHUNK, CHUNK, LAST])

    other.answer = answer
    assert await read(asking()) == "aa"


async def test_one_that_is_away_or_slow_says_so(other: Any, asking: Any) -> None:
    async def never(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    other.answer = never
    with pytest.raises(ServingError) as raised:
        await asking(timeout=0.2).complete(CHAT, BODY)
    assert (raised.value.status, raised.value.code) == (504, "provider_timeout")
    other.stop()
    provider = asking()
    with pytest.raises(ServingError) as raised:
        await provider.complete(CHAT, BODY)
    assert (raised.value.status, raised.value.code) == (503, "provider_unavailable")
    assert not await provider.healthy()
    other.start()
    assert await provider.healthy()


async def test_what_never_ends_is_let_go(other: Any, asking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.provider.MOST", 100_000)
    monkeypatch.setattr("services.gateway.provider.LONGEST_LINE", 100_000)
    other.answer = saying(200, b"x" * 300_000)
    with pytest.raises(ServingError, match="longer than 100,000"):
        await asking().complete(CHAT, BODY)
    with pytest.raises(ServingError, match="longer than 100,000"):
        await read(asking())


async def test_a_certificate_is_checked(
    asking: Any, pem: Callable[..., tuple[Path, Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the authorities of SSL_CERT_FILE, and for the name that was asked."""
    authority, certificate, key = pem(tmp_path / "pki", "provider")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", _hello)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    port = runner.addresses[0][1]
    with pytest.raises(ServingError, match="certificate is not trusted") as raised:
        await asking(url=f"https://127.0.0.1:{port}/v1").complete(CHAT, BODY)
    assert raised.value.status == 503
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    trusted = asking(url=f"https://127.0.0.1:{port}/v1")
    for _ in range(2):
        assert (await trusted.complete(CHAT, BODY))["choices"][0]["message"]["content"] == "hello"
    with pytest.raises(ServingError, match="certificate is not trusted"):
        await asking(url=f"https://localhost:{port}/v1").complete(CHAT, BODY)
    await runner.cleanup()


async def _hello(request: web.Request) -> web.Response:
    return web.json_response({"choices": [{"message": {"content": "hello"}}]})


async def test_without_a_list_of_models_a_few_tokens_are_asked_for(other: Any, asking: Any) -> None:
    assert await asking().check() is None
    assert other.asked == []
    assert "does not list" in str(await asking(model="another").check())
    with pytest.raises(ServingError, match="no such path"):
        await asking(url=other.url + "/wrong").check()

    other.stop()
    app = web.Application()
    app.router.add_post("/openai/v1/chat/completions", other._asked)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", other.port, reuse_address=True).start()
    assert await asking().check() is None
    assert other.asked[0]["max_completion_tokens"] == 16
    await runner.cleanup()
