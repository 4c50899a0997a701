"""The command line: quick help, suggestions, one clear message for a mistake, and what the SDK says alone."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.cli import main as cli
from everloop.cli.main import OWN, PLATFORM, main
from everloop.home import Home
from everloop.log import NewRecord
from everloop.release import Release, ReleaseState
from everloop.run import Command, DeadLetter
from everloop.topics import COMMANDS, DEAD_LETTERS, EVENTS, PAUSES, RELEASES

from services.commands import COMMANDS as TABLE
from services.installation import Installation
from services.supervisor import only_one
from services.tables import table

EVERLOOP = [sys.executable, "-m", "everloop.cli.main"]


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("EVERLOOP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("EVERLOOP_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def here(home: Home) -> Installation:
    home.folder()
    return Installation.here()


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        status = main(words)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_help_is_said_from_a_standing_start() -> None:
    done = subprocess.run([*EVERLOOP, "--help"], capture_output=True, text=True, check=True)
    assert "everloop <command> --help" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from everloop.cli.main import main; main(['--help']);"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'pydantic','httpx','torch','numpy','aiohttp','ray',"
        "'mlflow','duckdb','ormsgpack'}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_every_command_is_there_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(TABLE) == set(PLATFORM)
    for name, (line, module_name) in {**OWN, **TABLE}.items():
        assert line
        module = import_module(module_name)
        assert callable(module.add_arguments)
        assert callable(module.run)
        status, out, _ = said(capsys, name, "--help")
        assert status == 0
        assert f"everloop {name}" in out
        assert "--home" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stauts"], "there is no command 'stauts'; did you mean 'status'?"),
        (["xyzzy"], "'everloop --help' lists the commands"),
        (["status"], "there is no installation at"),
        (["release", "rollback"], "there is no installation at"),
        (["sql", "select 1"], "there is no installation at"),
        (["--config", "x"], "there is no command '--config'"),
        (["status", "--config", "none.toml"], "there is no configuration at"),
        (["release"], "usage: everloop release"),
        (["retrain", "--seed", "x"], "invalid int value"),
    ],
)
def test_a_mistake_gets_one_clear_message_and_status_2(
    capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    status, _, err = said(capsys, *words)
    assert status == 2
    assert told in err
    assert "Traceback" not in err


def test_the_sdk_alone_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_registered", dict)
    status, _, err = said(capsys, "up")
    assert status == 2
    assert "only the SDK is installed here" in err
    assert "make install" in err
    assert said(capsys, "init")[0] == 0


def test_a_real_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_registered", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--help"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"{' '.join(EVERLOOP)} --help | true", shell=True, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr


def test_init_writes_what_parses_and_never_overwrites(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert said(capsys, "init")[0] == 0
    assert (tmp_path / "everloop.toml").exists()
    status, _, err = said(capsys, "init")
    assert status == 2
    assert "stays as it is" in err


def test_keys_are_made_shown_once_listed_and_revoked(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, "keys", "create", "--json", "--scope", "research", "--label", "ann")
    key = json.loads(out)["key"]
    assert status == 0
    status, out, _ = said(capsys, "keys", "list")
    assert "research" in out
    assert key not in out
    name = out.splitlines()[2].split()[0]
    assert said(capsys, "keys", "revoke", name)[0] == 0
    assert said(capsys, "keys", "revoke", name)[0] == 2
    assert said(capsys, "keys", "create", "--tenant", "nobody")[0] == 2


def test_orders_are_in_the_log_while_nobody_runs(capsys: pytest.CaptureFixture[str], here: Installation) -> None:
    status, out, _ = said(capsys, "release", "rollback", "--reason", "it swears", "--live")
    assert status == 1
    assert "once the platform runs" in out
    assert said(capsys, "pause", "--no-wait")[0] == 0
    (rollback,) = here.records(COMMANDS, Command)
    (pause,) = here.records(PAUSES, Command)
    assert (rollback.kind, rollback.arguments) == ("rollback", {"reason": "it swears", "live": True})
    assert pause.kind == "pause"


def test_a_run_on_nothing_is_refused_with_what_brings_something(
    capsys: pytest.CaptureFixture[str], here: Installation, tmp_path: Path
) -> None:
    (tmp_path / "everloop.toml").write_text('[tenants.default.policies.assistant.train]\nevery = "6h"\n')
    status, out, err = said(capsys, "retrain", "--seed", "7")
    assert (status, out) == (1, "")
    assert "default/assistant has no scored episodes yet: nothing to learn from, and no run is ordered" in err
    assert "send requests for the model 'assistant' through the gateway, which 'everloop up' starts" in err
    assert "give feedback on the answers" in err
    assert "at 200 scored episodes (train.min_scored), or every 6h" in err
    assert "lower" not in err
    assert list(here.records(COMMANDS, Command)) == []


def test_an_order_while_the_platform_starts_is_waited_for(
    capsys: pytest.CaptureFixture[str], here: Installation
) -> None:
    with only_one(here.home.root):
        status, out, _ = said(capsys, "pause", "--timeout", "0.1")
    assert status == 1
    assert "no answer within 0.1 s" in out
    assert "is done once the platform runs" not in out


def test_releases_are_listed_with_why(capsys: pytest.CaptureFixture[str], here: Installation) -> None:
    assert "No releases yet" in said(capsys, "release", "list")[1]
    release = Release(id="rel_1", tenant="default", policy="assistant", adapter="a" * 32, uri="u", time=1.0)
    rejected = release.to(ReleaseState.REJECTED, "Rejected: gold -3.0 points.", 2.0)
    here.log.append([NewRecord(RELEASES.name, one.key, wire.encode(one)) for one in (release, rejected)])
    out = said(capsys, "release", "list")[1]
    assert "rejected" in out
    assert "gold -3.0 points" in out
    assert "gate none, canary none" in out
    assert "candidate" not in out
    assert json.loads(said(capsys, "release", "list", "--json")[1])["state"] == "rejected"


def test_a_promotion_without_evidence_needs_a_reason_that_is_kept(
    capsys: pytest.CaptureFixture[str], here: Installation
) -> None:
    status, _, err = said(capsys, "release", "promote", "rel_1", "--without-evidence")
    assert status == 2
    assert "needs --reason" in err
    said(capsys, "release", "promote", "rel_1", "--without-evidence", "--reason", "seen", "--no-wait")
    said(capsys, "release", "promote", "rel_1", "--no-wait")
    first, second = here.records(COMMANDS, Command)
    assert first.arguments == {"release": "rel_1", "reason": "seen", "without_evidence": True}
    assert second.arguments == {"release": "rel_1"}


def test_dead_letters_are_listed_and_replayed(capsys: pytest.CaptureFixture[str], here: Installation) -> None:
    letter = DeadLetter(
        id="dl_1", handler="assemble", topic="events", partition=0, offset=3, record_key="k", value=b"bad",
        cause="ContractError: not an envelope", time=1.0,
    )  # fmt: skip
    here.log.append([NewRecord(DEAD_LETTERS.name, letter.key, wire.encode(letter))])
    assert "not an envelope" in said(capsys, "dead-letters", "list")[1]
    assert "1 records are in the log again" in said(capsys, "dead-letters", "replay")[1]
    assert sum(map(int, here.log.end_offsets(EVENTS.name))) == 1
    assert "Nothing to replay" in said(capsys, "dead-letters", "replay")[1]
    status, _, err = said(capsys, "dead-letters", "replay", "dl_2")
    assert status == 2
    assert "no dead letter dl_2" in err


def test_gold_is_added_imported_and_listed(
    capsys: pytest.CaptureFixture[str], here: Installation, tmp_path: Path
) -> None:
    status, out, _ = said(capsys, "gold", "add", "Where is my card?", "card_arrival", "--split", "gate")
    assert status == 0
    assert "1 for the gate" in out
    assert "The gate needs 50" in out
    file = tmp_path / "gold.csv"
    file.write_text("text,category,split\nlost it,card_lost,gate\nmy pin,pin,report\n")
    assert "2 added" in said(capsys, "gold", "import", str(file))[1]
    assert "3 items: 2 gate, 1 report" in said(capsys, "gold", "list")[1]
    assert said(capsys, "gold", "import", "none.csv")[0] == 2
    assert said(capsys, "gold", "add", " ", "x")[0] == 2


def test_sql_answers_and_refuses(capsys: pytest.CaptureFixture[str], here: Installation) -> None:
    assert "2 rows" in said(capsys, "sql", "select * from range(2) t(n)")[1]
    assert said(capsys, "sql", "--json", "select 1 as n")[1] == '{"n": 1}\n'
    assert said(capsys, "sql", "--csv", "select 1 as n")[1] == "n\n1\n"
    assert said(capsys, "sql", "select count(*) as n from turns", "--json")[1] == '{"n": 0}\n'
    status, _, err = said(capsys, "sql", "drop table turns")
    assert status == 2
    assert "Traceback" not in err


def test_sql_shows_times_as_dates_to_people_and_as_numbers_to_programs(
    capsys: pytest.CaptureFixture[str], here: Installation
) -> None:
    query = "select v::double as time, v::double as n from (values (1795461051.411), (null)) t(v)"
    out = said(capsys, "sql", query)[1]
    assert "2026-11-23T19:10:51.411Z" in out
    assert "1795461051.411" in out  # a number that may be anything: plain, not 1.795e+09
    assert said(capsys, "sql", "--json", query)[1].startswith('{"time": 1795461051.411, "n": 1795461051.411}')
    assert said(capsys, "sql", "--csv", query)[1].split()[1] == "1795461051.411,1795461051.411"
    assert "T" in said(capsys, "sql", query.replace("as time", "as 'max(started)'"))[1].splitlines()[2]
    assert "0.5" in said(capsys, "sql", "select 0.5::double as time")[1]  # seconds, not a moment
    assert said(capsys, "sql", "select 1 as time where false")[0] == 0


def test_a_policy_is_named_where_there_are_several(
    capsys: pytest.CaptureFixture[str], here: Installation, tmp_path: Path
) -> None:
    (tmp_path / "everloop.toml").write_text("[tenants.a.policies.x]\n[tenants.b.policies.x]\n[tenants.b.policies.y]\n")
    status, _, err = said(capsys, "release", "rollback", "--no-wait")
    assert status == 2
    assert "which policy? Name one of: a/x, b/x, b/y" in err
    assert said(capsys, "release", "rollback", "--policy", "b/x", "--no-wait")[0] == 0
    assert said(capsys, "release", "rollback", "--policy", "y", "--no-wait")[0] == 0
    assert "there is no policy 'z'" in said(capsys, "release", "rollback", "--policy", "z")[2]
    assert said(capsys, "pause", "--no-wait")[1].count("pause is ordered") == 3


def test_a_recipe_that_is_none_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "everloop.toml").write_text('[tenants.default.policies.assistant.train]\nrecipe = "nosuch"\n')
    status, _, problem = said(capsys, "up")
    assert status == 2
    assert "nosuch" in problem
    status, out, _ = said(capsys, "doctor")
    assert status == 1
    assert "default/assistant" in next(line for line in out.splitlines() if "nosuch" in line)


@pytest.mark.parametrize("words", [["up"], ["keys", "create"], ["kafka", "start"], ["demo"]])
def test_a_home_that_cannot_be_made_is_one_line_with_cause_and_mend(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]
) -> None:
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"
    status, _, err = said(capsys, *words, "--home", str(home))
    assert status > 0
    assert f"the home folder {home} cannot be made or written (Not a directory): choose another with --home" in err
    assert len(err.splitlines()) == 1


def test_doctor_tells_of_a_home_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERLOOP_HOME", "/proc/home")  # there even root makes nothing, which os.access does not know
    (wrong,) = (f for f in _findings(capsys) if f["what"].startswith("/proc cannot be written"))
    assert wrong["level"] == "wrong"
    assert "--home" in wrong["fix"]


def test_topics_of_an_embedded_log_are_refused_and_nothing_is_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, _, err = said(capsys, "topics", "check", "--log", "sqlite:///new/log.db")
    assert status == 2
    assert "sqlite:///new/log.db" in err
    assert "--log kafka://" in err
    assert list(tmp_path.iterdir()) == []


def test_doctor_names_the_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key in ("GATEWAY__PORT", "SERVING__PORT", "SERVICES__ASSEMBLER_PORT", "SERVICES__REWARD_PORT"):
        monkeypatch.setenv(f"EVERLOOP_{key}", "0")
    for key in ("LEARNER_PORT", "RELEASER_PORT"):
        monkeypatch.setenv(f"EVERLOOP_SERVICES__{key}", "0")
    found = _findings(capsys)
    assert {f["level"] for f in found} <= {"ok", "note"}
    monkeypatch.setenv("EVERLOOP_DATA", str(tmp_path / "gone"))
    monkeypatch.setattr("services.commands.doctor.ROOM", 10**18)
    monkeypatch.setattr("services.commands.doctor.PACKAGES", {"torch": "99.0", "not-a-package": "1.0"})
    wrong = {f["what"]: f["fix"] for f in _findings(capsys) if f["level"] == "wrong"}
    assert len(wrong) == 4
    assert wrong["not-a-package is not installed"] == "make install"
    (tmp_path / "everloop.toml").write_text("[gateway\n")
    status, out, _ = said(capsys, "doctor")
    assert status == 1
    assert "is not TOML" in out


def test_doctor_tells_which_everloop_holds_a_port(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said_there: dict[str, Any] = {"service": "gateway", "pid": 4711, "home": "/srv/other", "started": 1.0}

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(said_there).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("EVERLOOP_GATEWAY__PORT", str(server.server_port))
        (held,) = (f for f in _findings(capsys) if str(server.server_port) in f["what"])
        said_there.clear()
        (unknown,) = (f for f in _findings(capsys) if str(server.server_port) in f["what"])
        server.shutdown()
    assert "held by another Everloop, the gateway (process 4711) of /srv/other" in held["what"]
    assert "EVERLOOP_GATEWAY__PORT" in held["fix"]
    assert unknown["what"].endswith("of the gateway is in use")


def _findings(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return list(json.loads(said(capsys, "doctor", "--json")[1]))


def test_status_says_that_nothing_runs(capsys: pytest.CaptureFixture[str], here: Installation) -> None:
    status, out, _ = said(capsys, "status")
    assert status == 1
    assert "Nothing runs on" in out


def test_base_build_refuses_before_it_works(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EVERLOOP_CACHE", str(tmp_path / "cache"))
    assert "there is no file" in said(capsys, "base", "build", "mine", "--examples", "none.csv")[2]
    assert "is a path" in said(capsys, "base", "build", "../x", "--examples", "none.csv")[2]
    (tmp_path / "cache" / "bases" / "mine").mkdir(parents=True)
    assert "never changes under its name" in said(capsys, "base", "build", "mine", "--examples", "none.csv")[2]


def test_tables_are_as_wide_as_they_need() -> None:
    shown = table(["name", "n"], [["a", 1], ["bcd", 22.5]], width=80).splitlines()
    assert shown == ["name     n", "────  ────", "a        1", "bcd   22.5"]
    (_, _, *cells) = table(["n"], [[123456.5], [20000.0], [0.00001234], [0.123456]], width=80).splitlines()
    assert [cell.strip() for cell in cells] == ["123456.5", "20000", "1.234e-05", "0.1235"]
