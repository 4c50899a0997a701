"""Two tenants with two policies each through the whole loop: what one of them leaves never reaches another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.processes, pytest.mark.models, pytest.mark.mlflow, pytest.mark.ray]
PAIRS = [("north", "alpha"), ("north", "beta"), ("south", "alpha"), ("south", "beta")]
COUNTS = {pair: 12 + 4 * at for at, pair in enumerate(PAIRS)}
POLICY = """
[tenants.{tenant}.policies.{policy}]
base = "{base}"
max_tokens = 6
temperature = 1.0
[tenants.{tenant}.policies.{policy}.train]
recipe = "{root}/short.toml"
min_scored = 4000
"""
RECIPE = """
[reward]
source = "feedback"
[optimizer]
epochs = 1
"""


def talk(client: openai.OpenAI, policy: str, number: int) -> tuple[str, str]:
    """(response id, policy version) of one rated call by customer ``number``."""
    raw = client.chat.completions.with_raw_response.create(
        model=policy, messages=[{"role": "user", "content": f"question {number}"}], user=f"customer-{number}"
    )
    response = raw.parse().id
    word = {"response_id": response, "kind": "thumb", "value": 1 if number % 2 else -1}
    client.post("/feedback", body=word, cast_to=object)
    return response, raw.headers["X-Everloop-Policy-Version"]


def test_nothing_crosses(up: Callable[[str], Any], untrained: Path, tmp_path: Path, until: Callable[..., Any]) -> None:
    (tmp_path / "short.toml").write_text(RECIPE)
    platform = up("".join(POLICY.format(tenant=t, policy=p, base=untrained, root=tmp_path) for t, p in PAIRS))
    clients = {tenant: platform.client(tenant) for tenant in ("north", "south")}
    responses = {}
    for (tenant, policy), count in COUNTS.items():
        for number in range(count):
            responses[tenant, policy], version = talk(clients[tenant], policy, number)
            assert version == "base"

    # One tenant neither rates nor calls what is another's.
    word = {"response_id": responses["south", "alpha"], "kind": "thumb", "value": 1}
    with pytest.raises(openai.NotFoundError):
        clients["north"].post("/feedback", body=word, cast_to=object)

    counted = "select tenant, policy, count(*) n, count(thumb) rated from turns group by all order by all"
    expected = [{"tenant": t, "policy": p, "n": n, "rated": n} for (t, p), n in COUNTS.items()]
    until(lambda: platform.rows(counted) == expected, 60, every=0.5)
    people = platform.rows("select subject, count(distinct tenant) tenants from turns group by subject")
    assert {row["tenants"] for row in people} == {1}, "a customer of both tenants has another pseudonym in each"

    def labels() -> dict[str, int]:
        rewards = platform.status("scorer").get("rewards", {})
        return {name: said["labels"] for name, said in rewards.items()}

    until(lambda: labels() == {f"{t}/{p}": n for (t, p), n in COUNTS.items()}, 60, every=0.5)

    platform.does("retrain", "--policy", "north/alpha", "--wait")
    (run,) = platform.rows("select tenant, policy, batch, adapter from runs")
    assert (run["tenant"], run["policy"]) == ("north", "alpha")
    batch = pq.read_table(platform.home / "batches" / f"{run['batch']}.parquet")
    theirs = platform.rows("select episode from turns where tenant = 'north' and policy = 'alpha'")
    assert set(batch.column("episode").to_pylist()) == {row["episode"] for row in theirs}

    word = ("--without-evidence", "--reason", "looked at it")
    platform.does("release", "promote", run["adapter"], "--policy", "north/alpha", *word)
    versions = {(t, p): talk(clients[t], p, 99)[1] for t, p in PAIRS}
    assert versions == {pair: run["adapter"] if pair == ("north", "alpha") else "base" for pair in PAIRS}
