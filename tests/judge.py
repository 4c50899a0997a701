"""A judge over HTTP. What goes wrong with one (away, slow, refusing, talking nonsense, swayed by order) cannot be made
with a real model, so a small server answers as a judge in that state would."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def grade(asked: dict[str, Any]) -> str:
    """A judge that likes one answer, and of two the liked one."""
    if "answer" in asked:
        return json.dumps({"grade": 5 if asked["answer"] == "card" else 1})
    return json.dumps({"better": "first" if asked["first"] == "card" else "second"})


class Judge:
    """``say`` makes the content of a reply from what was asked; ``answer`` that of another answer, which critics ask
    for. ``asked`` holds the requests, ``headers`` theirs."""

    def __init__(self) -> None:
        self.say: Callable[[dict[str, Any]], Any] = grade
        self.answer: Callable[[dict[str, Any]], Any] = lambda body: "loan"
        self.status: Callable[[dict[str, Any]], int] = lambda body: 200
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        judge = self

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.asked.append(body)
                judge.headers.append(dict(self.headers))
                again = body["temperature"] == 1
                message = judge.answer(body) if again else judge.say(json.loads(body["messages"][1]["content"]))
                message = message if isinstance(message, dict) else {"content": message}
                reply = {"choices": [{"message": message}], "usage": {"total_tokens": 7}}
                raw = json.dumps(reply).encode()
                self.send_response(judge.status(body))
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # whoever asked was killed, or tired
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def declared(self, **more: Any) -> str:
        return _table("[[judge]]", {"name": "j", "url": self.url, "model": "m", **more})

    def as_critic(self, **more: Any) -> str:
        return _table("[critic]", {"url": self.url, **more})


def _table(name: str, fields: dict[str, Any]) -> str:
    fields = {"share": 1.0, "rubric": "It names the topic.", **fields}
    return f"{name}\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items())
