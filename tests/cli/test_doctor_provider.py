"""'everloop doctor' asks each provider once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from everloop.config import Config
from everloop.errors import ConfigError

from services.commands import doctor
from services.commands.up import _who_answers
from services.gateway.provider import Providers
from tests.provider import KEY, MODEL, StrictProvider


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictProvider]:
    monkeypatch.setenv("PROVIDER_KEY_OF_THIS_TEST", KEY)
    made = StrictProvider()
    yield made
    made.close()


def config(other: StrictProvider, tmp_path: Path, **more: Any) -> Config:
    policies = {"support": {"provider": other.config() | more}, "desk": {"provider": other.config("fallback") | more}}
    return Config.model_validate({"home": tmp_path, "tenants": {"default": {"policies": policies}}})


def found(config: Config) -> list[tuple[str, str]]:
    return [(finding.level, finding.what) for finding in doctor._providers(config)]


def test_a_provider_that_answers_is_well(other: StrictProvider, tmp_path: Path) -> None:
    given = config(other, tmp_path)
    assert [level for level, _ in found(given)] == ["ok", "ok"]
    assert f"at 127.0.0.1:{other.port} answers (incumbent: {MODEL})" in found(given)[0][1]
    assert other.asked == [], "its list of models was enough"
    assert doctor._providers in doctor.CHECKS
    lines = _who_answers(given).splitlines()
    assert lines[1].endswith(f"{MODEL} at 127.0.0.1:{other.port} until an adapter is live")
    assert lines[2].endswith("where no engine does")


def test_what_is_wrong_with_it_is_told_with_what_to_mend(other: StrictProvider, tmp_path: Path) -> None:
    assert found(config(other, tmp_path, model="another"))[0] == (
        "note",
        f"default/support: the provider at 127.0.0.1:{other.port} does not list the model 'another'",
    )
    other.key = "sk-changed"
    (level, told), (behind, _) = found(config(other, tmp_path))
    assert (level, behind) == ("wrong", "note"), "without a fallback the policy answers all the same"
    assert "refuses the key (401)" in told
    assert KEY not in told
    missing = config(other, tmp_path, key_env="A_VARIABLE_THAT_IS_NOT_SET")
    assert "A_VARIABLE_THAT_IS_NOT_SET is not set" in found(missing)[0][1]
    with pytest.raises(ConfigError, match=r"default/support: .* A_VARIABLE_THAT_IS_NOT_SET is not set"):
        Providers(missing).check_keys()
    other.stop()
    assert "cannot be reached" in found(config(other, tmp_path))[0][1]
    other.start()
