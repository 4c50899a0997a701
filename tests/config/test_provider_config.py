"""A provider's configuration: where it may be, where its key is, and that the key is never in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from everloop.cli.init import commented
from everloop.config import load
from everloop.errors import ConfigError
from everloop.provider_config import ProviderConfig

TABLE = "[tenants.default.policies.assistant.provider]\n"


def given(tmp_path: Path, text: str) -> ProviderConfig:
    path = tmp_path / "everloop.toml"
    path.write_text(TABLE + text)
    made = load(path, {}).policy("default", "assistant").provider
    assert made is not None
    return made


@pytest.mark.parametrize(
    "url",
    [
        *("https://api.example.com/v1", "https://api.example.com/openai/v1/", "http://127.0.0.1:8000/v1"),
        *("http://[::1]:8000/v1", "http://10.1.2.3/v1", "http://vllm:8000/v1", "http://vllm.team.svc/v1"),
    ],
)
def test_where_a_provider_may_be(tmp_path: Path, url: str) -> None:
    assert given(tmp_path, f"url = '{url}'\nmodel = 'm'").url == url.rstrip("/")


OTHER = "url = 'https://h/v1'\nmodel = 'm'\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("url = 'http://api.example.com/v1'\nmodel = 'm'", "in the clear: use https://"),
        ("url = 'http://8.8.8.8/v1'\nmodel = 'm'", "in the clear"),
        ("url = 'api.example.com/v1'\nmodel = 'm'", "is not an address: use https://<host>/v1"),
        ("url = 'https://'\nmodel = 'm'", "is not an address"),
        ("url = 'https://h:99999/v1'\nmodel = 'm'", "Port out of range"),
        ('url = "https://h/v1\\r\\nX: y"\nmodel = "m"', "is not an address"),
        ("url = 'https://ann:secret@h/v1'\nmodel = 'm'", "put the key into a file"),
        ("url = 'https://h/v1?api-version=1'\nmodel = 'm'", "leave out what begins with"),
        ("url = 'https://h/v1'", "model: Field required"),
        (OTHER + "key = 'sk-1'", "key: unknown key; did you mean 'key_"),
        (OTHER + "key_file = '/k'\nkey_env = 'K'", "leave one out"),
        (OTHER + "key_env = 'EVERLOOP_KEY'", "are settings; use another"),
        (OTHER + "role = 'boss'", "'incumbent' or 'fallback'"),
        (OTHER + "timeout = 0", "greater than 0"),
    ],
)
def test_what_cannot_be_is_refused_with_why_and_what_instead(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        given(tmp_path, text)
    assert "secret" not in str(refused.value)


def test_the_key_is_where_the_configuration_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    by_file = given(tmp_path, f"{OTHER}key_file = '{file}'")
    by_name = given(tmp_path, f"{OTHER}key_env = 'KEY_OF_THIS_TEST'")
    for its, told in ((by_file, "cannot be read"), (by_name, "KEY_OF_THIS_TEST is not set")):
        with pytest.raises(ConfigError, match=told):
            its.key()
    for text, told in ((" \n", "is empty"), ("two words", "no key"), ("a\nX: y", "no key"), ("schlüssel", "no key")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=told):
            by_file.key()
    file.write_text("sk-1\n")
    monkeypatch.setenv("KEY_OF_THIS_TEST", "sk-2")
    assert (by_file.key(), by_name.key(), given(tmp_path, OTHER).key()) == ("sk-1", "sk-2", None)


def test_the_commented_file_shows_every_setting_of_it() -> None:
    (shown,) = [part for part in commented().split("\n\n") if "assistant.provider]" in part]
    assert all(name in shown for name in ProviderConfig.model_fields)


def test_the_documented_example_parses(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text()
    (example,) = [part.split("```")[0] for part in page.split("```toml\n")[1:] if ".provider]" in part]
    path = tmp_path / "everloop.toml"
    path.write_text(example)
    its = load(path, {}).policy("default", "support").provider
    assert its is not None
    assert its.model_fields_set == set(ProviderConfig.model_fields) - {"key_env"}
