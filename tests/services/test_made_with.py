"""A home that is looked at with another configuration than its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from everloop.cli.main import main
from everloop.config import Config, load
from everloop.errors import ConfigError
from everloop.home import Home

from services import made_with
from services.commands import doctor


@pytest.fixture
def its_config(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of bank/desk, and the configuration that it was started with."""
    home.folder("rewards", "bank", "desk")
    path = tmp_path / "bank.toml"
    path.write_text("[tenants.bank.policies.desk]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVERLOOP_HOME", str(home.root))
    monkeypatch.setenv("EVERLOOP_CONFIG", str(path))
    made_with.remember(home)
    return path


def test_without_its_configuration_a_home_says_whose_it_is_and_what_to_type(
    home: Home, its_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_with.check(load(), home)
    monkeypatch.delenv("EVERLOOP_CONFIG")
    for words in (["reward", "list"], ["reward", "report"], ["explain", "ep_1"], ["status"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"the home {home.root} is one of bank/desk" in error
        assert "the default configuration (there is no everloop.toml here) has default/assistant" in error
        assert f"give --config {its_config}" in error
    told = [one.what for one in doctor._home(load()) if one.level == "wrong"]
    assert len(told) == 1
    assert f"give --config {its_config}" in told[0]
    its_config.rename(its_config.with_suffix(".moved"))
    with pytest.raises(ConfigError, match="give the --config that it was started with"):
        made_with.check(load(), home)


def test_a_home_of_some_of_the_policies_or_of_none_yet_is_well(home: Home, its_config: Path) -> None:
    two = {"tenants": {"bank": {"policies": {"desk": {}, "new": {}}}}}
    made_with.check(Config.model_validate(two), home)
    made_with.check(load(), Home(home.root / "fresh"))


def test_a_start_without_a_configuration_leaves_none_to_give(
    home: Home, its_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made_with.remembered(home) == its_config
    monkeypatch.delenv("EVERLOOP_CONFIG")
    made_with.remember(home)
    assert made_with.remembered(home) is None


def test_where_the_policies_of_its_own_configuration_are_others_now_a_home_is_well(
    home: Home, its_config: Path
) -> None:
    its_config.write_text("[tenants.bank.policies.frontdesk]\n")
    made_with.check(load(), home)
