"""The whole platform on a broker that asks who comes: each service as its own user, with no more than its grants."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from everloop.log.kafka.grants import SERVICES, user_of
from everloop.log.kafka.settings import Address
from everloop.topics import OPERATOR

from services.broker.process import Broker
from tests.judge import Judge

pytestmark = [pytest.mark.kafka, pytest.mark.processes, pytest.mark.models, pytest.mark.mlflow]
PREFIX = "team"
CONFIG = """
[log]
url = "kafka://{address}/{prefix}"
security = "sasl"
ca_file = "{ca}"
username = "{operator}"
password_file = "{folder}/{operator}"
create_topics = false
{users}
[tenants.default.policies.assistant]
base = "{base}"
max_tokens = 8
[tenants.default.policies.assistant.reward]
declaration = "{folder}/reward.toml"
"""
SAYS_SOMETHING = """
[[check]]
name = "long"
kind = "exact"
reference = "constant"
constant = "never said"
"""
USER = """
[log.users.{service}]
username = "{user}"
password_file = "{folder}/{user}"
"""
RATED = "SELECT count(DISTINCT call) AS calls FROM scores WHERE source = 'feedback'"


SAID = "SELECT count(*) AS words FROM feedback WHERE kind = 'implicit' AND name IN ('long', 'j')"


def config(broker: Broker, ca: Path, folder: Path, base: Path, judge: Judge) -> str:
    """With a file for each password, and a declaration of a check and a judge."""
    users = {service: user_of(service, Address((), PREFIX)) for service in SERVICES}
    folder.mkdir()
    (folder / "reward.toml").write_text(SAYS_SOMETHING + judge.declared())
    for user in users.values():
        (folder / user).write_text(f"password-of-{user}\n")
    operator = users.pop(OPERATOR)
    its = "".join(USER.format(service=service, user=user, folder=folder) for service, user in users.items())
    return CONFIG.format(
        address=broker.address, prefix=PREFIX, ca=ca, operator=operator, folder=folder, users=its, base=base
    )


def comes_as(pid: int) -> str:
    """The user that a process was told to come as."""
    said = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return str(json.loads(next(line for line in said if line.startswith("EVERLOOP_LOG__USERNAME=")).partition("=")[2]))


def test_each_service_under_up_comes_as_itself_and_that_is_enough(
    up: Callable[[str], Any],
    secured: Broker,
    authority: tuple[Path, Path, Path],
    tmp_path: Path,
    untrained: Path,
    adapter: Path,
    judge: Judge,
    until: Callable[..., Any],
) -> None:
    platform = up(config(secured, authority[0], tmp_path / "passwords", untrained, judge))
    services = [service for service in SERVICES if service != OPERATOR]
    began = {service: platform.status(service)["pid"] for service in services}
    assert {service: comes_as(pid) for service, pid in began.items()} == {s: f"{PREFIX}-{s}" for s in services}

    client = platform.client()
    asked = [{"role": "user", "content": "hello there"}]
    answer = client.chat.completions.create(model="assistant", messages=asked)
    client.post("/feedback", body={"response_id": answer.id, "kind": "thumb", "value": 1}, cast_to=object)
    until(lambda: platform.rows(RATED) == [{"calls": 1}], deadline=60, every=1.0)
    until(lambda: platform.rows(SAID) == [{"words": 2}], deadline=60, every=1.0)

    platform.does("release", "register", str(adapter))
    platform.does("release", "promote", adapter.name, "--without-evidence", "--reason", "a test of permissions")
    ask = client.chat.completions.with_raw_response.create
    version = lambda: ask(model="assistant", messages=asked).headers["X-Everloop-Policy-Version"]  # noqa: E731
    until(lambda: version() == adapter.name, deadline=60, every=0.5)
    assert {service: platform.status(service)["pid"] for service in services} == began, "none was refused and died"
