"""An engine that does nothing but answer: the same 256 tokens to everybody, at once, whole or as a stream.

What ``benchmarks.gateway`` measures beside and behind the gateway. As of a real engine, ids and log-probabilities of
the tokens come to those who ask for them (the gateway does, a plain client or another proxy does not). One process,
raw asyncio, bytes made beforehand: so little of its own that what is measured is the gateway.
Run: ``python -m benchmarks._upstream [port]``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable
from typing import cast

import uvloop

TOKENS = 256
PROMPT = list(range(1, 33))
IDS = [1000 + at * 7 % 911 for at in range(TOKENS)]
WORDS = [f" w{at % 10}" for at in range(TOKENS)]
LOGPROBS = [-0.01 - (at % 97) / 37 for at in range(TOKENS)]
USAGE = {"prompt_tokens": len(PROMPT), "completion_tokens": TOKENS, "total_tokens": len(PROMPT) + TOKENS}
PER_CHUNK = 16


def _logprobs(start: int, end: int) -> dict[str, object]:
    tokens = zip(WORDS[start:end], LOGPROBS[start:end], strict=True)
    return {
        "content": [
            {"token": word, "logprob": logprob, "bytes": list(word.encode()), "top_logprobs": []}
            for word, logprob in tokens
        ]
    }


def whole() -> dict[str, object]:
    """The answer in vLLM's dialect."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(WORDS), "tool_calls": []},
        "logprobs": _logprobs(0, TOKENS),
        "finish_reason": "stop",
        "token_ids": IDS,
    }
    return {
        "id": "chatcmpl-stub",
        "object": "chat.completion",
        "created": 1_760_000_000,
        "model": "stub",
        "choices": [choice],
        "usage": USAGE,
        "prompt_token_ids": PROMPT,
    }


def chunks() -> list[dict[str, object]]:
    """The same answer as a stream."""
    made = []
    for start in range(0, TOKENS, PER_CHUNK):
        end = start + PER_CHUNK
        delta = {"content": "".join(WORDS[start:end])} | ({"role": "assistant"} if start == 0 else {})
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": _logprobs(start, end),
            "finish_reason": "stop" if end >= TOKENS else None,
            "token_ids": IDS[start:end],
        }
        prompt = {"prompt_token_ids": PROMPT} if start == 0 else {}
        made.append(_head("chat.completion.chunk") | {"choices": [choice]} | prompt)
    made.append(_head("chat.completion.chunk") | {"choices": [], "usage": USAGE})
    return made


def _head(kind: str) -> dict[str, object]:
    return {"id": "chatcmpl-stub", "object": kind, "created": 1_760_000_000, "model": "stub"}


def _http(body: bytes, kind: str = "application/json") -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _packed(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def _events(made: Iterable[dict[str, object]]) -> bytes:
    """Server-sent events, each in a chunk of its own as servers send them, but all at once."""
    events = [b"data: %b\n\n" % one for one in (*map(_packed, made), b"[DONE]")]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join([b"%x\r\n%b\r\n" % (len(event), event) for event in events]) + b"0\r\n\r\n"


def _plain(answer: dict[str, object]) -> dict[str, object]:
    """The answer, or a chunk of it, without what is said of each token."""
    choices = cast(list[dict[str, object]], answer["choices"])
    bare = [{name: value for name, value in its.items() if name not in ("logprobs", "token_ids")} for its in choices]
    return {name: value for name, value in answer.items() if name != "prompt_token_ids"} | {"choices": bare}


WHOLE = _http(_packed(whole()))
PLAIN = _http(_packed(_plain(whole())))
STREAM = _events(chunks())
PLAIN_STREAM = _events(map(_plain, chunks()))
MODELS = _http(json.dumps({"object": "list", "data": [{"id": "stub", "object": "model"}]}).encode())


class Answering(asyncio.Protocol):
    """One connection: requests one after the other, told apart by Content-Length."""

    def __init__(self) -> None:
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._rest += data
        while (end := self._rest.find(b"\r\n\r\n")) >= 0:
            head = self._rest[:end]
            size = _length(head)
            if len(self._rest) < end + 4 + size:
                return
            body, self._rest = self._rest[end + 4 : end + 4 + size], self._rest[end + 4 + size :]
            self._transport.write(_answer(head, body))


def _length(head: bytes) -> int:
    _, found, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0]) if found else 0


def _answer(head: bytes, body: bytes) -> bytes:
    if head.startswith(b"POST"):
        told = b'"return_token_ids":true' in body
        if b'"stream":true' in body:
            return STREAM if told else PLAIN_STREAM
        return WHOLE if told else PLAIN
    return MODELS if b"/v1/models" in head else _http(b"")


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
