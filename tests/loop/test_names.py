"""A researcher's names, on the whole platform: an adapter pinned before any gate, a version that a plain MLflow client
asks for by an alias, and a run that is sampled from while it goes on. Calls go by the official client."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import random_adapter
from trainer.policy.base import Policy

pytestmark = [pytest.mark.processes, pytest.mark.models, pytest.mark.ray, pytest.mark.mlflow]
RECIPE = """
checkpoint_every = 2
[reward]
source = "feedback"
[adapter]
rank = 4
[optimizer]
minibatch = 4
epochs = {epochs}
learning_rate = 2e-4
"""
POLICY = """
[mlflow]
poll = 1
[tenants.default.policies.desk]
base = "{base}"
max_tokens = 6
temperature = 1.0
[tenants.default.policies.desk.gate]
min_gold = 4
[tenants.default.policies.desk.train]
recipe = "{recipe}"
min_scored = 4000
keep_checkpoints = 2
"""
MESSAGES: list[Any] = [{"role": "user", "content": "where is my card"}]


def version(client: openai.OpenAI, model: str) -> str:
    """Who answers to a name; or how it is refused."""
    try:
        raw = client.chat.completions.with_raw_response.create(model=model, messages=MESSAGES)
    except openai.APIStatusError as error:
        return f"{error.status_code} {error.code}"
    assert raw.parse().choices[0].finish_reason
    return str(raw.headers["X-Everloop-Policy-Version"])


def registered_by_hand(home: Path, folder: Path, alias: str) -> str:
    """As a researcher with nothing but MLflow makes a version and points an alias at it."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.create_experiment("mine", artifact_location=(home / "mlartifacts" / "mine").as_uri())
    run = client.create_run(experiment).info.run_id
    client.log_artifacts(run, str(folder), "adapter")
    made = client.create_model_version("default.desk", source=f"runs:/{run}/adapter", run_id=run)
    client.set_registered_model_alias("default.desk", alias, made.version)
    return str(made.version)


def alias(home: Path, name: str, to: str | None = None) -> str | None:
    """Where it points now; moved before where ``to`` is given."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    if to is not None:
        client.set_registered_model_alias("default.desk", name, to)
    found = client.get_registered_model("default.desk").aliases.get(name)
    return None if found is None else str(found)


def said(platform: Any) -> dict[str, Any]:
    """What the releaser says of the policy."""
    return dict(platform.status("releaser").get("policies", {}).get("default/desk", {}))


def decided(platform: Any, adapter: str) -> dict[str, Any] | None:
    last = said(platform).get("last_decision")
    return last if last and last["adapter"] == adapter else None


def rated(client: openai.OpenAI, count: int) -> None:
    """So many people ask, and half of them like the answer."""
    for number in range(count):
        asked: list[Any] = [{"role": "user", "content": f"where is card {number}"}]
        answer = client.chat.completions.create(model="desk", messages=asked, user=f"person-{number}")
        word = {"response_id": answer.id, "kind": "thumb", "value": 1 if number % 2 else -1}
        client.post("/feedback", body=word, cast_to=object)


def listed(client: openai.OpenAI, kind: str) -> list[str]:
    return [model.id for model in client.models.list().data if model.id.startswith(kind)]


def test_names_answer_before_any_gate_and_while_a_run_goes_on(
    up: Callable[[str], Any],
    untrained: Path,
    policy: Policy,
    tmp_path: Path,
    until: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = (random_adapter(policy, tmp_path / "mine", ("attention",), seed) for seed in (1, 2))
    recipe = tmp_path / "slow.toml"
    recipe.write_text(RECIPE.format(epochs=30))
    platform = up(POLICY.format(base=untrained, recipe=recipe))
    client = platform.client()
    research = openai.OpenAI(
        base_url=platform.ready["url"],
        api_key=json.loads(platform.does("keys", "create", "--scope", "research", "--json"))["key"],
        max_retries=0,
    )
    told: list[str] = []

    # Pinned: nothing but the file checks lies before it. Without gold the gate leaves it to a person.
    platform.does("release", "register", str(first))
    began = time.monotonic()
    until(lambda: version(research, f"desk@{first.name[:12]}") == first.name, deadline=60, every=0.2)
    told.append(f"registered to pinned answer: {time.monotonic() - began:.1f} s")
    assert version(research, "desk@1") == first.name
    assert version(client, "desk@1") == "403 insufficient_scope"
    assert version(client, "desk") == "base"
    until(lambda: [one["adapter"] for one in said(platform)["waiting"]] == [first.name])
    assert listed(research, "desk@") == ["desk@1"]

    # By an alias, from a plain client; and then the gate decides.
    gold = tmp_path / "gold.jsonl"
    items = [{"text": f"what of {number}", "answer": "block_card", "slice": "a"} for number in range(6)]
    gold.write_text("".join(json.dumps(item) + "\n" for item in items))
    number = registered_by_hand(platform.home, second, "candidate")
    began = time.monotonic()
    until(lambda: version(research, f"desk@{number}") == second.name, deadline=90, every=0.2)
    told.append(f"alias candidate to pinned answer: {time.monotonic() - began:.1f} s")
    platform.does("gold", "import", str(gold), "--split", "gate")
    verdict = until(lambda: decided(platform, second.name), deadline=60, every=0.2)
    assert (verdict["state"], "gate" in verdict["evidence"]) == ("rejected", True)
    assert alias(platform.home, "live", to=number) == number
    until(lambda: alias(platform.home, "live") is None, deadline=60, every=0.5)
    until(
        lambda: f"alias live was moved to version {number} by hand" in platform.does("status"), deadline=60, every=0.5
    )
    assert version(client, "desk") == "base"
    assert version(research, f"desk@{number}") == second.name, "rejected, and still there for those who name it"

    # A run under way.
    rated(client, 24)
    until(lambda: platform.rows("select count(*) n from scores where label is not null")[0]["n"] >= 24, 60, every=1.0)
    ordered = platform.orders("retrain")
    until(lambda: listed(research, "everloop://"), deadline=120, every=0.1)
    name = listed(research, "everloop://")[0]
    run = name.split("/")[2]
    began = time.monotonic()
    sampled = version(research, f"everloop://{run}/checkpoints/latest")
    told.append(f"first sample of a checkpoint: {time.monotonic() - began:.1f} s")
    assert len(sampled) == 32
    assert platform.status("learner")["policies"]["default/desk"]["running"]["run"] == run, "the run has ended too soon"
    assert version(client, name) == "403 insufficient_scope"
    until(lambda: version(research, f"everloop://{run}/checkpoints/latest") not in (sampled, ""), 60, every=0.2)

    # And afterwards, for as long as it is kept.
    ended = until(lambda: platform.status("learner")["policies"]["default/desk"]["last_run"], deadline=180, every=0.5)
    ordered.communicate(timeout=60)
    assert (ended["id"], ended["state"]) == (run, "published"), ended["reason"]
    assert version(research, f"everloop://{run}/checkpoints/latest") == ended["adapter"]
    assert version(research, f"everloop://{run}/checkpoints/2") == "404 model_not_found"
    assert ended["metrics"]["mismatch_calls_mean"] < 1e-5
    shown = platform.does("status")
    assert "of calls that base answered sampler and trainer differ by" in shown
    assert f"alias live was moved to version {number} by hand" in shown
    marked = platform.rows(
        "select count(*) n from events where payload ->> 'pinned' = 'true' and payload ->> 'policy_version' = "
        f"'{sampled}'"
    )
    assert marked[0]["n"] >= 1
    with capsys.disabled():
        print("\n" + "\n".join(told))
