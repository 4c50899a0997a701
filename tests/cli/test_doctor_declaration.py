"""'everloop doctor' looks at the file that a policy's reward.declaration names."""

from __future__ import annotations

from pathlib import Path

import pytest
from everloop.cli.main import main
from everloop.config import Config

from services.commands import doctor

JUDGE = '[[judge]]\nname = "j"\nurl = "http://h/v1"\nmodel = "m"\nrubric = "r"\nkey_file = "a.key"\n'


def found(tmp_path: Path, text: str | None) -> list[doctor.Finding]:
    path = tmp_path / "reward.toml"
    if text is not None:
        path.write_text(text)
    desk = {"reward": {"declaration": str(path)}}
    policies = {"desk": desk, "plain": {}}
    config = Config.model_validate({"home": tmp_path, "tenants": {"bank": {"policies": policies}}})
    return list(doctor._declarations(config))


def test_one_that_is_well_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.key").write_text("secret")
    (one,) = found(tmp_path, '[[check]]\nname = "c"\nkind = "tool-calls"\n' + JUDGE)
    path = tmp_path / "reward.toml"
    assert one == ("ok", f"reward declaration {path} of bank/desk: 1 checks, 1 judges and critics", "")
    assert doctor._declarations in doctor.CHECKS


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "there is no reward declaration at"),
        ("[combine", "is not TOML"),
        ("[combin]\ncap = 1.0", "combin: unknown key; did you mean 'combine'"),
        ('[[check]]\nname = "c"\nkind = "magic"\n', "there is no check of the kind 'magic'"),
        (
            '[[check]]\nname = "c"\nkind = "pattern"\noptions.pattern = "("\n',
            "[[check]] 'c': options.pattern: '(' is no",
        ),
        (JUDGE, "judge:j: its key_file cannot be read"),
    ],
)
def test_what_is_wrong_with_it_is_named(tmp_path: Path, text: str | None, told: str) -> None:
    (one,) = found(tmp_path, text)
    assert one.level == "wrong"
    assert one.what.startswith("bank/desk: ")
    assert told in one.what
    assert "reward.declaration of bank/desk" in one.fix


def test_a_start_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reward.toml").write_text('[[check]]\nname = "c"\nkind = "number"\n')
    (tmp_path / "everloop.toml").write_text(
        f'home = "{tmp_path}/home"\n[tenants.bank.policies.desk.reward]\ndeclaration = "reward.toml"\n'
    )
    monkeypatch.setenv("EVERLOOP_CONFIG", str(tmp_path / "everloop.toml"))
    monkeypatch.delenv("EVERLOOP_HOME", raising=False)
    assert main(["up"]) == 2
    assert "[[check]] 'c': reference: it compares the answer with one" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.log")), "no service was started to find it out"
