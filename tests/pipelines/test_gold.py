"""Gold items: idempotent, safe between writers, clear about bad rows."""

from __future__ import annotations

import json
import threading

import pytest
from everloop.episode import Split
from everloop.errors import ContractError
from everloop.event import Message

from pipelines.gold import Added, GoldItem, GoldSet


@pytest.fixture
def gold(tmp_path):
    return GoldSet(tmp_path / "gold")


def test_adding_twice_is_adding_once(gold):
    items = [GoldItem.of("Where is my card?", "card_arrival", split="gate"), GoldItem.of("Refund?", "refund")]
    assert gold.add("acme", "desk", items) == Added(2, 0)
    assert gold.add("acme", "desk", [*items, GoldItem.of("New?", "new")]) == Added(1, 2)
    assert [item.answer for item in gold.items("acme", "desk")] == ["card_arrival", "refund", "new"]
    assert gold.items("other", "desk") == []


def test_an_item_keeps_the_split_that_it_first_had(gold):
    gold.add("acme", "desk", [GoldItem.of("Where?", "a", split="gate")])
    gold.add("acme", "desk", [GoldItem.of("Where?", "a", split="report")])
    assert [item.split for item in gold.items("acme", "desk")] == ["gate"]
    assert gold.items("acme", "desk", "report") == []


def test_without_a_split_about_half_go_to_each_and_near_duplicates_together():
    items = [GoldItem.of("question " + "x" * n, "a") for n in range(400)]
    assert 150 < sum(item.split == "gate" for item in items) < 250
    for n in range(20):
        text = "question " + "x" * n
        assert GoldItem.of(text, "a").split == GoldItem.of(text.upper() + "!", "b").split


def test_keys_follow_the_file(gold):
    assert gold.keys("acme", "desk") == {}
    item = GoldItem.of("Where is my card?", "a", split="gate")
    gold.add("acme", "desk", [item])
    assert gold.keys("acme", "desk") == {item.key: Split.GATE}
    gold.add("acme", "desk", [GoldItem.of("Refund?", "b", split="report")])
    assert set(gold.keys("acme", "desk").values()) == {Split.GATE, Split.REPORT}


def test_a_line_that_a_crash_cut_short_is_dropped(gold):
    gold.add("acme", "desk", [GoldItem.of("one?", "1")])
    path = gold.path("acme", "desk")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    assert [item.answer for item in gold.items("acme", "desk")] == ["1"]
    gold.add("acme", "desk", [GoldItem.of("two?", "2")])
    assert [item.answer for item in gold.items("acme", "desk")] == ["1", "2"]


def test_a_broken_line_is_named(gold):
    gold.add("acme", "desk", [GoldItem.of("one?", "1")])
    with gold.path("acme", "desk").open("a") as file:
        file.write('{"id": "x"}\n')
    with pytest.raises(ContractError, match="line 2 is not a gold item"):
        gold.items("acme", "desk")


def test_writers_at_once_lose_nothing_and_double_nothing(gold):
    items = [GoldItem.of(f"question {'x' * n}", "a") for n in range(40)]
    start = threading.Barrier(8)

    def write(shift):
        start.wait()
        for item in items[shift:] + items[:shift]:
            GoldSet(gold.folder).add("acme", "desk", [item])

    threads = [threading.Thread(target=write, args=(n * 5,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(i.id for i in gold.items("acme", "desk")) == sorted(i.id for i in items)


def test_csv_and_json_lines_are_imported(gold, tmp_path):
    table = tmp_path / "gold.csv"
    table.write_text('\ufefftext,category,split\n"Where, please?",card,gate\nRefund?,refund,report\n', encoding="utf-8")
    assert gold.load("acme", "desk", table, system="You are a desk.") == Added(2, 0)
    first = gold.items("acme", "desk")[0]
    assert (first.answer, first.slice, first.split) == ("card", "card", "gate")
    assert [message.role for message in first.prompt] == ["system", "user"]
    lines = tmp_path / "gold.jsonl"
    rows = [
        {"prompt": [{"role": "user", "content": "Where\u2028now?"}], "answer": "x", "slice": "s", "split": "gate"},
        {"text": "plain?", "answer": "y"},
    ]
    lines.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert gold.load("acme", "desk", lines, split="report") == Added(2, 0)
    assert [item.split for item in gold.items("acme", "desk")] == ["gate", "report", "gate", "report"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("g.csv", "question,label\nx,y\n", "columns text and category; it has: label, question"),
        ("g.csv", "text,category,split\nx,y,gate\n,y,gate\nx,,gate\nx,y,test\n", "row 3: has no text"),
        ("g.csv", "text,category,split\nx,y,gate\nx,,gate\n", "row 3: the answer is empty"),
        ("g.csv", "text,category,split\nx,y,test\n", "row 2: split 'test' is not known; use gate or report"),
        ("g.csv", "text,category\n", "has no rows"),
        ("g.csv", b"text,category\n\xff\xfe,x\n", "not a CSV file in UTF-8"),
        ("g.jsonl", '{"text": "x", "answer": "y"}\n{broken\n', "row 2: is not JSON"),
        ("g.jsonl", "[1]\n", "row 1: is a list, not an object"),
        ("g.jsonl", '{"prompt": [{"role": "alien", "content": "x"}], "answer": "y"}\n', "row 1: role:"),
        ("g.jsonl", '{"prompt": [{"role": "system", "content": "x"}], "answer": "y"}\n', "no words of the user"),
        ("g.xlsx", "x", "from .csv or .jsonl"),
    ],
)
def test_a_bad_file_is_refused_whole_and_says_where(gold, tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ContractError) as raised:
        gold.load("acme", "desk", path)
    assert said in str(raised.value)
    assert gold.items("acme", "desk") == []


def test_an_item_needs_words_and_an_answer():
    with pytest.raises(ValueError, match="no words of the user"):
        GoldItem.of([Message(role="system", content="x")], "a")
    with pytest.raises(ValueError, match="answer is empty"):
        GoldItem.of("x?", " ")
