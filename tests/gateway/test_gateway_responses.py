"""The Responses API: the official client works unchanged, and what is recorded is an ordinary call."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import orjson
import pytest
from everloop.config import PolicyConfig
from everloop.errors import LogFull, ServingError
from pydantic import BaseModel

from services.gateway.refusals import Refused
from services.gateway.responses import read

ASK: dict[str, Any] = {"model": "assistant", "input": "Where is my card?"}
SAYS = "the card is on its way"
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
IN_CHAT = {"type": "function", "function": {name: WEATHER[name] for name in ("name", "parameters")}}
DOT = "data:image/png;base64,iVBORw0KGgo="


def call(id: str, arguments: str = '{"city": "Bern"}') -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


async def events_of(stream: Any) -> list[Any]:
    return [event async for event in stream]


async def raw_stream(bench: Any, **headers: str) -> tuple[bytes, Any]:
    auth = {"Authorization": f"Bearer {bench.key}"} | headers
    async with bench.http.post(f"{bench.url}/v1/responses", headers=auth, json={**ASK, "stream": True}) as answer:
        return await answer.read(), answer.headers


async def test_a_response_is_answered_and_recorded_as_a_call(bench: Any) -> None:
    answer = await bench.client().responses.create(
        **ASK, instructions="Be short.", user="anna", max_output_tokens=9, temperature=0.5, metadata={"a": "b"}
    )
    assert answer.output_text == SAYS
    assert (answer.status, answer.object, answer.model) == ("completed", "response", "assistant")
    assert (answer.temperature, answer.max_output_tokens, answer.metadata) == (0.5, 9, {"a": "b"})
    assert answer.instructions == "Be short."
    assert answer.model_dump()["store"] is False
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (3, 6, 9)
    assert answer.output[0].type == "message"
    assert "token_ids" not in answer.model_dump_json()
    (event,) = bench.events()
    said = event.payload
    assert [(m.role, m.text) for m in said.messages] == [("system", "Be short."), ("user", "Where is my card?")]
    assert said.output.text == SAYS
    assert event.subject == bench.home.ids.pseudonym("bank", "subject", "anna")
    assert said.tokens.checked
    assert (said.sampling.temperature, said.sampling.max_tokens) == (0.5, 9)
    assert bench.home.ids.parse_response("bank", answer.id) == (event.episode, said.id)
    assert answer.id.startswith("resp_")
    asked = bench.engine.asked[0]
    assert (asked["max_tokens"], asked["messages"][0]["role"]) == (9, "system")
    assert not {"input", "instructions", "metadata", "user"} & asked.keys()


async def test_the_stream_is_the_sequence_of_events_that_clients_follow(bench: Any) -> None:
    stream = await bench.client().responses.create(**ASK, stream=True)
    events = await events_of(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 6,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == SAYS
    final = events[-1].response
    assert (final.output_text, final.usage.output_tokens, final.status) == (SAYS, 6, "completed")
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {final.output[0].id}
    assert events[0].response.status == "in_progress"
    (event,) = bench.events()
    assert event.payload.output.text == SAYS
    assert list(event.payload.tokens.completion) == [100, 101, 102, 103, 104, 105]
    assert bench.home.ids.parse_response("bank", final.id) == (event.episode, event.payload.id)


async def test_whole_and_streamed_say_the_same(bench: Any) -> None:
    bench.engine.tool_calls = [call("c1"), call("c2", '{"city": "Basel"}')]
    client = bench.client()
    whole = await client.responses.create(**ASK, tools=[WEATHER])
    async with client.responses.stream(**ASK, tools=[WEATHER]) as stream:
        streamed = await stream.get_final_response()

    def bare(answer: Any) -> Any:
        fields = answer.model_dump()
        for item in fields["output"]:
            item.pop("id")
            item.pop("parsed_arguments", None)
        return {name: value for name, value in fields.items() if name != "id"}

    assert bare(streamed) == bare(whole)
    assert [item.call_id for item in whole.output] == ["c1", "c2"]


async def test_the_streaming_helper_reads_parallel_function_calls(bench: Any) -> None:
    bench.engine.tool_calls = [call("c1"), call("c2", '{"city": "Basel"}')]
    async with bench.client().responses.stream(**ASK, tools=[WEATHER]) as stream:
        events = await events_of(stream)
        answer = await stream.get_final_response()
    assert [(item.call_id, item.name, item.arguments) for item in answer.output] == [
        ("c1", "weather", '{"city": "Bern"}'),
        ("c2", "weather", '{"city": "Basel"}'),
    ]
    told = [event.output_index for event in events if hasattr(event, "output_index")]
    assert told == sorted(told), "one item after another, however the engine's pieces come"
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == ['{"city": "Bern"}', '{"city": "Basel"}']
    assert bench.engine.asked[0]["tools"] == [IN_CHAT]
    (event,) = bench.events()
    assert event.payload.output.tool_calls == bench.engine.tool_calls
    assert event.payload.tools == (IN_CHAT,)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_by_its_items_is_one_episode(bench: Any, stream: bool) -> None:
    """Question, call, result, answer, question: as the client gives its output back, whole or streamed."""
    client = bench.client()

    async def ask(items: list[Any]) -> list[Any]:
        if not stream:
            return (await client.responses.create(model="assistant", input=items, tools=[WEATHER])).output
        events = await events_of(
            await client.responses.create(model="assistant", input=items, tools=[WEATHER], stream=True)
        )
        return events[-1].response.output

    items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "Is it sunny?"}]}]
    bench.engine.tool_calls = [call("c1"), call("c2")]
    items += [item.model_dump() for item in await ask(items)]
    items += [{"type": "function_call_output", "call_id": id, "output": "sun"} for id in ("c1", "c2")]
    bench.engine.tool_calls = []
    items += [item.model_dump() for item in await ask(items)]
    items += [{"type": "reasoning", "id": "rs_1", "summary": []}, {"role": "user", "content": "And tomorrow?"}]
    await ask(items)
    events = bench.events()
    assert len({event.episode for event in events}) == 1
    assert [message.role for message in events[-1].payload.messages] == [
        *("user", "assistant", "tool", "tool", "assistant", "user")
    ]
    assert [c["id"] for c in events[-1].payload.messages[1].tool_calls] == ["c1", "c2"]
    assert events[-1].payload.messages[4].content == SAYS


async def test_parse_asks_for_a_schema_and_reads_it(bench: Any) -> None:
    class Weather(BaseModel):
        city: str

    bench.engine.says = '{"city":"Bern"}'
    answer = await bench.client().responses.parse(**ASK, text_format=Weather)
    assert answer.output_parsed == Weather(city="Bern")
    form = bench.engine.asked[0]["response_format"]
    assert (form["type"], form["json_schema"]["name"], form["json_schema"]["strict"]) == (
        "json_schema",
        "Weather",
        True,
    )
    assert form["json_schema"]["schema"]["required"] == ["city"]
    assert bench.events()[0].payload.sampling.constrained


async def test_parameters_reach_the_engine_in_their_chat_form(bench: Any) -> None:
    await bench.client().responses.create(
        **ASK,
        tools=[WEATHER],
        tool_choice={"type": "function", "name": "weather"},
        parallel_tool_calls=False,
        reasoning={"effort": "low"},
        text={"verbosity": "low", "format": {"type": "json_object"}},
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        store=True,
        service_tier="auto",
        prompt_cache_key="k",
        safety_identifier="s",
        truncation="disabled",
        extra_body={"seed": 7, "top_k": 5},
    )
    asked = bench.engine.asked[0]
    assert asked["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert (asked["parallel_tool_calls"], asked["reasoning_effort"], asked["verbosity"]) == (False, "low", "low")
    assert asked["response_format"] == {"type": "json_object"}
    assert (asked["logprobs"], asked["top_logprobs"], asked["seed"], asked["top_k"]) == (True, 2, 7, 5)
    assert not {"store", "service_tier", "prompt_cache_key", "safety_identifier", "truncation", "text"} & asked.keys()


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_come_where_they_are_included(bench: Any, stream: bool) -> None:
    client = bench.client()
    answer = await client.responses.create(**ASK, include=["message.output_text.logprobs"], stream=stream)
    if stream:
        events = await events_of(answer)
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        assert [event.logprobs[0].logprob for event in deltas] == [-0.25] * 6
        answer = events[-1].response
    part = answer.output[0].content[0]
    assert [token.logprob for token in part.logprobs] == [-0.25] * 6
    assert bytes(part.logprobs[0].bytes).decode() == "the"
    (without,) = (await client.responses.create(**ASK)).output
    assert without.content[0].logprobs == []


async def test_pictures_and_files_go_on_as_data_alone(bench: Any) -> None:
    parts = [
        {"type": "input_text", "text": "What is this?"},
        {"type": "input_image", "image_url": DOT, "detail": "low"},
        {"type": "input_file", "file_data": DOT, "filename": "dot.png"},
    ]
    await bench.client().responses.create(model="assistant", input=[{"role": "user", "content": parts}])
    assert bench.engine.asked[0]["messages"][0]["content"] == [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": DOT, "detail": "low"}},
        {"type": "file", "file": {"file_data": DOT, "filename": "dot.png"}},
    ]


def content(*parts: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"previous_response_id": "resp_x"}, "send the earlier items in 'input'"),
        ({"conversation": "conv_x"}, "send the earlier items"),
        ({"prompt": {"id": "pmpt_x"}}, "send 'instructions'"),
        ({"background": True}, "use 'stream'"),
        ({"truncation": "auto"}, "leaves nothing out"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\] is of type 'web_search': no tools run here"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\].name is missing"),
        ({"tools": [IN_CHAT]}, r"tools\[0\].name is missing"),
        ({"tool_choice": {"type": "web_search"}}, "no other tools are here"),
        ({"tool_choice": "any"}, "'auto'"),
        ({"include": ["web_search_call.results"]}, "which no answer here has"),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, "not summarised"),
        ({"text": {"format": {"type": "grammar"}}}, "types are: text"),
        ({"text": {"format": {"type": "json_schema"}}}, "needs 'name' and 'schema'"),
        ({"text": {"form": {}}}, "'format' and 'verbosity'"),
        ({"max_tokens": 5}, "unknown parameter 'max_tokens'.* did you mean 'max_output_tokens'"),
        ({"messages": []}, "unknown parameter 'messages'"),
        ({"max_output_tokens": 0}, "'max_output_tokens' must be a whole number"),
        ({"temperature": 3}, "'temperature' must be a number from 0 to 2"),
        ({"input": []}, "'input' is missing or empty"),
        ({"input": None}, "'input' is missing or empty"),
        ({"input": 5}, "'input' must be a text or a list of items"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "'store': false"),
        ({"input": [{"type": "web_search_call"}]}, r"input\[0\] is of type 'web_search_call'"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "nothing for a model to read"),
        ({"input": ["hello"]}, r"input\[0\] is of type None"),
        ({"input": [{"role": "tool", "content": "x"}]}, r"input\[0\] has role 'tool'"),
        ({"input": [{"role": "user"}]}, r"input\[0\].content must be a text or a list"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "arguments must be a text"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "call_id must be a text"),
        (content({"type": "input_text"}), r"input\[0\].content\[0\].text must be a text"),
        (content({"type": "text", "text": "x"}), "parts are input_text"),
        (content({"type": "input_image", "image_url": "https://x.test/a.png"}), "must be a data: URL"),
        (content({"type": "input_image", "file_id": "file-1"}), "keeps no files"),
        (content({"type": "input_file", "file_url": "https://x.test/a.pdf"}), "keeps no files"),
    ],
)
def test_what_is_not_done_is_refused_by_name(more: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words) as refused:
        read({**ASK, **more}, {"assistant": PolicyConfig(base="tiny")})
    assert refused.value.status == 400
    assert refused.value.param in more


async def test_a_refusal_reaches_the_client_and_leaves_nothing(bench: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="send the earlier items") as refused:
        await bench.client().responses.create(**ASK, previous_response_id="resp_x")
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "previous_response_id")
    assert not bench.events()
    assert not bench.engine.asked


async def test_an_answer_cannot_be_fetched_and_is_told_so(bench: Any) -> None:
    client = bench.client()
    answer = await client.responses.create(**ASK)
    with pytest.raises(openai.NotFoundError, match="not kept to be fetched"):
        await client.responses.retrieve(answer.id)
    with pytest.raises(openai.NotFoundError, match="not kept to be fetched"):
        await client.responses.delete(answer.id)
    status, said, _ = await bench.post("/v1/responses", {}, key="ek_wrong")
    assert (status, said["error"]["code"]) == (401, "invalid_api_key")
    async with bench.http.get(f"{bench.url}/v1/responses") as refused:
        assert (refused.status, refused.headers["Allow"]) == (405, "POST")


async def test_feedback_takes_a_response_by_its_id(bench: Any) -> None:
    answer = await bench.client().responses.create(**ASK)
    status, _, _ = await bench.post("/v1/feedback", {"response_id": answer.id, "kind": "thumb", "value": 1})
    assert status == 202
    one, two = bench.events()
    assert (one.episode, one.payload.id) == (two.episode, two.payload.feedback.call)
    other = bench.new_key("airline")
    status, _, _ = await bench.post("/v1/feedback", {"response_id": answer.id, "kind": "thumb", "value": 1}, other)
    assert status == 404


async def test_a_retry_gets_the_same_bytes_also_after_a_restart_the_same_answer(start: Any) -> None:
    bench = await start()
    first, headers = await raw_stream(bench, **{"Idempotency-Key": "k1"})
    again, _ = await raw_stream(bench, **{"Idempotency-Key": "k1"})
    assert again == first
    whole = {"Idempotency_Key": "k2"}
    _, before, _ = await bench.post("/v1/responses", ASK, **whole)
    later = await start()
    later.key = bench.key
    recovered, headers_after = await raw_stream(later, **{"Idempotency-Key": "k1"})
    assert headers_after["X-Everloop-Call"] == headers["X-Everloop-Call"]
    final, once = (orjson.loads(raw.split(b"data: ")[-1])["response"] for raw in (recovered, first))
    assert (final["id"], final["output"]) == (once["id"], once["output"])
    _, after, _ = await later.post("/v1/responses", ASK, **whole)
    assert (after["id"], after["output"], after["usage"]) == (before["id"], before["output"], before["usage"])
    assert not later.engine.asked
    assert len(later.events()) == 2


async def test_the_completed_event_waits_until_the_call_is_durable(bench: Any, monkeypatch: Any) -> None:
    held: list[asyncio.Future[None]] = []
    store = bench.gateway.capture.store
    written = asyncio.Event()

    def slow(events: Any) -> asyncio.Future[None]:
        stored = store(events)
        waits: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        held.append(waits)
        stored.add_done_callback(lambda _: written.set())
        return waits

    monkeypatch.setattr(bench.gateway.capture, "store", slow)
    stream = await bench.client().responses.create(**ASK, stream=True)
    kinds = [(await anext(stream)).type for _ in range(9)]
    assert kinds[-1] == "response.output_text.delta"
    following = asyncio.ensure_future(anext(stream))
    await asyncio.wait_for(written.wait(), 30)
    await asyncio.sleep(0)
    assert not following.done()
    held[0].set_result(None)
    rest = [(await following).type] + [event.type async for event in stream]
    assert rest[-1] == "response.completed"


async def test_a_stream_that_breaks_fails_and_raises(bench: Any, soon: Any) -> None:
    bench.engine.break_after = 3
    kinds: list[str] = []
    stream = await bench.client().responses.create(**ASK, stream=True)

    async def follow() -> None:
        async for event in stream:
            kinds.append(event.type)

    with pytest.raises(openai.APIError, match="broke off") as raised:
        await follow()
    assert kinds[-1] == "response.failed"
    assert "response.completed" not in kinds
    assert raised.value.code == "upstream_broken"
    await soon(bench.events)
    (event,) = bench.events()
    assert event.payload.error == "the engine broke off"


async def test_what_was_withheld_is_not_told_by_the_failure(bench: Any, monkeypatch: Any) -> None:
    def full(events: Any) -> asyncio.Future[None]:
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stored.set_exception(LogFull("no room"))
        return stored

    monkeypatch.setattr(bench.gateway.capture, "store", full)
    raw, _ = await raw_stream(bench)
    assert b" way" not in raw
    assert b"log_full" in raw
    assert b"response.completed" not in raw


async def test_an_engine_that_refuses_is_told_by_status(bench: Any) -> None:
    bench.engine.error = ServingError("this model cannot do that", status=400, code="unsupported")
    with pytest.raises(openai.BadRequestError, match="cannot do that"):
        await bench.client().responses.create(**ASK, stream=True)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_was_cut_is_incomplete(bench: Any, stream: bool) -> None:
    def cut(answer: dict[str, Any]) -> None:
        answer["choices"][0]["finish_reason"] = "length"

    bench.engine.change = cut
    said = bench.engine.stream

    async def cut_stream(route: str, body: dict[str, Any]) -> Any:
        async for chunk in said(route, body):
            if chunk["choices"] and chunk["choices"][0]["finish_reason"]:
                cut(chunk)
            yield chunk

    bench.engine.stream = cut_stream
    answer = await bench.client().responses.create(**ASK, stream=stream)
    if stream:
        last = (await events_of(answer))[-1]
        assert last.type == "response.incomplete"
        answer = last.response
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete"
    assert answer.output_text == SAYS


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_are_items_of_their_own(bench: Any, stream: bool) -> None:
    def think(answer: dict[str, Any]) -> None:
        answer["choices"][0]["message"]["reasoning"] = "cards come by post"

    bench.engine.change = think
    said = bench.engine.stream

    async def thinking(route: str, body: dict[str, Any]) -> Any:
        for word in ("cards come", " by post"):
            yield {"created": 1, "choices": [{"index": 0, "delta": {"reasoning": word}, "finish_reason": None}]}
        async for chunk in said(route, body):
            yield chunk

    bench.engine.stream = thinking
    answer = await bench.client().responses.create(**ASK, stream=stream)
    if stream:
        events = await events_of(answer)
        kinds = [event.type for event in events]
        assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")
        answer = events[-1].response
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output[0].content[0].text == "cards come by post"
    assert answer.output_text == SAYS


async def test_an_empty_answer_is_an_empty_message(bench: Any) -> None:
    bench.engine.says = ""
    whole = await bench.client().responses.create(**ASK)
    events = await events_of(await bench.client().responses.create(**ASK, stream=True))
    for answer in (whole, events[-1].response):
        assert (answer.output_text, answer.status, len(answer.output)) == ("", "completed", 1)


async def test_a_client_that_leaves_stops_the_generation(bench: Any, soon: Any) -> None:
    bench.engine.resume.clear()
    stream = await bench.client().responses.create(**ASK, stream=True)
    await anext(stream)
    await stream.close()
    await soon(lambda: bench.engine.cancelled)
    await soon(bench.events)
    assert bench.events()[0].payload.finish_reason == "cancelled"


async def test_capture_off_leaves_nothing(bench: Any) -> None:
    off = {"X-Everloop-Capture": "off"}
    answer = await bench.client().responses.create(**ASK, extra_headers=off)
    assert answer.id.startswith("resp_unrecorded-")
    assert answer.output_text == SAYS
    assert not bench.events()
