"""An agent with an instrumentation of the openai client, in a process of its own: instrumentations are not undone.

``python instrumented_agent.py <instrumentation> <base URL> <key> <model>`` prints the id of its trace. Where spans go,
and what is in them, it takes from OpenTelemetry's own variables, as any agent does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import openai
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

ASKED = [{"role": "system", "content": "You are a desk."}, {"role": "user", "content": "Where is my card?"}]
ROUTE = {"type": "function", "function": {"name": "route", "parameters": {"type": "object", "properties": {}}}}
RunsTool = Callable[[str], None]


def opentelemetry(tracing: TracerProvider, stack: ExitStack) -> RunsTool:
    from opentelemetry.instrumentation.genai.openai import OpenAIInstrumentor
    from opentelemetry.util.genai.handler import TelemetryHandler

    OpenAIInstrumentor().instrument(tracer_provider=tracing)
    handler = TelemetryHandler(tracer_provider=tracing)

    def run(arguments: str) -> None:
        with handler.tool("route") as tool:
            tool.arguments, tool.tool_result = json.loads(arguments), "queued"

    return run


def openinference(tracing: TracerProvider, stack: ExitStack) -> RunsTool:
    from openinference.instrumentation import OITracer, TraceConfig, using_session, using_user
    from openinference.instrumentation.openai import OpenAIInstrumentor

    OpenAIInstrumentor().instrument(tracer_provider=tracing)
    stack.enter_context(using_user("anna"))
    if len(sys.argv) > 5:
        stack.enter_context(using_session(sys.argv[5]))
    tool = OITracer(tracing.get_tracer("agent"), config=TraceConfig()).tool(name="route")(lambda topic: "queued")
    return lambda arguments: tool(**json.loads(arguments))


def openllmetry(tracing: TracerProvider, stack: ExitStack) -> RunsTool:
    from opentelemetry.instrumentation.openai import OpenAIInstrumentor

    OpenAIInstrumentor().instrument(tracer_provider=tracing)
    return lambda arguments: None  # tools are the business of its SDK


def main(instrumentation: str, url: str, key: str, model: str, *session: str) -> None:
    tracing = TracerProvider()
    tracing.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    with ExitStack() as stack:
        run = globals()[instrumentation](tracing, stack)
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
        with tracing.get_tracer("agent").start_as_current_span("turn") as turn:
            ask: dict[str, Any] = {"model": model, "tools": [ROUTE], "temperature": 0.5}
            first = client.chat.completions.create(messages=ASKED, **ask).choices[0].message
            run(first.tool_calls[0].function.arguments)
            told = {"role": "tool", "tool_call_id": "t1", "content": "queued"}
            client.chat.completions.create(messages=[*ASKED, first.model_dump(exclude_none=True), told], **ask)
    tracing.shutdown()
    print(format(turn.get_span_context().trace_id, "032x"))


if __name__ == "__main__":
    main(*sys.argv[1:])
