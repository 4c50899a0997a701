"""The desk's data: where it is found, how it is split, and what is said about files that are not fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from examples.bank_desk import builtin_desk
from examples.bank_desk.data import BANKING77, DataError, Desk, load, read_csv
from examples.bank_desk.demo import MOST_MEASURED

NOWHERE: dict[str, str] = {}


def texts(desk: Desk) -> list[set[str]]:
    return [{message.text for message in part} for part in (desk.prior, desk.stream, desk.gate, desk.report)]


def written(path: Path, *rows: str, columns: str = "text,category") -> Path:
    path.write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")
    return path


def many(path: Path, topics: int, each: int) -> Path:
    return written(path, *(f"message {i} about {t},topic_{t}" for t in range(topics) for i in range(each)))


def assert_apart(desk: Desk) -> None:
    parts = texts(desk)
    assert sum(map(len, parts)) == len(set().union(*parts))


def test_the_built_in_desk_is_always_there(tmp_path: Path) -> None:
    desk = load(None, tmp_path, 0, NOWHERE)
    assert (desk.name, len(desk.topics)) == ("built-in desk", 16)
    assert "curl -fL --create-dirs" in desk.note
    assert len(desk.prior) == 16 * 5
    assert len(desk.stream) > 2000
    assert min(len(desk.gate), len(desk.report)) > 200
    assert_apart(desk)
    assert desk == load(None, tmp_path, 0, NOWHERE)
    assert desk != load(None, tmp_path, 1, NOWHERE)


def test_the_built_in_topics_are_whole() -> None:
    assert all(len(set(phrasings)) == len(phrasings) >= 9 for phrasings in builtin_desk.PHRASINGS.values())


@pytest.mark.skipif(not os.environ.get("EVERLOOP_DATA"), reason="EVERLOOP_DATA is not set: banking77 was not read")
def test_banking77_is_split_as_promised(tmp_path: Path) -> None:
    desk = load(None, tmp_path, 0)
    assert desk.name == "banking77"
    assert (len(desk.topics), len(desk.prior)) == (77, 385)
    assert len(desk.stream) > 9500
    assert abs(len(desk.gate) - len(desk.report)) <= 77
    assert_apart(desk)


def test_a_wrong_download_is_refused(tmp_path: Path) -> None:
    for name in BANKING77:
        written(tmp_path / name, "hello,greeting").rename(_folder(tmp_path / "banking77") / name)
    with pytest.raises(DataError, match="SHA-256"):
        load(None, tmp_path, 0, NOWHERE)


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def test_a_teams_own_file_is_split_by_topic(tmp_path: Path) -> None:
    desk = load(many(tmp_path / "own.csv", 4, 100), tmp_path, 0, NOWHERE)
    assert (len(desk.topics), len(desk.prior), len(desk.stream)) == (4, 20, 280)
    assert {sum(m.topic == topic for m in (*desk.gate, *desk.report)) for topic in desk.topics} == {25}
    assert_apart(desk)


def test_every_part_of_what_is_held_out_is_of_all_topics(tmp_path: Path) -> None:
    desk = load(many(tmp_path / "own.csv", 60, 120), tmp_path, 0, NOWHERE)
    assert len(desk.report) > MOST_MEASURED
    for measured in (desk.report[:MOST_MEASURED], desk.report[-MOST_MEASURED:], desk.gate[:MOST_MEASURED]):
        assert {message.topic for message in measured} == set(desk.topics)


def test_a_split_column_is_kept(tmp_path: Path) -> None:
    rows = [f"train {i},t{i % 2},train" for i in range(100)]
    rows += [f"test {i},t{i % 2},TEST" for i in range(60)]
    rows += [f"gate {i},t{i % 2},gate" for i in range(20)]
    rows += [f"report {i},t{i % 2},report" for i in range(20)]
    rows += ["train 1,t1,report"]  # held out: gone from the stream
    desk = load(written(tmp_path / "own.csv", *rows, columns="text,category,split"), tmp_path, 0, NOWHERE)
    assert (len(desk.prior), len(desk.stream)) == (10, 89)
    assert sum(m.text.startswith("report") for m in desk.report) == 20
    assert not any(m.text.startswith("train") for m in desk.gate)
    assert_apart(desk)


@pytest.mark.parametrize(
    ("columns", "rows", "said"),
    [
        ("text,label", ["a,b"], "must name the columns text and category"),
        ("text,category", ["a,b", ",b", "c,"], "row 3: text is empty\n  row 4: category is empty"),
        ("text,category", ["a,b,c"], "row 2: has more columns"),
        ("text,category,split", ["a,b,dev"], "row 2: split 'dev' is not one of train, test, gate, report"),
        ("text,category", [f"a,{'x' * 101}"], "longer than 100"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, columns: str, rows: list[str], said: str) -> None:
    with pytest.raises(DataError) as error:
        read_csv(written(tmp_path / "own.csv", *rows, columns=columns))
    assert said in str(error.value)


def test_a_file_that_is_no_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("own.csv", "absent.csv", "."):
        with pytest.raises(DataError, match=r"CSV file in UTF-8|cannot be read"):
            read_csv(tmp_path / name)


@pytest.mark.parametrize(("topics", "each", "said"), [(1, 300, "1 topics"), (301, 8, "301 topics"), (3, 20, "leaves")])
def test_too_few_and_too_many_are_refused(tmp_path: Path, topics: int, each: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(many(tmp_path / "own.csv", topics, each), tmp_path, 0, NOWHERE)


def test_a_topic_that_training_never_shows_is_refused(tmp_path: Path) -> None:
    rows = [f"a {i},t{i % 2},train" for i in range(100)] + [f"b {i},other,test" for i in range(100)]
    with pytest.raises(DataError, match="never shows: other"):
        load(written(tmp_path / "own.csv", *rows, columns="text,category,split"), tmp_path, 0, NOWHERE)
