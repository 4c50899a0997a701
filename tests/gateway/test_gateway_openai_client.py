"""The official client works unchanged, and what it did is in the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import openai
import orjson
import pytest

ASK: dict[str, Any] = {"model": "assistant", "messages": [{"role": "user", "content": "Where is my card?"}]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def call(id: str, arguments: str = '{"city": "Bern"}') -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


@pytest.mark.parametrize("stream", [False, True])
async def test_raw_and_processed_log_probabilities_are_both_kept(bench: Any, stream: bool) -> None:
    """Of an engine that gives both; the agent gets neither unasked."""
    bench.engine.gives_raw = True
    answer = await bench.client().chat.completions.create(**ASK, stream=stream)
    shown = [chunk.model_dump_json() async for chunk in answer] if stream else [answer.model_dump_json()]
    assert not any("raw_logprobs" in one for one in shown)
    (event,) = bench.events()
    tokens = event.payload.tokens
    assert list(tokens.raw_logprobs) == [-0.5] * 6
    assert list(tokens.logprobs) == [-0.25] * 6
    assert tokens.checked


async def test_a_chat_is_answered_and_recorded_with_its_tokens(bench: Any) -> None:
    answer = await bench.client().chat.completions.create(**ASK, user="anna")
    assert answer.choices[0].message.content == "the card is on its way"
    assert answer.choices[0].logprobs is None
    assert answer.model == "assistant"
    assert answer._request_id == answer.id
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert "token_ids" not in answer.model_dump_json()
    (event,) = bench.events()
    said = event.payload
    assert (event.tenant, event.policy) == ("bank", "assistant")
    assert event.subject == bench.home.ids.pseudonym("bank", "subject", "anna")
    assert said.messages[0].text == "Where is my card?"
    assert said.output.text == "the card is on its way"
    assert list(said.tokens.prompt) == [1, 2, 3]
    assert list(said.tokens.completion) == [100, 101, 102, 103, 104, 105]
    assert list(said.tokens.logprobs) == [-0.25] * 6
    assert said.tokens.raw_logprobs is None
    assert said.tokens.checked
    assert said.policy_version == "base"
    assert said.model == "tiny"
    assert said.sampling.max_tokens == 256
    assert said.sampling.support_known
    assert said.latency > 0
    assert bench.home.ids.parse_response("bank", answer.id) == (event.episode, said.id)
    assert "user" not in bench.engine.asked[0]


async def test_log_probabilities_come_where_they_are_asked_for(bench: Any) -> None:
    answer = await bench.client().chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].logprob == -0.25
    assert bench.engine.asked[0]["top_logprobs"] == 2


@pytest.mark.parametrize("include", [True, False])
async def test_a_stream_gives_usage_only_where_asked(bench: Any, include: bool) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if include else {}
    stream = await bench.client().chat.completions.create(**ASK, stream=True, **options)
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "the card is on its way"
    last = [chunk for chunk in chunks if chunk.choices][-1]
    assert last.choices[0].finish_reason == "stop"
    usage = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert [use.completion_tokens for use in usage] == ([6] if include else [])
    assert [chunk for chunk in chunks if not chunk.choices] == (chunks[-1:] if include else [])
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(choice.logprobs is None for chunk in chunks for choice in chunk.choices)
    (event,) = bench.events()
    assert list(event.payload.tokens.completion) == [100, 101, 102, 103, 104, 105]
    assert event.payload.output.text == "the card is on its way"
    assert event.payload.finish_reason == "stop"


async def test_the_streaming_helper_reads_parallel_tool_calls(bench: Any) -> None:
    bench.engine.tool_calls = [call("c1"), call("c2", '{"city": "Basel"}')]
    async with bench.client().chat.completions.stream(**ASK, tools=[WEATHER]) as stream:
        answer = await stream.get_final_completion()
    called = answer.choices[0].message.tool_calls
    assert called is not None
    assert answer.choices[0].message.role == "assistant", "once, however often the engine says it"
    assert [(c.id, c.function.arguments) for c in called] == [("c1", '{"city": "Bern"}'), ("c2", '{"city": "Basel"}')]
    assert answer.choices[0].finish_reason == "tool_calls"
    (event,) = bench.events()
    assert event.payload.output.tool_calls == bench.engine.tool_calls
    assert event.payload.tools == (WEATHER,)
    assert event.payload.finish_reason == "tool_calls"


async def test_a_tool_call_and_its_result_go_through_and_are_one_episode(bench: Any) -> None:
    client = bench.client()
    bench.engine.tool_calls = [call("c1")]
    first = await client.chat.completions.create(**ASK, tools=[WEATHER])
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    bench.engine.tool_calls = []
    result = {"role": "tool", "tool_call_id": "c1", "content": "sun"}
    messages = [*ASK["messages"], message.model_dump(), result]
    await client.chat.completions.create(model="assistant", messages=messages, tools=[WEATHER])
    one, two = bench.events()
    assert one.episode == two.episode
    assert bench.engine.asked[1]["messages"][2] == result
    assert bench.engine.asked[1]["tools"] == [WEATHER]


async def test_each_of_n_answers_is_a_call_of_its_own(bench: Any) -> None:
    answer = await bench.client().chat.completions.create(**ASK, n=3, stop=["END"], seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    events = bench.events()
    assert sorted(event.payload.choice for event in events) == [0, 1, 2]
    assert len({event.payload.id for event in events}) == len({event.id for event in events}) == 3
    first = next(event for event in events if event.payload.choice == 0)
    assert bench.home.ids.parse_response("bank", answer.id) == (first.episode, first.payload.id)
    assert first.payload.sampling.stop == ("END",)
    assert first.payload.sampling.seed == 7
    assert first.payload.tokens.checked


async def test_the_older_route_works_whole_and_streamed(bench: Any) -> None:
    client = bench.client()
    whole = await client.completions.create(model="writer", prompt="Dear customer,")
    assert whole.choices[0].text == "the card is on its way"
    assert whole.choices[0].logprobs is None
    stream = await client.completions.create(model="writer", prompt="Dear customer,", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "the card is on its way"
    one, two = bench.events()
    assert one.payload.messages[0].text == two.payload.messages[0].text == "Dear customer,"
    assert list(one.payload.tokens.logprobs) == list(two.payload.tokens.logprobs) == [-0.25] * 6
    assert one.payload.sampling.max_tokens == 7


async def test_models_are_the_tenants_policies(bench: Any) -> None:
    assert {model.id async for model in bench.client().models.list()} == {"assistant", "writer"}
    assert (await bench.client().models.retrieve("writer")).id == "writer"
    other = bench.client(bench.new_key("airline"))
    assert {model.id async for model in other.models.list()} == {"assistant"}


async def test_what_is_not_here_is_a_clear_404(bench: Any) -> None:
    with pytest.raises(openai.NotFoundError, match=r"has no embeddings\. Ask their provider"):
        await bench.client().embeddings.create(model="assistant", input="x")


async def test_errors_have_openais_form(bench: Any) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        await bench.client().chat.completions.create(**{**ASK, "model": "gpt-4o"})
    assert raised.value.code == "model_not_found"
    assert "assistant" in raised.value.message
    with pytest.raises(openai.AuthenticationError):
        await bench.client("ek_wrong").chat.completions.create(**ASK)


async def test_a_broken_stream_raises_at_the_client(bench: Any, soon: Any) -> None:
    bench.engine.break_after = 3
    stream = await bench.client().chat.completions.create(**ASK, stream=True)
    with pytest.raises(openai.APIError, match="broke off"):
        async for _ in stream:
            pass
    await soon(bench.events)
    (event,) = bench.events()
    assert event.payload.error == "the engine broke off"
    assert event.payload.output.text == "the card is"
    assert event.payload.tokens is None


async def test_of_several_answers_in_one_chunk_each_comes_in_its_order(bench: Any) -> None:
    head = {"id": "engine-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}

    def part(index: int, word: str, finish: str | None = None) -> dict[str, Any]:
        content = [{"token": word, "logprob": -0.5}]
        said = {"delta": {"content": word}, "logprobs": {"content": content}, "token_ids": [7], "finish_reason": finish}
        return {"index": index, **said}

    async def stream(route: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield {**head, "prompt_token_ids": [1, 2, 3], "choices": [part(0, "a"), part(1, "b")]}
        yield {**head, "choices": [part(0, " c", "stop"), part(1, " d")]}
        yield {**head, "choices": [part(1, " e", "stop")]}

    bench.engine.stream = stream
    said: dict[int, str] = {0: "", 1: ""}
    async for chunk in await bench.client().chat.completions.create(**ASK, n=2, stream=True):
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
    assert said == {0: "a c", 1: "b d e"}
    assert {event.payload.output.text for event in bench.events()} == set(said.values())


async def test_an_answer_says_how_it_ends_and_the_connection_goes_on_only_where_the_client_wants_it(bench: Any) -> None:
    for first, ending, lasts in (
        (b"HTTP/1.1", b"", True),
        (b"HTTP/1.1", b"Connection: close\r\n", False),
        (b"HTTP/1.0", b"", False),
        (b"HTTP/1.0", b"Connection: keep-alive\r\n", False),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(bench.url).port)
        head = b"POST /v1/chat/completions %b\r\nHost: here\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n%b\r\n"
        body = orjson.dumps(ASK)
        request = head % (first, bench.key.encode(), len(body), ending) + body
        for _ in range(1 + lasts):
            writer.write(request)
            said = (await reader.readuntil(b"\r\n\r\n")).decode()
            headers = dict(line.split(": ", 1) for line in said.splitlines()[1:-1])
            assert said.startswith("HTTP/1.1 200 OK\r\n")
            assert parsedate_to_datetime(headers["Date"]).tzinfo is not None
            assert headers.get("Connection") == (None if lasts else "close")
            answer = orjson.loads(await reader.readexactly(int(headers["Content-Length"])))
            assert answer["choices"][0]["message"]["content"]
        assert lasts or not await reader.read()
        writer.close()
