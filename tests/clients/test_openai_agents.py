"""OpenAI's agents library, on responses (its default) and on chat. Tracing is off: it would tell api.openai.com."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal

import openai
import pytest
from agents import (
    Agent,
    ModelBehaviorError,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    RunResultStreaming,
    function_tool,
)
from agents.models.chatcmpl_converter import Converter
from pydantic import BaseModel

from tests.clients.caller import teach
from tests.clients.conftest import Front, front
from tests.clients.scripted import Scripted
from tests.conftest import until
from tests.engines import EngineProcess, running

pytestmark = [pytest.mark.models, pytest.mark.processes]
WHERE = "where is my card"
SHORT: dict[str, dict[str, Any]] = {"chat": {"include_usage": True}, "responses": {}}  # there it is always in streams
Make = Callable[..., Agent[Any]]


@pytest.fixture(params=["chat", "responses"])
def api(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def make(api: str) -> AsyncIterator[Make]:
    """An agent behind a front: its settings, and more of it (tools, output_type)."""
    kind = OpenAIChatCompletionsModel if api == "chat" else OpenAIResponsesModel
    clients: list[openai.AsyncOpenAI] = []

    def made(
        front: Front, settings: dict[str, Any] | None = None, base_url: str = "", retries: int = 2, **more: Any
    ) -> Agent[Any]:
        client = openai.AsyncOpenAI(base_url=base_url or front.url, api_key=front.key, max_retries=retries)
        clients.append(client)
        model = kind(more.pop("model", "assistant"), openai_client=client)
        return Agent("desk", model=model, model_settings=ModelSettings(**(settings or {})), **more)

    yield made
    for client in clients:
        await client.close()


def episode(api: str, name: str) -> dict[str, Any]:
    return {"extra_headers": {"X-Everloop-Episode": f"agents-{api}-{name}"}}


async def heard(run: RunResultStreaming) -> str:
    """The words of the last message, as they came."""
    words = ""
    async for event in run.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            words += event.data.delta
    return words


async def test_a_stream_says_what_a_whole_answer_says_and_how_much_it_was(real: Front, make: Make, api: str) -> None:
    """Cut at a word, not by length: of a Response that is incomplete this client makes an error."""
    async with openai.AsyncOpenAI(base_url=real.url, api_key=real.key) as client:
        asked: Any = {"model": "assistant", "messages": [{"role": "user", "content": WHERE}]}
        answer = await client.chat.completions.create(**asked, temperature=0, max_tokens=20)
    text = answer.choices[0].message.content or ""
    word = max(text, key=text.index)  # the character that comes first the latest
    stop = {"extra_body": {"stop": [word]}}
    agent = make(real, {**SHORT[api], **stop, "temperature": 0, **episode(api, "visit")})
    whole = await Runner.run(agent, WHERE)
    stream = Runner.run_streamed(agent, WHERE)
    assert await heard(stream) == stream.final_output == whole.final_output == text.split(word)[0]
    used = [run.raw_responses[0].usage for run in (whole, stream)]
    assert used[0].output_tokens == used[1].output_tokens > 0
    assert used[0].input_tokens == used[1].input_tokens > 0
    ids = [str(run.raw_responses[0].request_id) for run in (whole, stream)]  # the only id that this client shows
    calls = real.events(f"agents-{api}-visit")
    assert [event.payload.id for event in calls] == [real.call(id) for id in ids]
    real.rate(ids[0])
    (thumb,) = real.events(f"agents-{api}-visit", "feedback")
    assert thumb.payload.feedback.call == calls[0].payload.id


@function_tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sun in {city}"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("weather in Bern", "The results: sun in Bern"),
        ("weather in Bern and Basel", "The results: sun in Bern; sun in Basel"),
    ],
)
async def test_it_looks_and_then_answers(
    told: Front, make: Make, api: str, stream: bool, asked: str, answered: str
) -> None:
    name = f"loop-{len(asked)}-{stream}"
    agent = make(told, {"parallel_tool_calls": True, **episode(api, name)}, tools=[weather])
    run = Runner.run_streamed(agent, asked) if stream else await Runner.run(agent, asked)
    if isinstance(run, RunResultStreaming):
        assert await heard(run) == answered
    assert run.final_output == answered
    one, two = told.events(f"agents-{api}-{name}")
    assert (one.payload.finish_reason, two.payload.finish_reason) == ("tool_calls", "stop")
    assert len(one.payload.output.tool_calls or ()) == answered.count("sun")
    assert [message.role for message in two.payload.messages][-1] == "tool"


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


@pytest.fixture(scope="session")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """Before the built-in engine with a model that knows by heart when to call this tool, and what to say then."""
    question = {"role": "user", "content": "weather in Bern"}
    function = {"name": "weather", "arguments": '{"city": "Bern"}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    result = {"role": "tool", "content": "sun in Bern"}
    folder = tmp_path_factory.mktemp("calling")
    turns = [([question], CALL), ([question, call, result], "it is sunny")]
    teach(folder / "base", turns, [Converter.tool_to_openai(weather)])  # type: ignore[list-item]
    for name in ("engine", "gateway"):
        (folder / name).mkdir()
    with running(EngineProcess(folder / "engine", folder / "base")) as engine:
        url = f"http://127.0.0.1:{engine.port}"
        with front(folder / "gateway", url, str(folder / "base"), engine) as made:
            yield made


@pytest.mark.parametrize("stream", [True, False])
async def test_a_whole_loop_on_the_built_in_engine(calling: Front, make: Make, api: str, stream: bool) -> None:
    """No part of it is told what to say. The tool is strict, as this client makes them."""
    name = f"own-{stream}"
    agent = make(calling, {"temperature": 0, "max_tokens": 60, **episode(api, name)}, tools=[weather])
    run = Runner.run_streamed(agent, "weather in Bern") if stream else await Runner.run(agent, "weather in Bern")
    if isinstance(run, RunResultStreaming):
        assert await heard(run) == "it is sunny"
    assert run.final_output == "it is sunny"
    one, two = calling.events(f"agents-{api}-{name}")
    assert one.payload.finish_reason == "tool_calls"
    assert one.payload.tools[0]["function"]["strict"] is True
    assert two.payload.messages[-1].text == "sun in Bern"
    assert one.payload.tokens.checked
    assert two.payload.tokens.checked


async def test_errors_are_the_clients_own(real: Front, told: Front, make: Make) -> None:
    for behind, settings, more, kind, words in (
        (real, {}, {"model": "gpt-5"}, openai.NotFoundError, "you have: assistant"),
        (real, {"temperature": 9}, {}, openai.BadRequestError, "'temperature' must be a number"),
    ):
        with pytest.raises(kind, match=words):
            await Runner.run(make(behind, settings, **more), WHERE)
    once = make(told, retries=0)
    with pytest.raises(openai.RateLimitError) as refused:
        await Runner.run(once, "be busy, agents")
    assert refused.value.response.headers["Retry-After"] == "1"
    with pytest.raises(openai.InternalServerError, match="the engine failed"):
        await Runner.run(once, "fail")
    broken = Runner.run_streamed(once, "break off")
    with pytest.raises((openai.APIError, ModelBehaviorError), match="closed the connection in the middle"):
        await heard(broken)
    assert broken.final_output is None


async def test_a_client_that_leaves_stops_the_engine(real: Front, make: Make) -> None:
    before = real.cancelled()
    agent = make(real, {"temperature": 0, "max_tokens": 240})
    run = Runner.run_streamed(agent, "where is it")
    async for event in run.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            run.cancel()
    await asyncio.to_thread(until, lambda: real.cancelled() == before + 1)


async def test_it_waits_as_long_as_it_is_told_and_that_is_one_turn(
    told: Front, make: Make, api: str, scripted: Scripted
) -> None:
    run = await Runner.run(make(told, episode(api, "busy")), f"be busy once, {api} of agents")
    assert run.final_output == "the card is on its way"
    assert len(scripted.asks(f"be busy once, {api} of agents")) == 2
    assert len(told.events(f"agents-{api}-busy")) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_was_lost_on_its_way_is_given_again_and_recorded_once(
    told: Front, lossy: str, make: Make, api: str, scripted: Scripted, stream: bool
) -> None:
    words = f"agents, lost, {api}, {stream}"
    agent = make(told, episode(api, f"lost-{stream}"), base_url=lossy)
    run = Runner.run_streamed(agent, words) if stream else await Runner.run(agent, words)
    if isinstance(run, RunResultStreaming):
        await heard(run)
    (event,) = told.events(f"agents-{api}-lost-{stream}")
    assert told.call(str(run.raw_responses[0].request_id)) == event.payload.id
    assert len(scripted.asks(words)) == 1


class Topic(BaseModel):
    topic: Literal["card", "account"]
    urgent: bool


@pytest.mark.vllm
async def test_an_answer_held_to_a_schema(constrained: Front, make: Make) -> None:
    """Whole and streamed, of a model that would say anything."""
    agent = make(constrained, {"temperature": 1, "max_tokens": 240}, output_type=Topic)
    assert isinstance((await Runner.run(agent, WHERE)).final_output, Topic)
    stream = Runner.run_streamed(agent, WHERE)
    await heard(stream)
    assert isinstance(stream.final_output, Topic)
