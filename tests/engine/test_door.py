"""The door before our own vLLM: what is too much is refused, and adapters go in only if they can be served whole."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
from everloop.config import Config

from services.engine.door import LOAD, Door
from tests.conftest import random_adapter
from trainer.policy.base import Policy

pytestmark = pytest.mark.models


class Inside:
    """An application that waits to answer until it may, and says what it got."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.open = asyncio.Event()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await self.open.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})


async def asked(door: Door, path: str, body: object = None) -> tuple[int, dict[bytes, bytes], bytes]:
    """(status, headers, body)"""
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await door({"type": "http", "path": path, "headers": [(b"content-length", b"1")]}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), sent[-1].get("body", b"")


def door_of(home: Path, inside: Inside, **serving: Any) -> Door:
    return Door(inside, Config.model_validate({"home": home, "serving": {"url": "vllm", **serving}}))


async def test_more_than_runs_and_waits_is_refused_until_there_is_room(tmp_path: Path) -> None:
    inside = Inside()
    door = door_of(tmp_path, inside, max_batch=2, queue=1)
    three = [asyncio.create_task(asked(door, "/v1/chat/completions")) for _ in range(3)]
    while len(inside.bodies) < 3:
        await asyncio.sleep(0)
    status, headers, said = await asked(door, "/v1/completions")
    assert (status, headers[b"retry-after"]) == (429, b"1")
    assert b"serving.queue" in said
    inside.open.set()
    assert [status for status, *_ in await asyncio.gather(*three)] == [200] * 3
    assert (await asked(door, "/v1/completions"))[0] == 200


@pytest.fixture
def loadable(policy: Policy, tmp_path: Path) -> Path:
    return random_adapter(policy, tmp_path / "adapters", ("attention",), seed=4)


async def test_an_adapter_of_the_home_goes_in_under_its_hash(tmp_path: Path, loadable: Path) -> None:
    inside = Inside()
    inside.open.set()
    order = {"lora_name": loadable.name, "lora_path": str(loadable)}
    assert (await asked(door_of(tmp_path, inside, targets=["attention"]), LOAD, order))[0] == 200
    assert json.loads(inside.bodies[0]) == order


async def test_an_adapter_on_experts_goes_in_where_they_are_served_in_vllms_layout(
    policy: Policy, tmp_path: Path
) -> None:
    inside = Inside()
    inside.open.set()
    folder = random_adapter(policy, tmp_path / "adapters", ("attention", "experts"), seed=4)
    order = {"lora_name": folder.name, "lora_path": str(folder)}
    status, _, said = await asked(door_of(tmp_path, inside, targets=["attention"]), LOAD, order)
    assert status == 400
    assert b"experts" in said
    assert not inside.bodies
    assert (await asked(door_of(tmp_path, inside), LOAD, order))[0] == 200
    given = Path(json.loads(inside.bodies[0])["lora_path"])
    assert given == tmp_path / "vllm-adapters" / folder.name
    assert json.loads((given / "adapter_config.json").read_text())["target_parameters"] is None


@pytest.mark.parametrize("wrong", ["outside", "another name", "no hash", "an extra file", "no order"])
async def test_anything_else_stays_out(tmp_path: Path, loadable: Path, wrong: str) -> None:
    inside = Inside()
    order: Any = {"lora_name": loadable.name, "lora_path": str(loadable)}
    if wrong == "outside":
        order["lora_path"] = str(shutil.copytree(loadable, tmp_path / "elsewhere" / loadable.name))
    elif wrong == "another name":
        order["lora_name"] = "f" * 32
    elif wrong == "no hash":
        order["lora_name"] = "../live"
    elif wrong == "an extra file":
        (loadable / "pytorch_model.bin").touch()
    else:
        order = ["load", "it"]
    status, _, said = await asked(door_of(tmp_path, inside), LOAD, order)
    assert status == 400
    assert json.loads(said)["error"]["code"] == "adapter_refused"
    assert not inside.bodies
