"""What no client library sends, to a gateway in a process of its own: it answers 4xx or closes, whatever comes; it
never fails, hangs or grows, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests
from aiohttp import web
from everloop.home import Home

from services.gateway.keys import Keys
from tests.conftest import until
from tests.gateway.conftest import Process

pytestmark = pytest.mark.processes
WORD = "x" * 65_536
LONG = 40  # words of a long answer
GOOD = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


class Engine:
    """An HTTP engine in a thread: a short answer, a long one, or a stream without end, as the last message says."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.headers: set[str] = set()
        self.streams = 0
        self.url = ""
        self._ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        assert self._ready.wait(30)

    async def _serve(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await asyncio.Event().wait()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.paths.add(request.path)
        self.headers |= set(request.headers)
        if request.path != CHAT:
            return web.json_response({})
        body = await request.json()
        if body.get("stream"):
            return await self._flood(request)
        text = WORD * LONG if body["messages"][-1]["content"] == "long" else "hi"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return web.json_response({"object": "chat.completion", "created": 1, "choices": [choice]})

    async def _flood(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        choice = {"index": 0, "delta": {"content": WORD}, "finish_reason": None}
        frame = b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"
        self.streams += 1
        try:
            while True:
                await response.write(frame)
        finally:
            self.streams -= 1


class Target:
    """The gateway under attack."""

    def __init__(self, process: Process, key: str, engine: Engine) -> None:
        self.process = process
        self.url = process.url
        self.key = key
        self.engine = engine

    def connect(self, **options: int) -> socket.socket:
        made = socket.socket()
        made.settimeout(20)
        for name, value in options.items():
            made.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        made.connect(("127.0.0.1", self.process.port))
        return made

    def said(self, raw: bytes) -> bytes:
        """All that comes back until the gateway closes the connection, which it must do within 20 seconds."""
        with self.connect() as connection:
            connection.sendall(raw)
            return b"".join(iter(lambda: connection.recv(65_536), b""))

    def request(self, body: bytes, path: str = CHAT, method: str = "POST", *fields: str) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {self.key}", *fields]
        if not any(field.startswith(("Content-Length", "Transfer-Encoding")) for field in fields):
            lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body

    def post(self, body: Any, path: str = CHAT, **headers: str) -> requests.Response:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        auth = {"Authorization": f"Bearer {self.key}", **headers}
        return requests.post(self.url + path, data=raw, headers=auth, timeout=20)

    def works(self) -> float:
        """Others are answered; returns how many seconds that took."""
        began = time.monotonic()
        assert self.post(GOOD).status_code == 200
        return time.monotonic() - began

    @property
    def memory(self) -> int:
        """Its resident memory in kB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    home = Home(tmp_path_factory.mktemp("hostile") / "home")
    keys = Keys(home.root / "keys.db")
    engine = Engine()
    process = Process(home.root, engine.url)

    async def start() -> None:
        async with aiohttp.ClientSession() as http:
            await process.start(http)

    asyncio.run(start())
    made = Target(process, keys.create("default"), engine)
    made.works()
    yield made
    assert process.end() == 0, "what was sent broke nothing that an orderly end needs"
    assert "Traceback" not in (home.root / "gateway.log").read_text()


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    yield
    target.works()


def status(answer: bytes) -> int:
    """0: the connection was closed without a word."""
    return int(answer.split(b" ", 2)[1]) if answer else 0


BEHIND = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
BAD_HEADS = {
    "two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "two lengths in one": b"Content-Length: 5, 6\r\n\r\nabcdef",
    "a negative length": b"Content-Length: -1\r\n\r\n",
    "a length with a sign": b"Content-Length: +5\r\n\r\nabcde",
    "a length that is no number": b"Content-Length: five\r\n\r\nabcde",
    "a length beyond any": b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
    "length and chunks": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + BEHIND,
    "chunks that are not": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunks and then none": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "a folded field": b"X-Everloop-Episode: a\r\n b: c\r\nContent-Length: 0\r\n\r\n",
    "a space before the colon": b"Content-Length : 5\r\n\r\nabcde",
    "no colon": b"Content-Length 5\r\n\r\n",
    "a zero byte": b"X-Everloop-Episode: a\0b\r\n\r\n",
    "a bare carriage return": b"X-Everloop-Episode: a\rX-Evil: 1\r\n\r\n",
    "a name that is none": b"X-\xff\xfe: 1\r\n\r\n",
    "a field of 64 kB": b"X-Everloop-Episode: " + b"a" * 65_536 + b"\r\n\r\n",
    "a name of 64 kB": b"X" * 65_536 + b": a\r\n\r\n",
    "1000 fields": b"".join(b"X-%d: a\r\n" % at for at in range(1000)) + b"\r\n",
    "a chunk beyond any": b"Transfer-Encoding: chunked\r\n\r\n" + b"F" * 30 + b"\r\n",
    "a chunk of letters": b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "a chunk longer than it says": b"Transfer-Encoding: chunked\r\n\r\n1\r\nabcdef\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("rest", BAD_HEADS.values(), ids=BAD_HEADS)
def test_a_head_that_two_readers_could_read_two_ways_is_refused_and_ends_the_connection(
    target: Target, rest: bytes
) -> None:
    answer = target.said(
        b"POST %b HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n%b" % (CHAT.encode(), target.key.encode(), rest)
    )
    assert 400 <= status(answer) < 500
    assert len(re.findall(rb"^HTTP/1\.[01] \d{3} ", answer, re.MULTILINE)) == 1, "what lies behind it is no request"
    assert b"X-Evil" not in answer.partition(b"\r\n\r\n")[0]


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"A" * 200_000,
        b"GET /" + b"a" * 65_536 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["TLS", "HTTP/2", "HTTP/9.9", "HTTP/0.9", "zeros", "no end", "a long path", "no UTF-8"],
)
def test_what_is_not_http_is_refused_and_ends_the_connection(target: Target, raw: bytes) -> None:
    answer = target.said(raw)
    assert status(answer) == 0 or 400 <= status(answer) < 500
    assert len(answer) < len(raw) + 1000


@pytest.mark.parametrize(
    "path",
    [
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/chat/completions/../../load_lora_adapter",
        "/v1/%6coad_lora_adapter",
        "//v1/load_lora_adapter",
        "/v1/models/../load_lora_adapter",
        "/v1/models/%2e%2e/load_lora_adapter",
        "http://127.0.0.1/v1/load_lora_adapter",
        "/load_lora_adapter",
        "/v1/tokenize",
        "/tokenize",
        "/health",
        "/v1/models/%00",
        "/v1/models/%ff",
        "/v1/models/%ed%a0%80",
        "/v1/models/" + "%F0%9F%92%A5" * 300,
        "/v1/" + "a/" * 2000,
        "/v1/responses/" + "%0d%0aX-Evil:%201",
        "/%0d%0aX-Evil:%201",
        "/?" + "a=1&" * 1500,
        "*",
    ],
)
def test_no_path_reaches_what_the_gateway_does_not_serve(target: Target, path: str) -> None:
    for method in ("GET", "POST", "OPTIONS", "BREW"):
        answer = target.said(target.request(b"", path, method, "Connection: close"))
        assert 400 <= status(answer) < 500, (method, answer[:200])
        assert b"X-Evil" not in answer.partition(b"\r\n\r\n")[0]
    assert target.engine.paths <= {CHAT, "/health", "/v1/models"}  # the gateway looks at the engine by itself


def test_an_agents_headers_do_not_reach_the_engine_and_names_do_not_come_back(target: Target) -> None:
    names = {"X-Request-Id": "mine", "X-Everloop-Episode": "case 7", "X-Everloop-Subject": "anna", "Cookie": "a=b"}
    answer = target.post(GOOD, **names)
    assert answer.status_code == 200
    assert not {"Cookie", "Authorization", "X-Everloop-Episode"} & target.engine.headers
    assert not {"mine", "case 7", "anna"} & set(answer.headers.values())


BOMBS = {
    "nested lists": b'{"model": "assistant", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested tables": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "never closed": b'{"a":' * 500_000,
    "a huge number": b'{"model": "assistant", "temperature": ' + b"9" * 1_000_000 + b"}",
    "a huge exponent": b'{"model": "assistant", "temperature": 1e999999999}',
    "NaN": b'{"model": "assistant", "temperature": NaN}',
    "100,000 keys": json.dumps({f"k{at}": 0 for at in range(100_000)}).encode(),
    "100,000 messages": json.dumps({**GOOD, "messages": [{}] * 100_000}).encode(),
    "a lone surrogate": b'{"model": "assistant\\ud800"}',
    "a mark before it": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
    "a zero byte in it": b'{"model": "assistant"\0}',
    "a zero byte in a name": b'{"model": "assistant\\u0000"}',
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
}


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/feedback", "/v1/events"])
def test_json_that_is_meant_to_hurt_is_refused(target: Target, path: str) -> None:
    before = target.memory
    for name, bomb in BOMBS.items():
        answer = target.post(bomb, path)
        assert 400 <= answer.status_code < 500, name
        assert len(answer.content) < 2_000, name
        assert answer.json()["error"]["message"]
    assert target.memory - before < 60_000


def test_of_a_key_twice_the_last_word_counts_for_the_engine_and_the_record_alike(target: Target) -> None:
    twice = b'{"model": "nobody", "model": "assistant", "messages": [{"role": "user", "content": "hi"}]}'
    assert target.post(twice).status_code == 200


def test_a_body_that_swells_is_refused_in_little_memory(target: Target) -> None:
    before = target.memory
    bomb = gzip.compress(bytes(200_000_000))
    for _ in range(3):
        assert target.post(bomb, **{"Content-Encoding": "gzip"}).status_code == 413
    cut = target.post(bomb[:1000], **{"Content-Encoding": "gzip"})
    assert cut.status_code == 400
    assert target.post(b"not gzip at all", **{"Content-Encoding": "gzip"}).status_code == 400
    assert target.memory - before < 60_000


def test_a_body_without_end_is_refused_once_it_is_too_large(target: Target) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    before = target.memory
    with target.connect() as connection:
        connection.sendall(target.request(b"", CHAT, "POST", "Transfer-Encoding: chunked"))

        def refused() -> bool:
            connection.sendall(chunk)
            return bool(select.select([connection], [], [], 0)[0])

        until(refused, deadline=60, every=0)
        assert status(connection.recv(65_536)) == 413
    assert target.memory - before < 60_000


def test_clients_that_do_not_read_their_streams_cost_little_and_hold_up_nobody(target: Target) -> None:
    asked = json.dumps({**GOOD, "stream": True}).encode()
    before = target.memory
    with ExitStack() as stack:
        for _ in range(30):
            connection = stack.enter_context(target.connect(SO_RCVBUF=4096))
            connection.sendall(target.request(asked))
        until(lambda: target.engine.streams == 30)
        until(stands_still(lambda: target.memory), deadline=30, every=0.5)
        assert max(target.works() for _ in range(10)) < 10
        grown = target.memory - before
    assert grown < 30 * 12_000, f"{grown} kB for 30 streams that nobody reads: what the kernel holds, and a copy of it"
    until(lambda: target.engine.streams == 0)


def test_answers_that_nobody_reads_do_not_pile_up(target: Target) -> None:
    """Requests without pause on a connection that takes no answer: the next is not begun before the last is taken."""
    long = target.request(json.dumps({**GOOD, "messages": [{"role": "user", "content": "long"}]}).encode())
    before = target.memory
    with ExitStack() as stack:
        for _ in range(5):
            connection = stack.enter_context(target.connect(SO_RCVBUF=4096))
            connection.setblocking(False)
            for _ in range(200):
                try:
                    connection.send(long)
                except BlockingIOError:
                    break
        until(stands_still(lambda: target.memory), deadline=30, every=0.5)
        target.works()
        grown = target.memory - before
    assert grown < 150_000, f"{grown} kB: {LONG * 65} kB an answer, five connections"


def stands_still(value: Callable[[], int]) -> Callable[[], bool]:
    """True once a value of kB has changed by less than 2% from one look to the next."""
    seen = [0]

    def still() -> bool:
        last, seen[0] = seen[0], value()
        return abs(seen[0] - last) < 0.02 * seen[0]

    return still


def test_hundreds_of_silent_connections_keep_nobody_out(target: Target) -> None:
    before = target.memory
    with ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(target.connect())
        assert target.works() < 10
        assert target.memory - before < 50_000
    target.works()


def test_requests_sent_at_once_are_answered_in_their_order(target: Target) -> None:
    paths = [f"/v1/models/m{at}" for at in range(50)]
    raw = b"".join(target.request(b"", path, "GET") for path in paths)
    answer = target.said(raw + target.request(b"", "/v1/models", "GET", "Connection: close"))
    assert [answer.index(f"'m{at}'".encode()) for at in range(50)] == sorted(
        answer.index(f"'m{at}'".encode()) for at in range(50)
    )
    assert answer.count(b"HTTP/1.1 404") == 50
    assert answer.count(b"HTTP/1.1 200") == 1


def test_older_http_and_other_methods_are_answered_as_the_rules_are(target: Target) -> None:
    old = b"GET /v1/models HTTP/1.0\r\nAuthorization: Bearer %b\r\n\r\n" % target.key.encode()
    assert status(target.said(old)) == 200
    for method, path, expected in (
        ("HEAD", "/v1/models", 200),
        ("HEAD", CHAT, 405),
        ("OPTIONS", CHAT, 405),
        ("TRACE", CHAT, 405),
        ("PUT", CHAT, 405),
        ("DELETE", "/healthz", 405),
        ("OPTIONS", "/v1/feedback", 204),
        ("HEAD", "/nothing", 404),
    ):
        answer = target.said(target.request(b"", path, method, "Connection: close"))
        assert status(answer) == expected, (method, path)
        if method == "HEAD":
            assert answer.endswith(b"\r\n\r\n")
    body = json.dumps(GOOD).encode()
    waited = target.said(target.request(body, CHAT, "POST", "Expect: 100-continue", "Connection: close"))
    assert waited.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert status(target.said(target.request(body, CHAT, "POST", "Expect: the-best", "Connection: close"))) == 417


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-stainless-retry-count", "9" * 5000),
        ("x-stainless-retry-count", "-1"),
        ("X-Everloop-Seq", "9" * 5000),
        ("X-Everloop-Seq", "1e3"),
        ("X-Everloop-Capture", "maybe\xff"),
        ("X-Everloop-Episode", "ep_" + "a" * 240),
        ("X-Everloop-Episode", "\xff\xfe"),
        ("X-Everloop-Subject", "a" * 8000),
        ("X-Everloop-Subject", "caf\xe9"),
        ("Idempotency-Key", "\x7f"),
        ("Idempotency-Key", " \t "),
        ("Authorization", "Bearer " + "\xff" * 4000),
        ("Authorization", "Bearer ft_" + "!" * 4000),
        ("Content-Type", "\xff"),
        ("Content-Encoding", "rot13"),
    ],
)
def test_header_values_of_any_kind_are_taken_or_refused(target: Target, name: str, value: str) -> None:
    body = json.dumps(GOOD).encode()
    answer = target.said(target.request(body, CHAT, "POST", f"{name}: {value}", "Connection: close"))
    assert status(answer) == 200 or 400 <= status(answer) < 500, answer[:300]
