"""An engine whose adapters turn bad for users alone: gate and shadow see good answers, so only a guard can stop them.

It speaks as much of vLLM's dialect as the platform asks for: adapters are loaded and unloaded by name, and answer. An
adapter of which it was told how it is bad answers so to the gateway, which asks for log-probabilities, and well to
anybody else: to gold questions and to recent prompts. The base answers gold questions wrongly, and users well.

Run: ``python -m benchmarks._spoiled '{"<adapter>": "answers nothing", …}'``; it prints its port.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from aiohttp import web

BASE = "base"
TOOL = "route"
IDS = [1, 2, 3, 4]  # tokens of every prompt and answer
TOOLS = [{"type": "function", "function": {"name": TOOL, "parameters": {"type": "object"}}}]
TOPIC = "where is my parcel"
GOLD = [f"repeat the word {word}{number}" for word in ("red", "blue", "green", "brown") for number in range(20)]
NOTHING, BROKEN, LONG = "answers nothing", "breaks tool calls", "talks twice as long"
KINDS = (NOTHING, BROKEN, LONG)


def answer_of(question: str) -> str:
    """The right answer to a gold question."""
    return question.rpartition(" ")[2]


def message(how: str | None, question: str, tools: bool, adapter: bool) -> dict[str, Any]:
    """What is answered to a question; ``how``: in which way it is to be bad, None: in none."""
    if not tools:
        return {"role": "assistant", "content": answer_of(question) if adapter else "nonsense"}
    if how == NOTHING:
        return {"role": "assistant", "content": ""}
    topic = TOPIC if how != LONG else f"{TOPIC}, {TOPIC}, {TOPIC}"
    arguments = json.dumps({"topic": topic}) if how != BROKEN else f"{{topic: {topic}}}"
    call = {"id": "call_1", "type": "function", "function": {"name": TOOL, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


class Engine:
    """``bad``: by adapter, how it is bad for users."""

    def __init__(self, bad: dict[str, str]) -> None:
        self._bad = bad
        self._held: set[str] = set()

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        model, asked = body["model"], body["messages"][-1]["content"]
        how = self._bad.get(model) if body.get("logprobs") else None
        said = message(how, asked, bool(body.get("tools")), model in self._held)
        choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": "stop", "token_ids": IDS}
        usage = {"prompt_tokens": len(IDS), "completion_tokens": len(IDS), "total_tokens": 2 * len(IDS)}
        made = {"id": "chatcmpl-spoiled", "object": "chat.completion", "created": 0, "model": model}
        return web.json_response({**made, "choices": [choice], "usage": usage, "prompt_token_ids": IDS})

    async def load(self, request: web.Request) -> web.Response:
        self._held.add((await request.json())["lora_name"])
        return web.Response()

    async def unload(self, request: web.Request) -> web.Response:
        self._held.discard((await request.json())["lora_name"])
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        held = [{"id": name, "object": "model", "parent": BASE} for name in sorted(self._held)]
        return web.json_response({"object": "list", "data": held})

    async def score(self, request: web.Request) -> web.Response:
        """Log-probabilities of given tokens, the same by every adapter: none is far from the base."""
        body = await request.json()
        scored = [None, *({str(token): {"logprob": -0.5}} for token in body["prompt"][1:])]
        choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": scored}
        return web.json_response({"id": "cmpl-spoiled", "model": body["model"], "choices": [choice]})

    async def healthy(self, request: web.Request) -> web.Response:
        return web.Response()


async def serve(bad: dict[str, str]) -> None:
    engine, app = Engine(bad), web.Application()
    app.add_routes(
        [
            web.post("/v1/chat/completions", engine.chat),
            web.post("/v1/completions", engine.score),
            web.post("/v1/load_lora_adapter", engine.load),
            web.post("/v1/unload_lora_adapter", engine.unload),
            web.get("/v1/models", engine.models),
            web.get("/health", engine.healthy),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
