"""What benchmarks share: the table, the aims, the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

from benchmarks import learning
from benchmarks._report import aim, machine, parser, publish, table


def test_an_aim_is_met_on_its_own_side_and_never_by_what_is_no_number():
    assert aim("rate", 100, 100.0).met
    assert not aim("rate", 100, 99.9).met
    assert aim("seconds", 8, 7.9, most=True).met
    assert not aim("seconds", 8, 8.1, most=True).met
    assert not aim("seconds", 8, math.nan, most=True).met


def test_the_table_lines_up_and_shows_what_is_missing():
    assert table([{"what": "a", "n": 12000}, {"what": "long name", "n": 1.25, "ok": True}]).splitlines() == [
        "what            n  ok",
        "---------  ------  ---",
        "a          12,000  -",
        "long name    1.25  yes",
    ]


def test_the_file_has_rows_aims_and_the_machine(tmp_path):
    said = []
    rows = [{"n": 1, "worst": math.inf}]
    path = publish("x", rows, [aim("n", 2, 1)], notes=["why"], folder=tmp_path, say=said.append)
    result = json.loads(path.read_text())
    assert path.name == "x.json"
    assert (result["name"], result["quick"], result["notes"]) == ("x", False, ["why"])
    assert result["rows"] == [{"n": 1, "worst": None}]  # JSON has no infinity
    assert result["aims"] == [{"what": "n", "aim": 2, "got": 1, "met": False}]
    assert set(result["machine"]) == {"cpu", "cores", "memory_gib", "system", "python"} == set(machine())
    assert any("n: 2, got 1: missed" in line for line in said)


def test_what_is_not_whole_leaves_the_whole_result_alone(tmp_path):
    whole = publish("x", [{"n": 1}], folder=tmp_path, say=len)
    before = whole.read_text()
    quick = publish("x", [{"n": 2}], quick=True, folder=tmp_path, say=len)
    part = publish("x", [{"n": 3}], part=True, folder=tmp_path, say=len)
    assert whole.read_text() == before
    assert (quick.name, part.name) == ("x-quick.json", "x-part.json")
    ignored = (Path(__file__).parents[2] / ".gitignore").read_text().splitlines()
    assert {"benchmarks/results/*-quick.json", "benchmarks/results/*-part.json"} <= set(ignored)


def test_one_cell_is_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "CELLS", tmp_path / "learning")
    cell = {"before": 0.3, "cycles": [{"messages": 1000, "accuracy": 0.4, "seconds": 9.0}]}
    monkeypatch.setattr(learning, "run_cell", lambda *wanted: cell)
    said = {}
    monkeypatch.setattr(learning._report, "publish", lambda *given, **options: said.update(options))
    assert learning.main(["--cell", "main:0"]) == 0
    assert (said["part"], said["quick"]) == (True, False)


def test_every_benchmark_has_quick():
    assert parser("x").parse_args(["--quick"]).quick
    assert not parser("x").parse_args([]).quick
