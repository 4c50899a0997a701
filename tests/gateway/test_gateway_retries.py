"""A retried request is the same turn: answered once, recorded once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from everloop.errors import ServingError

from services.gateway.retries import OVERHEAD, Finished, Mark, Retries

AGAIN = {"X_Stainless_Retry_Count": "1"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_retry_of_a_finished_request_gets_its_answer_byte_for_byte(bench: Any, stream: bool) -> None:
    body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    said = []
    for count in ("0", "1", "2"):
        headers = {"Authorization": f"Bearer {bench.key}", "x-stainless-retry-count": count}
        async with bench.http.post(f"{bench.url}/v1/chat/completions", json=body, headers=headers) as response:
            said.append((await response.read(), response.headers["X-Everloop-Call"], response.content_type))
    assert said[0] == said[1] == said[2]
    assert len(bench.engine.asked) == 1
    assert len(bench.events()) == 1


async def test_a_retry_waits_for_the_first(bench: Any, soon: Any) -> None:
    bench.engine.resume.clear()
    first = asyncio.create_task(bench.chat())
    await soon(lambda: bench.engine.asked)
    second = asyncio.create_task(bench.chat(**AGAIN))
    await asyncio.sleep(0)
    bench.engine.resume.set()
    (_, one, _), (_, two, _) = await asyncio.gather(first, second)
    assert one == two
    assert len(bench.events()) == len(bench.engine.asked) == 1


async def test_a_retry_of_a_failed_request_is_tried_again(bench: Any) -> None:
    bench.engine.error = ServingError("no engine", status=503)
    assert (await bench.chat())[0] == 503
    bench.engine.error = None
    assert (await bench.chat(**AGAIN))[0] == 200
    assert len(bench.engine.asked) == 2


async def test_a_retry_after_its_first_was_cut_off_is_answered(bench: Any, soon: Any) -> None:
    bench.engine.resume.clear()
    first = asyncio.create_task(bench.chat())
    await soon(lambda: bench.engine.asked)
    first.cancel()
    await soon(lambda: bench.engine.cancelled)
    bench.engine.resume.set()
    status, said, _ = await bench.chat(**AGAIN)
    assert status == 200
    assert said["choices"][0]["message"]["content"] == bench.engine.says


async def test_the_same_words_twice_are_two_turns(bench: Any) -> None:
    await bench.chat()
    await bench.chat()
    assert len(bench.events()) == 2


async def test_an_idempotency_key_is_one_turn_and_one_body(bench: Any) -> None:
    _, one, _ = await bench.chat("a", Idempotency_Key="k1")
    _, two, _ = await bench.chat("a", Idempotency_Key="k1")
    assert one == two
    status, said, _ = await bench.chat("b", Idempotency_Key="k1")
    assert (status, said["error"]["code"]) == (422, "idempotency_key_reused")
    status, other, _ = await bench.chat("a", Idempotency_Key="k1", key=bench.new_key("airline"))
    assert status == 200
    assert other["id"] != one["id"], "another tenant's key is another key"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_gateway_that_was_started_again_knows_what_is_durable(start: Any, stream: bool) -> None:
    before = await start()
    _, said, headers = await before.chat(n=2)
    after = await start()
    if not stream:
        status, again, found = await after.chat(n=2, **AGAIN)
        assert status == 200
        assert again["id"] == said["id"]
        assert again["choices"] == [{**choice, "logprobs": None} for choice in said["choices"]]
        assert again["usage"] == said["usage"]
        assert found["X-Everloop-Call"] == headers["X-Everloop-Call"]
        assert found["X-Request-Id"] == headers["X-Request-Id"] == said["id"]
        assert after.engine.asked == []
        assert len(after.events()) == 2
        return
    body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    before_client = before.client()
    chunks = [chunk async for chunk in await before_client.chat.completions.create(**body)]
    again_started = await start()
    options = {"extra_headers": {"x-stainless-retry-count": "1"}}
    again_chunks = [c async for c in await again_started.client().chat.completions.create(**body, **options)]
    assert again_chunks[0].id == chunks[0].id
    assert again_chunks[0].choices[0].delta.content == before.engine.says
    assert again_chunks[-1].choices[0].finish_reason == "stop"
    assert again_started.engine.asked == []


async def test_what_is_kept_is_bounded() -> None:
    retries = Retries(b"s" * 32, kept_bytes=4 * (500 + OVERHEAD) + 100)
    stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    stored.set_result(None)
    for at in range(50):
        with retries.answering(Mark(str(at), b"", True)) as promise:
            promise(Finished(b"x" * 500, "", {}), stored)
        await asyncio.sleep(0)
    kept = [at for at in range(50) if await retries.earlier(Mark(str(at), b"", True)) is not None]
    assert kept == [46, 47, 48, 49]
