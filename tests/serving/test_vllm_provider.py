"""Another team's vLLM as a policy's provider, before any engine of our own: by OpenAI's parameters alone."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from everloop.config import Config
from everloop.event import Event
from everloop.home import Home
from everloop.log import open_log
from everloop.wire import decode

from services.gateway.app import Gateway
from services.gateway.upstream import HttpServing
from tests.engines import EngineProcess

pytestmark = [pytest.mark.models, pytest.mark.processes, pytest.mark.vllm]


async def test_it_answers_whole_and_streamed_and_is_recorded_as_who_it_is(
    vllm_engine: EngineProcess, home: Home
) -> None:
    provider = {"url": f"http://127.0.0.1:{vllm_engine.port}/v1", "model": str(vllm_engine.base)}
    policies = {"support": {"provider": provider, "max_tokens": 9}}
    config = Config.model_validate({"home": home.root, "tenants": {"bank": {"policies": policies}}})
    log = open_log(config)
    nobody = HttpServing("http://127.0.0.1:9")
    gateway = Gateway(config, home, log, nobody)
    gateway.prepare()
    app = web.Application()
    gateway.add_to(app)
    asked: Any = {"model": "support", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
    async with TestServer(app) as server:
        key = gateway.keys.create("bank")
        async with openai.AsyncOpenAI(base_url=str(server.make_url("/v1")), api_key=key, max_retries=0) as client:
            whole = await client.chat.completions.create(**asked, logprobs=True, top_logprobs=1)
            stream = await client.chat.completions.create(**asked, stream=True)
            streamed = "".join([c.choices[0].delta.content or "" async for c in stream])
            with pytest.raises(openai.BadRequestError, match="'top_k'"):
                await client.chat.completions.create(**asked, extra_body={"top_k": 5})
    (choice,) = whole.choices
    assert choice.message.content == streamed
    assert choice.logprobs is not None
    assert len(choice.logprobs.content or ()) == whole.usage.completion_tokens
    records = [r for part in range(log.partitions("events")) for r in log.read("events", part, 0, 10)]
    calls = [decode(Event, record.value or b"", home.blobs).payload for record in records]
    assert {(call.policy_version, call.model, call.tokens) for call in calls} == {
        ("provider", str(vllm_engine.base), None)
    }
    assert len(calls) == 2
    await gateway.providers.close()
    await nobody.close()
    gateway.close()
