"""Keys and tokens: hashed, scoped, revocable, signed."""

from __future__ import annotations

from pathlib import Path

import pytest
from everloop.errors import ConfigError

from services.gateway import keys as module
from services.gateway.keys import Keys
from services.gateway.tokens import Grant, Tokens


def test_a_key_is_found_by_every_process_and_kept_as_a_hash(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.db")
    key = keys.create("bank", "research", "Ada's")
    assert key.startswith("ek_")
    found = Keys(tmp_path / "keys.db").find(key)
    assert found is not None
    assert (found.tenant, found.scope, found.label) == ("bank", "research", "Ada's")
    assert found.may("pin")
    assert keys.find(key + "x") is None
    assert keys.find("") is None
    assert keys.find("\udcff") is None
    assert all(key.encode() not in file.read_bytes() for file in tmp_path.iterdir())
    assert [each.id for each in keys.list()] == [found.id]


def test_scopes_say_what_a_key_may_do(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.db")
    may = {}
    for scope in ("agent", "research", "feedback"):
        found = keys.find(keys.create("bank", scope))
        assert found is not None
        may[scope] = [action for action in ("call", "events", "feedback", "pin") if found.may(action)]
    assert may == {
        "agent": ["call", "events", "feedback"],
        "research": ["call", "events", "feedback", "pin"],
        "feedback": ["feedback"],
    }
    with pytest.raises(ConfigError, match="agent, research, feedback"):
        keys.create("bank", "root")
    with pytest.raises(ConfigError, match="tenant"):
        keys.create("Bank!")


def test_a_revoked_key_opens_nothing_after_the_recheck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys(tmp_path / "keys.db")
    key = keys.create("bank")
    found = keys.find(key)
    assert found is not None
    assert Keys(tmp_path / "keys.db").revoke(found.id)
    assert not keys.revoke(found.id)
    assert not keys.revoke("no id")
    monkeypatch.setattr(module, "RECHECK", 0.0)
    assert keys.find(key) is None


def test_a_token_says_only_what_was_signed_until_it_expires() -> None:
    tokens = Tokens(b"s" * 32)
    grant = Grant("bank", "ep_1", "assistant", 100)
    token = tokens.grant(grant)
    assert tokens.read(token, 99.0) == grant
    with pytest.raises(ValueError, match="expired"):
        tokens.read(token, 101.0)
    for forged in (token[:-2] + "AA", "ft_", "ft_%%%", Tokens(b"t" * 32).grant(grant), "", "ft_é"):
        with pytest.raises(ValueError, match="not made by this installation"):
            tokens.read(forged, 99.0)
