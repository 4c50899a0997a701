"""LangChain: its model class for OpenAI, on chat and on responses, and its agent."""

from __future__ import annotations

import asyncio
import functools
import operator
from typing import Any, Literal

import openai
import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.clients.conftest import Front
from tests.clients.scripted import Scripted
from tests.conftest import until

pytestmark = [pytest.mark.models, pytest.mark.processes]
WHERE = "where is my card"


def model(front: Front, **settings: Any) -> ChatOpenAI:
    return ChatOpenAI(**{"model": "assistant", "base_url": front.url, "api_key": front.key, **settings})


both = pytest.mark.parametrize("responses", [False, True])


@both
def test_a_stream_says_what_a_whole_answer_says_and_how_much_it_was(real: Front, responses: bool) -> None:
    short = model(real, temperature=0, max_tokens=20, use_responses_api=responses)
    whole = short.invoke(WHERE)
    streamed = functools.reduce(operator.add, short.stream(WHERE, **({} if responses else {"stream_usage": True})))
    assert streamed.text == whole.text != ""
    assert streamed.usage_metadata == whole.usage_metadata
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 20
    ends = "incomplete_details" if responses else "finish_reason"
    assert streamed.response_metadata[ends] == whole.response_metadata[ends] is not None


def test_log_probabilities_come_where_they_are_asked_for(real: Front) -> None:
    whole = model(real, temperature=0, max_tokens=20).invoke(WHERE, logprobs=True, top_logprobs=2)
    shown = whole.response_metadata["logprobs"]["content"]
    assert len(shown) == 20
    assert all(token["logprob"] <= 0 and len(token["top_logprobs"]) == 2 for token in shown)


def test_seed_n_and_stop_hold(real: Front) -> None:
    drawing = model(real, seed=7, max_tokens=20, n=3)
    one, two = ([answer.text for answer in drawing.generate([[HumanMessage(WHERE)]]).generations[0]] for _ in range(2))
    assert one == two
    assert len(one) == 3
    assert any("a" in text for text in one)
    cut = drawing.generate([[HumanMessage(WHERE)]], stop=["a"]).generations[0]
    assert [answer.text for answer in cut] == [text.split("a")[0] for text in one]


def test_an_episode_by_header_and_feedback_by_response_id(real: Front) -> None:
    visit = model(real, default_headers={"X-Everloop-Episode": "langchain"}, max_tokens=5)
    first = visit.invoke(WHERE)
    second = functools.reduce(operator.add, model_with_headers(visit).stream(WHERE))
    ids = [first.response_metadata["id"], second.response_metadata["headers"]["x-request-id"]]
    calls = real.events("langchain")
    assert [event.payload.id for event in calls] == [real.call(id) for id in ids]
    real.rate(ids[1])
    (thumb,) = real.events("langchain", "feedback")
    assert thumb.payload.feedback.call == calls[1].payload.id


def model_with_headers(its: ChatOpenAI) -> ChatOpenAI:
    """Of a stream this client shows the id in no other way."""
    return its.model_copy(update={"include_response_headers": True})


def test_errors_are_the_clients_own(real: Front, told: Front) -> None:
    with pytest.raises(openai.AuthenticationError):
        model(real, api_key="ek_nobody").invoke(WHERE)
    with pytest.raises(openai.NotFoundError, match="you have: assistant"):
        model(real, model="gpt-5").invoke(WHERE)
    with pytest.raises(openai.BadRequestError, match="'temperature' must be a number"):
        model(real, temperature=9).invoke(WHERE)
    once = model(told, max_retries=0)
    with pytest.raises(openai.RateLimitError) as refused:
        once.invoke("be busy, langchain")
    assert refused.value.response.headers["Retry-After"] == "1"
    with pytest.raises(openai.InternalServerError, match="the engine failed"):
        once.invoke("fail")
    for responses, kind in ((False, openai.APIError), (True, ValueError)):
        stream = model(told, max_retries=0, use_responses_api=responses).stream("break off")
        with pytest.raises(kind, match="closed the connection in the middle"):
            list(stream)


async def test_a_client_that_leaves_stops_the_engine(real: Front) -> None:
    before = real.cancelled()
    endless = model(real, temperature=0, max_tokens=240)
    stream = endless.astream("where is it")
    assert await anext(stream)
    await stream.aclose()
    await asyncio.to_thread(until, lambda: real.cancelled() == before + 1)
    whole = asyncio.create_task(model(real, temperature=0, max_tokens=240, n=8).ainvoke("where is it"))
    await asyncio.to_thread(until, lambda: real.engine.status()["running"] == 8)
    whole.cancel()
    with pytest.raises(asyncio.CancelledError):
        await whole
    await asyncio.to_thread(until, lambda: real.cancelled() == before + 2)


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sun in {city}"


def test_tools_are_called_one_or_two_at_once_whole_and_streamed(told: Front) -> None:
    bound = model(told).bind_tools([weather])
    (one,) = bound.invoke("weather in Bern").tool_calls  # type: ignore[attr-defined]
    assert (one["name"], one["args"]) == ("weather", {"city": "Bern"})
    whole = bound.invoke("weather in Bern and Basel").tool_calls  # type: ignore[attr-defined]
    pieces = list(bound.stream("weather in Bern and Basel"))
    assert len([piece for piece in pieces if piece.tool_call_chunks]) > 1  # type: ignore[attr-defined]
    streamed = functools.reduce(operator.add, pieces).tool_calls  # type: ignore[attr-defined]
    assert streamed == whole
    assert [call["args"]["city"] for call in whole] == ["Bern", "Basel"]


@both
def test_an_agent_looks_and_then_answers(told: Front, responses: bool) -> None:
    episode = f"langchain-agent-{responses}"
    front = model(told, default_headers={"X-Everloop-Episode": episode}, use_responses_api=responses)
    agent = create_agent(front, tools=[weather])
    asked: Any = {"messages": [HumanMessage("weather in Bern and Basel")]}
    said = agent.invoke(asked)["messages"]
    assert said[-1].text == "The results: sun in Bern; sun in Basel"
    heard = [chunk.text for chunk, _ in agent.stream(asked, stream_mode="messages") if chunk.type != "tool"]
    assert "".join(heard) == said[-1].text
    calls = told.events(episode)
    assert [event.payload.finish_reason for event in calls] == ["tool_calls", "stop"] * 2


def test_it_waits_as_long_as_it_is_told_and_that_is_one_turn(told: Front, scripted: Scripted) -> None:
    busy = model(told, default_headers={"X-Everloop-Episode": "langchain-busy"})
    assert busy.invoke("be busy once, langchain").content == "the card is on its way"
    assert len(scripted.asks("be busy once, langchain")) == 2
    assert len(told.events("langchain-busy")) == 1


@both
def test_an_answer_that_was_lost_on_its_way_is_given_again_and_recorded_once(
    told: Front, lossy: str, scripted: Scripted, responses: bool
) -> None:
    episode = f"langchain-lost-{responses}"
    losing = model(told, base_url=lossy, default_headers={"X-Everloop-Episode": episode}, use_responses_api=responses)
    answer = losing.invoke(f"langchain, lost, {responses}")
    (event,) = told.events(episode)
    assert told.call(answer.response_metadata["id"]) == event.payload.id
    assert len(scripted.asks(f"langchain, lost, {responses}")) == 1


class Topic(BaseModel):
    topic: Literal["card", "account"]
    urgent: bool


@pytest.mark.vllm
def test_an_answer_held_to_a_schema(constrained: Front) -> None:
    """Of a model that would say anything, by its schema alone and as JSON of any kind."""
    held = model(constrained, temperature=1, max_tokens=240)
    assert isinstance(held.with_structured_output(Topic, method="json_schema").invoke(WHERE), Topic)
    assert isinstance(held.with_structured_output(Topic).invoke(WHERE), Topic)
