"""Agents with real instrumentations, unchanged: their spans come here, and are episodes with words, tools, feedback."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.processes
ASKED = [{"role": "system", "content": "You are a desk."}, {"role": "user", "content": "Where is my card?"}]
CALLED = {"id": "t1", "type": "function", "function": {"name": "route", "arguments": '{"topic":"card"}'}}


def provider(path: str, headers: Message, body: bytes) -> tuple[int, bytes]:
    """Somebody else's model: it asks for a tool, then answers."""
    told = json.loads(body)["messages"][-1]["role"] == "tool"
    message: dict[str, Any] = {"role": "assistant", "content": "It is on its way." if told else None}
    message |= {} if told else {"tool_calls": [CALLED]}
    choice = {"index": 0, "message": message, "finish_reason": "stop" if told else "tool_calls"}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    answer = {"id": "chatcmpl-9", "object": "chat.completion", "created": 1, "model": "gpt-4o-2024"}
    return 200, json.dumps({**answer, "choices": [choice], "usage": usage}).encode()


async def run(bench: Any, *arguments: str, **resource: str) -> str:
    """An agent's turn, its spans sent to this gateway; returns the trace's id."""
    attributes = ",".join(f"{name.replace('_', '.')}={value}" for name, value in resource.items())
    environment = {
        **os.environ,
        "OTEL_EXPORTER_OTLP_ENDPOINT": bench.url,
        "OTEL_EXPORTER_OTLP_HEADERS": f"Authorization=Bearer%20{bench.key}",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_RESOURCE_ATTRIBUTES": attributes,
        "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "span_only",
    }
    script = str(Path(__file__).with_name("instrumented_agent.py"))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, script, *arguments, env=environment, stdout=pipe, stderr=pipe
    )
    out, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors.decode()
    return out.decode().strip()


@pytest.mark.parametrize("instrumentation", ["opentelemetry", "openinference", "openllmetry"])
async def test_an_agent_gets_episodes_without_a_change(
    instrumentation: str, bench: Any, server: Any, store_of: Any
) -> None:
    inference = instrumentation == "openinference"
    session = ["visit-7"] if inference else []
    agent = (instrumentation, server(provider).url, "sk-else", "gpt-4o", *session)
    trace = await run(bench, *agent, service_name="assistant")
    name = "visit-7" if inference else trace
    words = {"episode": name, "kind": "thumb", "value": 1}
    assert (await bench.post("/v1/feedback", words))[0] == 202
    rows = store_of(bench).rows("SELECT * FROM turns ORDER BY turn")
    assert {row["episode"] for row in rows} == {bench.home.ids.episode_named("bank", name)}
    assert {row["trace"] for row in rows} == {trace}
    first, second = rows
    assert json.loads(first["messages"]) == ASKED
    assert json.loads(first["output"])["tool_calls"] == [CALLED]
    assert (first["finish_reason"], first["temperature"], first["model"]) == ("tool_calls", 0.5, "gpt-4o-2024")
    assert json.loads(first["tools_offered"])[0]["function"]["name"] == "route"
    tools = [] if instrumentation == "openllmetry" else [("route", "queued")]
    assert [(tool["name"], tool["result"]) for tool in first["tools"]] == tools
    history = json.loads(second["messages"])
    assert [message["role"] for message in history] == ["system", "user", "assistant", "tool"]
    assert (history[2]["tool_calls"], history[3]["content"]) == ([CALLED], "queued")
    assert (second["answer"], second["thumb"], second["policy_version"]) == ("It is on its way.", 1, "elsewhere")
    anna = bench.home.ids.pseudonym("bank", "subject", "anna")
    assert {row["subject"] for row in rows} == {anna if inference else None}


@pytest.mark.parametrize("instrumentation", ["opentelemetry", "openinference"])
async def test_of_an_agent_that_asks_here_the_gateway_keeps_its_own_record(
    instrumentation: str, bench: Any, store_of: Any
) -> None:
    bench.engine.tool_calls = [CALLED]
    await run(bench, instrumentation, f"{bench.url}/v1", bench.key, "assistant")
    rows = store_of(bench).rows("SELECT * FROM turns ORDER BY turn")
    assert [row["policy_version"] for row in rows] == ["base", "base"]
    assert len({row["episode"] for row in rows}) == 1
    assert sorted(event.payload.kind for event in bench.events()) == ["call", "call", "tool"]
