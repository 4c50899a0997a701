"""What every service has: health, metrics, status, its announcement, and how it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request
from everloop.config import Config
from everloop.home import Home

import services.service
from services.service import Service, from_this_machine, listen, runner_of

Until = Callable[..., Any]
PROGRAM = """
import sys, threading, time
from aiohttp import web
from everloop.config import load
from services.service import Service

service = Service("sample", load(), int(sys.argv[2]))
mode = sys.argv[1]

def work():
    if mode == "crash": raise RuntimeError("the loop broke")
    if mode == "return": return
    service.stop.wait()
    if mode == "hang": threading.Event().wait()

async def slow(request):
    print("slow", flush=True)
    while not service.stop.is_set(): await web.asyncio.sleep(0.01)
    return web.Response(text="finished")

service.loop("work", work)
service.app.router.add_get("/slow", slow)
code = service.run()
print("code", code, flush=True)
sys.exit(code)
"""


@pytest.fixture
async def client(home: Home) -> Any:
    service = Service("sample", Config(home=home.root), 0)
    async with TestClient(TestServer(service.app)) as client:
        yield client, service


async def test_health_is_good_until_a_check_says_otherwise(client: Any) -> None:
    http, service = client
    assert (await http.get("/healthz")).status == 200
    service.check("handler", lambda: "it has not moved for 400 s")
    answer = await http.get("/healthz")
    assert answer.status == 503
    assert (await answer.json())["trouble"] == {"handler": "it has not moved for 400 s"}
    assert (await http.get("/readyz")).status == 503


async def test_readiness_is_its_own_matter_and_ends_with_the_stop(client: Any) -> None:
    http, service = client
    trouble: list[str] = ["no engine yet"]
    service.ready("engine", lambda: trouble[0] if trouble else None)
    assert (await http.get("/healthz")).status == 200
    assert (await http.get("/readyz")).status == 503
    trouble.clear()
    assert (await http.get("/readyz")).status == 200
    service.stop.set()
    assert (await http.get("/readyz")).status == 503


async def test_a_check_that_fails_is_trouble_and_not_an_error(client: Any) -> None:
    http, service = client
    service.check("disk", lambda: 1 / 0 and None)
    answer = await http.get("/healthz")
    assert answer.status == 503
    assert "ZeroDivisionError" in (await answer.json())["trouble"]["disk"]


async def test_status_shows_every_part_even_where_one_fails(client: Any) -> None:
    http, service = client
    service.describe("lag", lambda: {"records": 3})
    service.describe("broken", lambda: 1 / 0)
    status = await (await http.get("/status")).json()
    assert (status["service"], status["home"]) == ("sample", str(service.home.root))
    assert status["lag"] == {"records": 3}
    assert "ZeroDivisionError" in status["broken"]["error"]


async def test_another_method_is_told_which_there_is(client: Any) -> None:
    http, _ = client
    answer = await http.post("/status")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET,HEAD")


@pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-For", "X-Real-IP", "Via"])
async def test_status_is_for_this_machine_alone(client: Any, name: str) -> None:
    http, _ = client
    answer = await http.get("/status", headers={name: "203.0.113.9"})  # a proxy here that asks for somebody elsewhere
    assert (answer.status, (await answer.json())["error"]["code"]) == (403, "not_this_machine")
    assert (await http.get("/healthz", headers={name: "203.0.113.9"})).status == 200


@pytest.mark.parametrize(
    ("peer", "own", "here"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("::1", "::1", True),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", True),
        ("10.0.0.5", "10.0.0.5", True),
        ("10.0.0.6", "10.0.0.5", False),
        ("fe80::2", "fe80::1", False),
    ],
)
def test_who_asks_is_told_by_the_connection(peer: str, own: str, here: bool) -> None:
    names = {"peername": (peer, 5), "sockname": (own, 80)}
    transport = mock.Mock(get_extra_info=names.get)
    assert from_this_machine(make_mocked_request("GET", "/status", transport=transport)) is here


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """Of an application whose connections have half a second, and whose answer is 16 MB."""
    monkeypatch.setattr(services.service, "IDLE", 0.5)
    monkeypatch.setattr(services.service, "UNREAD", 0.5)

    async def large(request: web.Request) -> web.Response:
        return web.Response(body=bytes(2**24))

    app = web.Application()
    app.router.add_get("/", large)
    runner = await runner_of(app, 0.1)
    await listen(runner, "127.0.0.1", 0)
    yield runner.addresses[0][1]
    await runner.cleanup()


async def test_a_connection_without_a_whole_head_is_closed(port: int) -> None:
    """One that is silent, one that sends its head byte by byte, one that is silent after an answer."""
    silent, _ = await asyncio.open_connection("127.0.0.1", port)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    again, other = await asyncio.open_connection("127.0.0.1", port)
    other.write(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
    trickled = b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100
    ended = asyncio.ensure_future(reader.read())
    async with asyncio.timeout(20):
        for byte in trickled:
            writer.write(bytes([byte]))
            if (await asyncio.wait([ended], timeout=0.05))[0]:
                break
        assert ended.done(), "a head that took many times the limit was read to its end"
        assert await silent.read() == b""
        assert (await again.read()).startswith(b"HTTP/1.1 404")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel does it, and this one cannot")
async def test_a_connection_whose_client_takes_nothing_is_closed(port: int) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        await loop.sock_connect(connection, ("127.0.0.1", port))
        await loop.sock_sendall(connection, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        ends = (f":{port:04X}", f":{connection.getsockname()[1]:04X}")

        def held() -> bool:
            """Whether the server's side of it is open, by the kernel's table."""
            rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            return any(row[1].endswith(ends[0]) and row[2].endswith(ends[1]) and row[3] == "01" for row in rows)

        async with asyncio.timeout(20):
            while not held():
                await asyncio.sleep(0.01)
            while held():
                await asyncio.sleep(0.05)


async def test_metrics_are_in_prometheus_form(client: Any) -> None:
    http, _ = client
    answer = await http.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert "python_info" in await answer.text()


Process = subprocess.Popen[str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def run(mode: str = "", port: int = 0, **environment: str) -> Process:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, mode, str(port)],
            env={"EVERLOOP_HOME": str(tmp_path / "home"), "PATH": "", "PYTHONPATH": ":".join(sys.path), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def announced(home: Home) -> dict[str, Any]:
    file = home.root / "run" / "sample.json"
    return json.loads(file.read_text()) if file.exists() else {}


@pytest.mark.processes
def test_a_service_announces_itself_finishes_requests_and_withdraws(
    start: Callable[..., Process], home: Home, until: Until
) -> None:
    process = start()
    url = until(lambda: announced(home).get("url"), deadline=20)
    assert announced(home)["pid"] == process.pid
    assert json.load(urllib.request.urlopen(f"{url}/healthz", timeout=30))["ok"] is True
    request = subprocess.Popen(
        [sys.executable, "-c", f"import urllib.request as u; print(u.urlopen('{url}/slow').read().decode())"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "slow\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert "code 0" in out
    assert process.returncode == 0
    assert request.communicate(timeout=30)[0] == "finished\n"
    assert announced(home) == {}
    lines = [json.loads(line) for line in err.splitlines()]
    assert {line["service"] for line in lines} == {"sample"}
    assert lines[0]["message"] == f"serving on {url}"


@pytest.mark.processes
@pytest.mark.parametrize(("mode", "why"), [("crash", "the loop broke"), ("return", "nobody asked")])
def test_a_loop_that_ends_takes_the_process_with_it(
    start: Callable[..., Process], home: Home, mode: str, why: str
) -> None:
    process = start(mode)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    failures = [line for line in map(json.loads, err.splitlines()) if line["level"] == "error"]
    assert why in failures[0]["error"]
    assert "loop work failed" in failures[0]["message"]
    assert announced(home) == {}


@pytest.mark.processes
def test_a_loop_that_hangs_cannot_hold_the_stop_up(start: Callable[..., Process], home: Home, until: Until) -> None:
    process = start("hang", EVERLOOP_SERVICES__DRAIN="0.3")
    until(lambda: announced(home), deadline=20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "not finished in time: work" in err


@pytest.mark.processes
def test_a_port_that_is_taken_is_said_and_leaves_the_other_announced(
    start: Callable[..., Process], home: Home, until: Until
) -> None:
    first = start()
    url = until(lambda: announced(home).get("url"), deadline=20)
    second = start(port=int(url.rpartition(":")[2]))
    _, err = second.communicate(timeout=20)
    assert second.returncode == 1
    assert "cannot listen" in err
    assert announced(home)["pid"] == first.pid
