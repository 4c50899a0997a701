"""The official client in Python. What it sends and what is recorded of it is held in tests/gateway as well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.clients.conftest import Front
from tests.clients.scripted import Scripted
from tests.conftest import until

pytestmark = [pytest.mark.models, pytest.mark.processes]
ASK: dict[str, Any] = {"model": "assistant", "messages": [{"role": "user", "content": "where is my card"}]}
ENDLESS: dict[str, Any] = {"model": "assistant", "messages": [{"role": "user", "content": "where is it"}]}
WEATHER = {"city": {"type": "string"}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": WEATHER, "required": ["city"]}},
}


@pytest.fixture
def client(real: Front) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=real.url, api_key=real.key) as made:
        yield made


@pytest.fixture
def agent(told: Front) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=told.url, api_key=told.key) as made:
        yield made


def said(text: str) -> dict[str, Any]:
    return {"model": "assistant", "messages": [{"role": "user", "content": text}]}


def test_a_stream_says_what_a_whole_answer_says_and_how_much_it_was(client: openai.OpenAI) -> None:
    asked = {**ASK, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content != ""
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert last.usage == whole.usage
    assert whole.usage is not None
    assert whole.choices[0].logprobs is not None
    shown = whole.choices[0].logprobs.content or []
    assert len(shown) == whole.usage.completion_tokens
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in shown)


def test_responses_are_the_same_calls(client: openai.OpenAI, agent: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "assistant", "input": "where is my card", "temperature": 0}
    whole = client.responses.create(**asked, max_output_tokens=20)
    chat = client.chat.completions.create(**ASK, temperature=0, max_tokens=20)
    with client.responses.stream(**asked, max_output_tokens=20) as stream:
        streamed = next(event.response for event in stream if event.type == "response.incomplete")
    assert streamed.output_text == whole.output_text == chat.choices[0].message.content
    assert streamed.usage == whole.usage
    with (
        pytest.raises(openai.APIError, match="closed the connection in the middle"),
        agent.with_options(max_retries=0).responses.stream(model="assistant", input="break off") as broken,
    ):
        broken.until_done()


def test_seed_n_and_stop_hold(client: openai.OpenAI) -> None:
    asked = {**ASK, "seed": 7, "max_tokens": 20, "n": 3}
    one, two = (
        [choice.message.content for choice in client.chat.completions.create(**asked).choices] for _ in range(2)
    )
    assert one == two
    assert len(set(one)) > 1
    word = (one[0] or "")[3]
    cut = client.chat.completions.create(**asked, stop=[word])
    assert [choice.message.content for choice in cut.choices] == [(text or "").split(word)[0] for text in one]


def test_an_episode_by_header_and_feedback_by_response_id(client: openai.OpenAI, real: Front) -> None:
    headers = {"X-Everloop-Episode": "python-visit"}
    first = client.chat.completions.create(**ASK, max_tokens=5, extra_headers=headers)
    second = list(client.chat.completions.create(**ASK, max_tokens=5, extra_headers=headers, stream=True))[-1]
    real.rate(second.id)
    ids = [real.call(answer.id) for answer in (first, second)]
    assert [event.payload.id for event in real.events("python-visit")] == ids
    (thumb,) = real.events("python-visit", "feedback")
    assert thumb.payload.feedback.call == ids[1]


def test_errors_are_the_clients_own(client: openai.OpenAI, real: Front) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="ek_nobody").chat.completions.create(**ASK)
    with pytest.raises(openai.NotFoundError, match="you have: assistant"):
        client.chat.completions.create(**{**ASK, "model": "gpt-5"})
    with pytest.raises(openai.BadRequestError, match="'temperature' must be a number"):
        client.chat.completions.create(**ASK, temperature=9)
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(**ASK, response_format={"type": "json_object"})


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_engine(client: openai.OpenAI, real: Front, stream: bool) -> None:
    before = real.cancelled()
    asked = {**ENDLESS, "temperature": 0, "n": 8, "max_tokens": 240}
    if stream:
        answer = client.chat.completions.create(**asked, stream=True)
        next(iter(answer))
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.1, max_retries=0).chat.completions.create(**asked)
    until(lambda: real.cancelled() == before + 1)


def test_an_agents_loop_with_two_tools_at_once(agent: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "weather in Bern and Basel"}]
    whole = agent.chat.completions.create(model="assistant", messages=messages, tools=[TOOL])  # type: ignore[list-item]
    with agent.chat.completions.stream(model="assistant", messages=messages, tools=[TOOL]) as stream:  # type: ignore[list-item]
        streamed = stream.get_final_completion()
    calls = [call for call in streamed.choices[0].message.tool_calls or [] if call.type == "function"]
    assert streamed.choices[0].finish_reason == whole.choices[0].finish_reason == "tool_calls"
    assert [call.function.arguments for call in calls] == ['{"city": "Bern"}', '{"city": "Basel"}']
    assert [call.model_dump() for call in whole.choices[0].message.tool_calls or []] == [
        {"id": call.id, "type": "function", "function": {"name": "weather", "arguments": call.function.arguments}}
        for call in calls
    ]
    messages.append(streamed.choices[0].message)
    messages += [{"role": "tool", "tool_call_id": call.id, "content": f"sun {call.id}"} for call in calls]
    last = agent.chat.completions.create(model="assistant", messages=messages, tools=[TOOL])  # type: ignore[list-item]
    assert last.choices[0].message.content == "The results: sun call_bern; sun call_basel"


def test_it_waits_as_long_as_it_is_told_and_that_is_one_turn(
    agent: openai.OpenAI, told: Front, scripted: Scripted
) -> None:
    headers = {"X-Everloop-Episode": "python-busy"}
    answer = agent.chat.completions.create(**said("be busy once, python"), extra_headers=headers)
    assert answer.choices[0].message.content
    assert len(scripted.asks("be busy once, python")) == 2
    assert len(told.events("python-busy")) == 1
    with pytest.raises(openai.RateLimitError) as refused:
        agent.with_options(max_retries=0).chat.completions.create(**said("be busy, python"))
    assert refused.value.response.headers["Retry-After"] == "1"


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_was_lost_on_its_way_is_given_again_and_recorded_once(
    told: Front, lossy: str, scripted: Scripted, stream: bool
) -> None:
    words, episode = f"python, lost, {stream}", f"python-lost-{stream}"
    with openai.OpenAI(base_url=lossy, api_key=told.key) as client:
        answer: Any = client.chat.completions.create(
            **said(words), stream=stream, extra_headers={"X-Everloop-Episode": episode}
        )
        id = next(iter(answer)).id if stream else answer.id
    (event,) = told.events(episode)
    assert told.call(id) == event.payload.id
    assert len(scripted.asks(words)) == 1


def test_an_engine_that_fails_is_an_error_before_and_in_the_middle_of_a_stream(agent: openai.OpenAI) -> None:
    once = agent.with_options(max_retries=0)
    with pytest.raises(openai.InternalServerError):
        once.chat.completions.create(**said("fail"))
    with pytest.raises(openai.InternalServerError):
        once.chat.completions.create(**said("fail"), stream=True)
    stream = once.chat.completions.create(**said("break off"), stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["the", " card"]
    with pytest.raises(openai.APIError, match="closed the connection in the middle"):
        next(stream)


class Route(BaseModel):
    topic: Literal["card", "account"]
    urgent: bool


@pytest.mark.vllm
def test_an_answer_held_to_a_schema(constrained: Front) -> None:
    """By parse, whole and streamed, of a model that would say anything."""
    with openai.OpenAI(base_url=constrained.url, api_key=constrained.key) as client:
        asked = {**ASK, "max_tokens": 240, "temperature": 1, "seed": 1}
        whole = client.chat.completions.parse(**asked, response_format=Route)
        assert isinstance(whole.choices[0].message.parsed, Route)
        with client.chat.completions.stream(**asked, response_format=Route) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == whole.choices[0].message.parsed
