"""The engine as a process: over HTTP with the official client, refusals with their status, an orderly end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

pytestmark = [pytest.mark.models, pytest.mark.processes]
ENDLESS = {"role": "user", "content": "where is it"}  # greedy, the untrained model answers it with one word for ever


def start(home: Path, base: str, config_path: Path) -> subprocess.Popen[str]:
    config_path.parent.mkdir(parents=True, exist_ok=True)
    config_path.write_text(f'cache = "{home}/cache"\n[tenants.default.policies.assistant]\nbase = "{base}"\n')
    settings = {"EVERLOOP_HOME": str(home), "EVERLOOP_SERVING__PORT": "0", "EVERLOOP_SERVING__THREADS": "1"}
    environment = {**os.environ, **settings, "EVERLOOP_CONFIG": str(config_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "services.engine"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def engine(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    home = tmp_path_factory.mktemp("engine")
    process = start(home, str(untrained), home / "everloop.toml")
    yield process, home
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def url(engine: tuple[subprocess.Popen[str], Path]) -> str:
    from tests.conftest import until

    process, home = engine

    def ready() -> str | None:
        assert process.poll() is None
        path = home / "run" / "engine.json"
        return json.loads(path.read_text())["url"] if path.exists() else None

    return str(until(ready, deadline=120))


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


def post(url: str, body: bytes | dict[str, object]) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=30) as answer:
            return answer.status, {"text": answer.read().decode()}
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]


def metric(url: str, name: str) -> float:
    line = next(line for line in get(f"{url}/metrics").splitlines() if line.startswith(f"everloop_engine_{name} "))
    return float(line.split()[1])


def test_the_official_client_chats_and_streams(url: str, untrained: Path) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    messages = [{"role": "user", "content": "where is my card"}]
    asked = {"model": str(untrained), "messages": messages, "seed": 4, "max_tokens": 20}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    assert [model.id for model in client.models.list()] == [str(untrained)]


def test_ids_come_with_raw_log_probabilities_beside_those_of_the_temperature(url: str, untrained: Path) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    asked = {"model": str(untrained), "messages": [{"role": "user", "content": "where is my card"}], "seed": 4}
    asked |= {"max_tokens": 12, "logprobs": True, "extra_body": {"return_token_ids": True}}
    for temperature, same in ((1.0, True), (0.3, False)):
        (whole,) = client.chat.completions.create(**asked, temperature=temperature).choices
        stream = list(client.chat.completions.create(**asked, temperature=temperature, stream=True))
        raw = [p for chunk in stream for choice in chunk.choices for p in choice.raw_logprobs]  # type: ignore[attr-defined]
        processed = [token.logprob for token in whole.logprobs.content]
        assert raw == pytest.approx(whole.raw_logprobs, abs=1e-5)  # type: ignore[attr-defined]
        assert len(raw) == len(whole.token_ids) == len(processed)  # type: ignore[attr-defined]
        assert (processed == pytest.approx(raw, abs=1e-5)) is same


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("chat/completions", b"{", 400, "invalid_json"),
        ("chat/completions", b"[]", 400, "invalid_json"),
        ("chat/completions", {"messages": []}, 400, "invalid_value"),
        ("chat/completions", {"model": "nobody", "messages": [], "stream": True}, 404, "adapter_not_found"),
        ("load_lora_adapter", {"lora_name": "../x", "lora_path": "x"}, 400, "invalid_value"),
        ("load_lora_adapter", {"lora_name": "0" * 32, "lora_path": "/etc"}, 403, "forbidden_path"),
        ("load_lora_adapter", {"lora_name": "0" * 32, "lora_path": "{home}/adapters/../run"}, 403, "forbidden_path"),
        ("load_lora_adapter", {"lora_name": "0" * 32, "lora_path": "{home}/adapters/none"}, 400, "adapter_refused"),
        ("unload_lora_adapter", {"lora_name": "0" * 32}, 404, "adapter_not_found"),
    ],
)
def test_bad_input_gets_its_status(
    url: str, engine: tuple[subprocess.Popen[str], Path], path: str, body: bytes | dict, status: int, code: str
) -> None:
    if isinstance(body, dict) and "lora_path" in body:
        body = {**body, "lora_path": body["lora_path"].format(home=engine[1])}
    got, error = post(f"{url}/v1/{path}", body)
    assert (got, error["code"]) == (status, code)
    assert error["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_stop_their_generations(
    url: str, untrained: Path, until: Callable[..., object], stream: bool
) -> None:
    cancelled = metric(url, "cancelled_total")
    host, port = url.removeprefix("http://").split(":")
    asked = {"model": str(untrained), "messages": [ENDLESS], "n": 16, "stream": stream}
    body = json.dumps({**asked, "temperature": 0, "max_tokens": 240}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with contextlib.ExitStack() as connections:
        for _ in range(4):  # together some seconds of work
            connections.enter_context(socket.create_connection((host, int(port)))).sendall(head + body)
        until(lambda: metric(url, "running_answers") == 64)
    until(lambda: metric(url, "running_answers") == 0)
    assert metric(url, "cancelled_total") == cancelled + 4


def test_it_says_how_it_is(url: str, untrained: Path) -> None:
    status = json.loads(get(f"{url}/status"))["engine"]
    assert status["bases"][str(untrained)].startswith("untrained@")
    assert json.loads(get(f"{url}/readyz"))["ok"]
    assert get(f"{url}/health") == ""
    assert metric(url, "sampled_tokens_total") > 0
    assert metric(url, "resident_adapters") == 0


def test_it_ends_in_order(engine: tuple[subprocess.Popen[str], Path], url: str) -> None:
    process, home = engine
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not (home / "run" / "engine.json").exists()


def test_a_base_that_cannot_be_had_is_said_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "nobody/nothing", tmp_path / "everloop.toml")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "nobody/nothing" in said
    assert "Traceback" not in said
