"""One hot tenant is slowed down at the door; the others are not."""

from __future__ import annotations

import asyncio
from typing import Any

from everloop.config import Config

from services.gateway.limits import BURST_SECONDS, Limits
from services.gateway.refusals import Refused
from tests.gateway.conftest import TENANTS

RATE = 5.0


def tenants() -> dict[str, Any]:
    return {**TENANTS, "bank": {**TENANTS["bank"], "per_second": RATE}}


def taken(limits: Limits, tenant: str, tries: int) -> int:
    count = 0
    for _ in range(tries):
        try:
            limits.take(tenant)
        except Refused:
            continue
        count += 1
    return count


def test_a_tenant_has_its_rate_and_a_burst_and_others_have_no_limit() -> None:
    now = [0.0]
    limits = Limits(Config.model_validate({"tenants": tenants()}), clock=lambda: now[0])
    burst = int(RATE * BURST_SECONDS)
    assert taken(limits, "bank", 100) == burst
    now[0] += 1.0
    assert taken(limits, "bank", 100) == RATE
    now[0] += 3600.0
    assert taken(limits, "bank", 100) == burst, "what was not used does not add up for ever"
    now[0] += 3600.0
    limits.take("bank")
    limits.charge("bank", 999)  # a thousand events in one request
    now[0] += 100.0
    assert taken(limits, "bank", 1) == 0
    now[0] += 100.0
    assert taken(limits, "bank", 1) == 1
    assert taken(limits, "airline", 10_000) == 10_000


async def test_a_flood_of_one_tenant_is_answered_429_and_the_others_go_on(start: Any) -> None:
    bench = await start(tenants=tenants())
    other = bench.new_key("airline")
    flood = [bench.chat(f"question {number}") for number in range(60)]
    beside = [bench.chat(f"question {number}", key=other) for number in range(20)]
    answers = await asyncio.gather(*flood, *beside)
    hot, others = answers[: len(flood)], answers[len(flood) :]
    assert {status for status, _, _ in others} == {200}
    refused = [(said, headers) for status, said, headers in hot if status == 429]
    assert 60 - len(refused) < 60 / 2
    for said, headers in refused:
        assert said["error"]["code"] == "rate_limited"
        assert int(headers["Retry-After"]) >= 1
    stored = [event.tenant for event in bench.events()]
    assert stored.count("airline") == 20
    assert stored.count("bank") == 60 - len(refused)
