"""A collector, an agent's own tracing, and the store of what a gateway took.

No registry has a collector to run, so the receiver is small and our own: it reads OTLP by OpenTelemetry's messages.
"""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from everloop.log.base import Log, Record
from everloop.topics import EPISODES, EVENTS, TRAJECTORIES
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from pipelines.archive import Archive
from pipelines.assemble import Assembler
from pipelines.store import Store


class Server:
    """An HTTP server in a thread of its own, so that nobody's event loop keeps it from answering."""

    def __init__(self, answer: Any) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, sent = answer(self.path, self.headers, body)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *words: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Collector(Server):
    """What it was sent, in order; ``go`` cleared holds every request, ``status`` is what it answers."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.go = threading.Event()
        self.go.set()
        self.status = 200
        super().__init__(self._take)

    def _take(self, path: str, headers: Message, body: bytes) -> tuple[int, bytes]:
        self.go.wait(60)
        assert (path, headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")
        raw = gzip.decompress(body) if headers.get("Content-Encoding") == "gzip" else body
        if self.status == 200:
            self.bodies.append(raw)
            for group in ExportTraceServiceRequest.FromString(raw).resource_spans:
                self.resources.append(attributes(group.resource))
                self.spans += [span for scope in group.scope_spans for span in scope.spans]
        return self.status, b""

    def named(self, beginning: str) -> list[Span]:
        return [span for span in self.spans if span.name.startswith(beginning)]


def attributes(thing: Any) -> dict[str, Any]:
    return {pair.key: plain(pair.value) for pair in thing.attributes}


def plain(value: AnyValue) -> Any:
    if value.HasField("array_value"):
        return [plain(item) for item in value.array_value.values]
    return getattr(value, value.WhichOneof("value"))


@pytest.fixture
def server() -> Iterator[Any]:
    """Starts a server: a function of path, headers and body to status and body."""
    made: list[Server] = []

    def start(answer: Any) -> Server:
        made.append(Server(answer))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.go.set()
    made.close()


@pytest.fixture
def attributes_of() -> Any:
    return attributes


class Kept:
    """A handler's state, in a dict."""

    def __init__(self) -> None:
        self._entries: dict[str, bytes] = {}
        self.get, self.put = self._entries.get, self._entries.__setitem__

    def delete(self, key: str) -> None:
        self._entries.pop(key, None)

    def scan(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        return iter(sorted(item for item in self._entries.items() if item[0].startswith(prefix)))


def _records(log: Log, topic: str) -> list[Record]:
    return [record for at in range(log.partitions(topic)) for record in log.read(topic, at, 0, 100_000)]


def _store(bench: Any) -> Store:
    """The store, once the assembler and the archive have taken all that lies in a gateway's log."""
    state, assembler, archive = Kept(), Assembler(bench.config, bench.home), Archive(bench.home)
    for record in _records(bench.log, EVENTS.name):
        assembler.handle(state, record, 1.0)
    bench.log.append(assembler.flush(state, 1.0))
    for topic in (EVENTS, EPISODES, TRAJECTORIES):
        for record in _records(bench.log, topic.name):
            archive.handle(state, record, 1.0)
    archive.flush(state, 1.0)
    return Store(bench.home.root / "store", blobs=bench.home.blobs)


@pytest.fixture
def store_of() -> Any:
    return _store
