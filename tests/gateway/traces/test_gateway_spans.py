"""Reading spans: three conventions say the same call, and nothing that they may hold breaks the reader.

What instrumentations write was recorded from the named releases; those that can be installed beside the rest are run
in ``test_gateway_instrumented.py``.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from everloop.event import Call as Recorded
from everloop.event import ToolResult
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway import spans
from services.gateway.otlp import SpanRead
from services.gateway.spans import Unreadable


def span(attributes: dict[str, Any], **more: Any) -> SpanRead:
    fields = {"trace": "1" * 32, "id": "2" * 16, "parent": "", "name": "chat", "scope": "x", "start": 1, "end": 2}
    return SpanRead(**{**fields, "attributes": attributes, "resource": {}, "failed": None, **more})


ROUTE = {"name": "route", "description": "d", "parameters": {"type": "object"}}
CALLED = {"id": "t1", "type": "function", "function": {"name": "route", "arguments": '{"a":1}'}}
MESSAGES = [
    {"role": "system", "content": "You are a desk."},
    {"role": "user", "content": "Where is my card?"},
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "content": "queued", "tool_call_id": "t1"},
]

# opentelemetry-instrumentation-genai-openai 1.3b0, its system message set apart as other providers' have it
OPENTELEMETRY = {
    "gen_ai.operation.name": "chat",
    "gen_ai.request.model": "gpt-4o",
    "gen_ai.response.model": "gpt-4o-2024",
    "gen_ai.request.temperature": 0.5,
    "gen_ai.response.finish_reasons": ["stop"],
    "gen_ai.system_instructions": '[{"type": "text", "content": "You are a desk."}]',
    "gen_ai.input.messages": json.dumps(
        [
            {"role": "user", "parts": [{"content": "Where is my card?", "type": "text"}], "name": None},
            {
                "role": "assistant",
                "parts": [{"arguments": {"a": 1}, "name": "route", "id": "t1", "type": "tool_call"}],
            },
            {"role": "tool", "parts": [{"response": "queued", "id": "t1", "type": "tool_call_response"}]},
        ]
    ),
    "gen_ai.output.messages": '[{"role":"assistant","parts":[{"content":"On its way.","type":"text"}],"name":null}]',
    "gen_ai.tool.definitions": json.dumps([{**ROUTE, "type": "function"}]),
}
# opentelemetry-instrumentation-openai 0.47.0 (OpenLLMetry)
OPENLLMETRY = {
    "llm.request.type": "chat",
    "gen_ai.system": "openai",
    "gen_ai.request.model": "gpt-4o",
    "gen_ai.request.temperature": 0.5,
    "gen_ai.prompt.0.role": "system",
    "gen_ai.prompt.0.content": "You are a desk.",
    "gen_ai.prompt.1.role": "user",
    "gen_ai.prompt.1.content": "Where is my card?",
    "gen_ai.prompt.2.role": "assistant",
    "gen_ai.prompt.2.tool_calls.0.id": "t1",
    "gen_ai.prompt.2.tool_calls.0.name": "route",
    "gen_ai.prompt.2.tool_calls.0.arguments": '{"a":1}',
    "gen_ai.prompt.3.role": "tool",
    "gen_ai.prompt.3.content": "queued",
    "gen_ai.prompt.3.tool_call_id": "t1",
    "llm.request.functions.0.name": "route",
    "llm.request.functions.0.description": "d",
    "llm.request.functions.0.parameters": '{"type": "object"}',
    "gen_ai.response.model": "gpt-4o-2024",
    "gen_ai.completion.0.finish_reason": "stop",
    "gen_ai.completion.0.role": "assistant",
    "gen_ai.completion.0.content": "On its way.",
}
# openinference-instrumentation-openai 0.1.66
OPENINFERENCE = {
    "openinference.span.kind": "LLM",
    "llm.invocation_parameters": '{"model": "gpt-4o", "temperature": 0.5}',
    "llm.model_name": "gpt-4o-2024",
    "llm.finish_reason": "stop",
    "llm.input_messages.0.message.role": "system",
    "llm.input_messages.0.message.content": "You are a desk.",
    "llm.input_messages.1.message.role": "user",
    "llm.input_messages.1.message.content": "Where is my card?",
    "llm.input_messages.2.message.role": "assistant",
    "llm.input_messages.2.message.tool_calls.0.tool_call.id": "t1",
    "llm.input_messages.2.message.tool_calls.0.tool_call.function.name": "route",
    "llm.input_messages.2.message.tool_calls.0.tool_call.function.arguments": '{"a":1}',
    "llm.input_messages.3.message.role": "tool",
    "llm.input_messages.3.message.tool_call_id": "t1",
    "llm.input_messages.3.message.content": "queued",
    "llm.output_messages.0.message.role": "assistant",
    "llm.output_messages.0.message.content": "On its way.",
    "llm.tools.0.tool.json_schema": json.dumps({"type": "function", "function": ROUTE}),
}
CONVENTIONS = {"opentelemetry": OPENTELEMETRY, "openllmetry": OPENLLMETRY, "openinference": OPENINFERENCE}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_each_convention_says_the_same_call(name: str) -> None:
    read = span(CONVENTIONS[name])
    assert spans.kind(read) == "call"
    call = spans.call(read)
    assert call.messages == MESSAGES
    assert call.outputs == [({"role": "assistant", "content": "On its way."}, "stop")]
    assert call.tools == [{"type": "function", "function": ROUTE}]
    assert (call.model, call.sampling, call.error) == ("gpt-4o-2024", {"temperature": 0.5}, None)


def test_two_conventions_in_one_span_are_one_call() -> None:
    call = spans.call(span({**OPENINFERENCE, **OPENLLMETRY, **OPENTELEMETRY}))
    assert (call.messages, len(call.outputs)) == (MESSAGES, 1)


def test_prompts_without_messages() -> None:
    read = span(
        {
            "openinference.span.kind": "LLM",
            "llm.prompts.0.prompt.text": "Once",
            "llm.choices.0.completion.text": " upon",
            "llm.choices.1.completion.text": " more",
        }
    )
    call = spans.call(read)
    assert call.messages == [{"role": "user", "content": "Once"}]
    assert [output.message["content"] for output in call.outputs] == [" upon", " more"]


def test_a_tool_call_as_an_answer() -> None:
    parts = [{"type": "tool_call", "id": "t1", "name": "route", "arguments": {"a": 1}}, {"type": "reasoning"}]
    said = [{"role": "assistant", "parts": parts, "finish_reason": "tool_call"}]
    call = spans.call(span({**OPENTELEMETRY, "gen_ai.output.messages": json.dumps(said)}))
    assert call.outputs == [({"role": "assistant", "content": None, "tool_calls": [CALLED]}, "tool_calls")]


PIXEL = "data:image/png;base64,aGk="


@pytest.mark.parametrize(
    "attributes",
    [
        {
            "gen_ai.operation.name": "chat",
            "gen_ai.input.messages": [
                {
                    "role": "human",
                    "parts": [
                        {"type": "text", "content": "What is it?"},
                        {"type": "blob", "modality": "image", "mime_type": "image/png", "content": "aGk="},
                        {"type": "uri", "modality": "image", "uri": "http://10.0.0.1/x.png"},
                    ],
                }
            ],
            "gen_ai.output.messages": [{"role": "model", "parts": [{"type": "text", "content": "a"}]}],
        },
        {
            "openinference.span.kind": "LLM",
            "llm.input_messages.0.message.role": "user",
            "llm.input_messages.0.message.contents.0.message_content.type": "text",
            "llm.input_messages.0.message.contents.0.message_content.text": "What is it?",
            "llm.input_messages.0.message.contents.1.message_content.type": "image",
            "llm.input_messages.0.message.contents.1.message_content.image.image.url": PIXEL,
            "llm.input_messages.0.message.contents.2.message_content.type": "image",
            "llm.input_messages.0.message.contents.2.message_content.image.image.url": "http://10.0.0.1/x.png",
            "llm.output_messages.0.message.role": "assistant",
            "llm.output_messages.0.message.content": "a",
        },
    ],
)
def test_images_stay_and_addresses_are_only_named(attributes: dict[str, Any]) -> None:
    (message,) = spans.call(span(attributes)).messages
    assert message == {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": PIXEL}},
            {"type": "text", "text": "[image: http://10.0.0.1/x.png]"},
        ],
    }


@pytest.mark.parametrize(
    ("attributes", "kind"),
    [
        ({"gen_ai.operation.name": "execute_tool"}, "tool"),
        ({"openinference.span.kind": "TOOL"}, "tool"),
        ({"traceloop.span.kind": "tool"}, "tool"),
        ({"gen_ai.operation.name": "invoke_agent", "gen_ai.input.messages": "[]"}, None),
        ({"gen_ai.operation.name": "embeddings"}, None),
        ({"openinference.span.kind": "CHAIN"}, None),
        ({"gen_ai.operation.name": "chat", "everloop.call": "call_1"}, None),
        ({"http.method": "GET"}, None),
    ],
)
def test_what_a_span_is(attributes: dict[str, Any], kind: str | None) -> None:
    assert spans.kind(span(attributes)) == kind


@pytest.mark.parametrize(
    "attributes",
    [
        {
            "gen_ai.tool.name": "route",
            "gen_ai.tool.call.id": "t1",
            "gen_ai.tool.call.arguments": {"a": 1},
            "gen_ai.tool.call.result": "queued",
        },
        {"tool.name": "route", "tool_call.id": "t1", "input.value": '{"a":1}', "output.value": "queued"},
        {"traceloop.entity.name": "route", "traceloop.entity.input": '{"a":1}', "traceloop.entity.output": "queued"},
    ],
)
def test_a_tools_span_says_what_it_answered(attributes: dict[str, Any]) -> None:
    found = ToolResult.model_validate(spans.tool(span(attributes, failed="error")))
    assert (found.name, found.arguments, found.result, found.error) == ("route", '{"a":1}', "queued", True)
    assert found.id == ("2" * 16 if "traceloop.entity.name" in attributes else "t1")


NAMES = sorted({name for one in CONVENTIONS.values() for name in one})
ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "parts", "type", "content", "text", "name", "arguments", "uri", "function"]), inner
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    base=st.sampled_from(sorted(CONVENTIONS)),
    changes=st.dictionaries(st.sampled_from([*NAMES, "gen_ai.prompt.0", "llm.tools.0", "error.type"]), ANY, max_size=4),
    as_text=st.booleans(),
)
def test_whatever_stands_in_a_span_it_is_a_call_or_unreadable(base: str, changes: Any, as_text: bool) -> None:
    if as_text:
        changes = {name: json.dumps(value) for name, value in changes.items()}
    read = span({**CONVENTIONS[base], **changes})
    if spans.kind(read) != "call":
        return
    spans.response_of(read)
    try:
        call = spans.call(read)
    except Unreadable:
        return
    for output in call.outputs:
        Recorded(
            id="c",
            messages=call.messages,
            output=output.message,
            tools=call.tools,
            finish_reason=output.finish_reason,
            sampling=call.sampling,
            model=call.model,
            error=call.error,
        )
