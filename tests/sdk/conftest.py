"""A gateway's side of the HTTP contract on a free port: it keeps what it gets, and answers as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import everloop
import pytest
from everloop.ids import Ids

IDS = Ids(b"0123456789abcdef")


class Got(NamedTuple):
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class Reply(NamedTuple):
    status: int
    body: dict[str, Any]
    headers: dict[str, str] = {}


class Listener:
    """``reply(got)`` may be replaced; it returns None for what a healthy gateway answers."""

    def __init__(self) -> None:
        self.got: list[Got] = []
        self.reply: Callable[[Got], Reply | None] = lambda got: None
        self.delay = 0.0
        listener = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                got = Got(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                listener.got.append(got)
                time.sleep(listener.delay)
                self.respond(listener.reply(got) or healthy(got))

            def respond(self, reply: Reply) -> None:
                data = json.dumps(reply.body).encode()
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def refusal(self, status: int, **headers: str) -> Reply:
        return Reply(
            status, {"error": {"message": "no", "code": "why"}}, {k.replace("_", "-"): headers[k] for k in headers}
        )

    def items(self, route: str) -> list[dict[str, Any]]:
        return [item for got in self.got if got.path == f"/v1/{route}" for item in got.body[route]]

    def payloads(self, kind: str) -> list[dict[str, Any]]:
        return [event["payload"] for event in self.items("events") if event["payload"]["kind"] == kind]

    def calls(self) -> list[Got]:
        return [got for got in self.got if got.path == "/v1/chat/completions"]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def healthy(got: Got) -> Reply:
    if got.path == "/v1/chat/completions":
        return answered(got)
    if got.path == "/v1/feedback/tokens":
        return Reply(200, {"token": "ft_x", "expires": 1})
    items = got.body.get("events", got.body.get("feedback", []))
    return Reply(202, {"accepted": len(items), "ids": [item["id"] for item in items]})


def answered(got: Got) -> Reply:
    episode = IDS.episode_named("default", got.headers.get("x-everloop-episode", "none"))
    response = IDS.response("default", episode, len(got.headers).to_bytes(8, "big"))
    message = {"role": "assistant", "content": "card_arrival"}
    body = {
        "id": response,
        "object": "chat.completion",
        "created": 1,
        "model": "desk",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    return Reply(200, body, {"X-Everloop-Call": Ids.call_of(response), "Content-Type": "application/json"})


@pytest.fixture
def gateway() -> Iterator[Listener]:
    """A listening gateway, and the SDK set up to send there."""
    listener = Listener()
    everloop.configure(listener.url + "/v1", "ek_test", linger=0.001, exit_timeout=1.0)
    yield listener
    everloop.configure(None, None, exit_timeout=0.0)
    listener.close()
