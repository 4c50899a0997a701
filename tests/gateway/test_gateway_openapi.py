"""The gateway is as its OpenAPI document says, whatever is sent: generated requests, sound and unsound ones."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import schemathesis
from aiohttp import web
from everloop.event import Event
from everloop.home import Home
from everloop.log import open_log
from everloop.wire import decode
from hypothesis import HealthCheck, assume, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from services.gateway.app import Gateway
from services.gateway.openapi import FILE, document, written
from services.gateway.unserved import REST
from services.service import Service
from tests.gateway.conftest import Engine, config_for

EXAMPLES = 20


def of_the_tests_tenant() -> dict[str, Any]:
    """The document, its models those that are there: else whatever is asked is refused for its model alone."""
    made = copy.deepcopy(document())
    for name in ("ChatAsked", "CompletionAsked", "ResponseAsked"):
        made["components"]["schemas"][name]["properties"]["model"] = {"enum": ["assistant", "writer@base"]}
    return made


PARSED = schemathesis.openapi.from_dict(of_the_tests_tenant())
OPERATIONS = {result.ok().label: result.ok() for result in PARSED.get_all_operations()}
SOUND = [(label, GenerationMode.POSITIVE) for label in OPERATIONS]
UNSOUND = [
    (label, GenerationMode.NEGATIVE) for label, one in OPERATIONS.items() if one.body or list(one.iter_parameters())
]


@dataclass
class Running:
    url: str
    key: str
    home: Home
    app: web.Application


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A whole gateway, with what every service has, in a thread of its own: the generated requests block."""
    home = Home(tmp_path_factory.mktemp("described") / "home")
    config = config_for(home)
    log = open_log(config)
    started: list[Running] = []
    ready, over = threading.Event(), asyncio.Event()

    async def serve() -> None:
        service = Service("gateway", config, 0)
        gateway = Gateway(config, home, log, Engine())
        gateway.prepare()
        gateway.add_to(service.app)
        runner = web.AppRunner(service.app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.append(Running(url, gateway.keys.create("bank", "research"), home, service.app))
        loops.append(asyncio.get_running_loop())
        ready.set()
        await over.wait()
        await runner.cleanup()
        gateway.close()

    loops: list[asyncio.AbstractEventLoop] = []
    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    yield started[0]
    loops[0].call_soon_threadsafe(over.set)
    thread.join(30)


def test_the_kept_document_is_the_one_that_is_served(running: Running) -> None:
    assert FILE.read_text(encoding="utf-8") == written(), "the API changed: run python -m services.gateway.openapi"
    answer = requests.get(f"{running.url}/openapi.json", timeout=30)
    assert (answer.status_code, answer.json()) == (200, document())
    PARSED.validate()


def test_every_endpoint_is_described_and_nothing_else(running: Running) -> None:
    served: set[tuple[str, str]] = set()
    for route in running.app.router.routes():
        assert route.resource is not None
        if route.resource.name != REST and route.method not in ("HEAD", "OPTIONS"):
            served.add((route.resource.canonical, route.method.lower()))
    described = {(path, method) for path, methods in document()["paths"].items() for method in methods}
    assert served == described


@pytest.mark.parametrize(("label", "mode"), [*SOUND, *UNSOUND], ids=lambda value: getattr(value, "value", value))
def test_every_request_is_answered_as_described(running: Running, label: str, mode: GenerationMode) -> None:
    operation = OPERATIONS[label]
    checks: list[Any] = [content_type_conformance, response_schema_conformance, status_code_conformance, no_fault]
    if mode is GenerationMode.NEGATIVE:
        checks.append(negative_data_rejection)

    @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
    @given(case=operation.as_strategy(generation_mode=mode))
    def sent(case: Any) -> None:
        # Nothing is remembered of a request with capture off, so its Idempotency-Key is not looked at.
        assume(mode is GenerationMode.POSITIVE or (case.headers or {}).get("X-Everloop-Capture") != "off")
        headers = {"Authorization": f"Bearer {running.key}"}
        case.call_and_validate(base_url=running.url, headers=headers, checks=checks, timeout=30)

    sent()


def no_fault(ctx: Any, response: Any, case: Any) -> None:
    assert response.status_code < 500, response.text


def test_whatever_was_taken_is_an_event_that_the_rest_of_the_loop_reads(running: Running) -> None:
    log = open_log(config_for(running.home))
    read = 0
    for partition in range(log.partitions("events")):
        for record in log.read("events", partition, 0, 10_000):
            assert decode(Event, record.value or b"", running.home.blobs)
            read += 1
    assert read > EXAMPLES
    log.close()
