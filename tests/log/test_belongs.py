"""A home belongs to one log: commands take it where none is named, and another one is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from everloop.config import Config
from everloop.errors import ConfigError
from everloop.log import belongs

from services.installation import Installation

KAFKA = "kafka://127.0.0.1:9092"


def config(home: Path, url: str | None = None) -> Config:
    return Config.model_validate({"home": home} | ({"log": {"url": url}} if url else {}))


def everloop(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
    command = [sys.executable, "-m", "everloop.cli.main", *words, "--home", str(home)]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60)


def test_a_home_takes_its_own_log_where_none_is_named(tmp_path: Path) -> None:
    assert belongs.of_its_home(config(tmp_path)).log.url == "sqlite:///log.db"
    belongs.bind(config(tmp_path, KAFKA))
    assert belongs.log_of(tmp_path) == KAFKA
    assert belongs.of_its_home(config(tmp_path)).log.url == KAFKA
    assert belongs.of_its_home(config(tmp_path, "sqlite:///log.db")).log.url == "sqlite:///log.db", "named, and refused"


def test_another_log_is_refused_however_its_url_is_spelled(tmp_path: Path) -> None:
    belongs.bind(config(tmp_path, KAFKA))
    for same in (KAFKA, "kafka://127.0.0.1", KAFKA + "/"):
        belongs.bind(config(tmp_path, same))
    for other in ("sqlite:///log.db", KAFKA + "/other", "kafka://127.0.0.1:9093"):
        with pytest.raises(ConfigError, match=f"belongs to the log {KAFKA}"):
            belongs.bind(config(tmp_path, other))
    assert belongs.log_of(tmp_path) == KAFKA


def test_orders_to_another_log_are_refused_while_nothing_runs(tmp_path: Path) -> None:
    belongs.bind(config(tmp_path))
    with pytest.raises(ConfigError, match="take a home of its own"), Installation(config(tmp_path, KAFKA)) as here:
        assert here.log


def test_up_refuses_another_log_before_anything_starts_and_doctor_says_it(tmp_path: Path) -> None:
    belongs.bind(config(tmp_path))
    refused = everloop(tmp_path, "up", "--log", KAFKA)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "belongs to the log sqlite:///log.db" in refused.stderr
    found = json.loads(everloop(tmp_path, "doctor", "--json", "--log", KAFKA).stdout)
    assert [one["level"] for one in found if "belongs to the log" in one["what"]] == ["wrong"]


def test_doctor_looks_at_the_home_s_own_log(tmp_path: Path) -> None:
    belongs.bind(config(tmp_path, "kafka://127.0.0.1:9"))
    found = json.loads(everloop(tmp_path, "doctor", "--json").stdout)
    assert any("127.0.0.1:9" in one["what"] and one["level"] == "wrong" for one in found)


def test_listing_keys_makes_no_home(tmp_path: Path) -> None:
    home = tmp_path / "none"
    said = everloop(home, "keys", "list")
    assert (said.returncode, "No keys" in said.stdout) == (0, True)
    assert not home.exists()
