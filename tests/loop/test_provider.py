"""A provider before one policy and behind another, with every process: answered, captured and scored from the first
day; and the engine may die."""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.provider import KEY, MODEL, StrictProvider

pytestmark = [pytest.mark.processes, pytest.mark.models]
POLICIES = """
[tenants.default.policies.support]
base = "{base}"
max_tokens = 8
[tenants.default.policies.support.provider]
url = "{url}"
model = "{model}"
key_file = "{key_file}"
[tenants.default.policies.assistant]
base = "{base}"
max_tokens = 8
[tenants.default.policies.assistant.provider]
url = "{url}"
model = "{model}"
key_env = "PROVIDER_KEY_OF_THIS_TEST"
role = "fallback"
"""
SCORED = """
select t.policy, t.model, max(t.thumb) thumb, max(s.label) label from turns t
join scores s on s.episode = t.episode and s.call = t.call
where t.policy_version = 'provider' and t.error is null group by all order by t.policy
"""


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictProvider]:
    monkeypatch.setenv("PROVIDER_KEY_OF_THIS_TEST", KEY)
    made = StrictProvider()
    yield made
    made.close()


def asked(client: openai.OpenAI, policy: str, text: str = "hello there") -> tuple[Any, str]:
    """The answer and who gave it."""
    raw = client.chat.completions.with_raw_response.create(model=policy, messages=[{"role": "user", "content": text}])
    return raw.parse(), str(raw.headers["X-Everloop-Policy-Version"])


def who(client: openai.OpenAI, policy: str) -> str:
    """Who answers; the error's code where nobody does."""
    try:
        return asked(client, policy)[1]
    except openai.APIStatusError as error:
        return str(error.code)


def test_a_provider_answers_from_the_first_day_and_where_the_engine_does_not(
    up: Callable[[str], Any], untrained: Path, other: StrictProvider, tmp_path: Path, until: Callable[..., Any]
) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(KEY + "\n")
    platform = up(POLICIES.format(base=untrained, url=other.url, model=MODEL, key_file=key_file))
    client = platform.client()

    # The incumbent: whole, streamed, rated.
    answer, version = asked(client, "support")
    assert (answer.choices[0].message.content, version) == (other.says, "provider")
    client.post("/feedback", body={"response_id": answer.id, "kind": "thumb", "value": 1}, cast_to=object)
    messages: Any = [{"role": "user", "content": "and streamed?"}]
    stream = client.chat.completions.create(model="support", messages=messages, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == other.says

    # The provider is away: clear, and over when it is back.
    assert who(client, "assistant") == "base"
    other.stop()
    with pytest.raises(openai.InternalServerError, match=r"the provider at 127\.0\.0\.1:\d+ cannot be reached") as away:
        asked(client, "support")
    assert (away.value.status_code, away.value.code) == (503, "provider_unavailable")
    assert who(client, "assistant") == "base"
    told = platform.does("status")
    for words in (f"the provider: {MODEL} at 127", f"where no engine answers, {MODEL} at 127", "cannot be reached"):
        assert words in told
    other.start()
    assert who(client, "support") == "provider"

    # The engine is killed: the gateway stays ready, and the provider answers until it is back.
    before = platform.status("engine")["pid"]
    os.kill(before, signal.SIGKILL)
    until(lambda: who(client, "assistant") == "provider", 30)
    assert who(client, "support") == "provider"
    with urllib.request.urlopen(f"{platform.ready['services']['gateway']}/readyz", timeout=10) as ready:
        assert ready.status == 200
    until(lambda: who(client, "assistant") == "base", 120, every=0.2)

    # All of it is in the store, and scored.
    def scored() -> bool:
        rows = [(row["policy"], row["model"], row["thumb"], row["label"]) for row in platform.rows(SCORED)]
        return rows == [("assistant", MODEL, None, None), ("support", MODEL, 1, 1.0)]

    until(scored, 90, every=1.0)
    platform.end()
    said = "".join(path.read_text(errors="replace") for path in (platform.home / "logs").iterdir())
    assert KEY not in said
    assert other.refused == []
