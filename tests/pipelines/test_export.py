"""Exports: what they hold, that they are pinned, what is refused."""

from __future__ import annotations

import hashlib
import json

import pyarrow.parquet as pq
import pytest
from everloop.event import Message

from pipelines.export import ExportRefused, export
from pipelines.store import QueryRefused


@pytest.fixture
def filled(loop, make):
    events = [
        make.event(make.call("good"), episode="ep_1"),
        make.event(make.thumb(1, "good"), episode="ep_1"),
        make.event(make.call("fixed", answer="wrong"), episode="ep_2", time=1_763_900_100.0),
        make.event(make.correction("right", "fixed"), episode="ep_2"),
        make.event(make.call("bad"), episode="ep_3"),
        make.event(make.thumb(-1, "bad"), episode="ep_3"),
        make.event(make.call("made"), episode="ep_4", synthetic=True),
        make.event(make.call("others"), episode="ep_5", tenant="other"),
    ]
    loop.keep([make.score(one, turn.call.id) for one in loop.take(*events) for turn in one.turns])
    return loop.store


def test_a_data_set_is_parquet_chats_pairs_and_a_manifest(filled, tmp_path):
    folder = tmp_path / "set"
    manifest = export(filled, folder, tenant="acme", policy="desk", formats=("parquet", "sft", "preferences"))
    rows = {file["name"]: file["rows"] for file in manifest["files"]}
    assert rows == {
        "episodes.parquet": 3,
        "turns.parquet": 3,
        "trajectories.parquet": 3,
        "scores.parquet": 3,
        "feedback.parquet": 3,
        "preferences.parquet": 1,
        "sft.jsonl": 2,
        "preferences.jsonl": 1,
    }
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    for file in manifest["files"]:
        assert hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest() == file["sha256"]
    chats = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]
    assert [chat["completion"][0]["content"] for chat in chats] == ["card_arrival", "right"]
    assert chats[0]["prompt"] == [{"role": "user", "content": "Where is my card?"}]
    (pair,) = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("right", "wrong")
    assert pq.read_table(folder / "turns.parquet").num_rows == 3
    assert manifest["versions"]["Episode"] == 1


def test_a_tool_call_is_exported_as_one(loop, make, tmp_path):
    asked = {"id": "t", "type": "function", "function": {"name": "block", "arguments": "{}"}}
    output = Message(role="assistant", tool_calls=[asked])
    loop.take(
        make.event(make.call("good").model_copy(update={"output": output}), episode="ep_1"),
        make.event(make.thumb(1, "good"), episode="ep_1"),
        make.event(make.call("fixed").model_copy(update={"output": output}), episode="ep_2"),
        make.event(make.correction("right", "fixed"), episode="ep_2"),
    )
    export(loop.store, tmp_path / "set", tenant="acme", policy="desk", formats=("sft", "preferences"))
    good, fixed = [json.loads(line) for line in (tmp_path / "set" / "sft.jsonl").read_text().splitlines()]
    assert good["completion"] == [{"role": "assistant", "content": "", "tool_calls": [asked]}]
    assert fixed["completion"] == [{"role": "assistant", "content": "right"}]
    pair = json.loads((tmp_path / "set" / "preferences.jsonl").read_text())
    assert pair["rejected"] == [{"role": "assistant", "content": "", "tool_calls": [asked]}]
    assert loop.store.rows("SELECT rejected FROM preferences") == [{"rejected": "block({})"}]


def test_the_same_content_gives_the_same_hash_and_a_new_word_another(filled, loop, make, tmp_path):
    first = export(filled, tmp_path / "a", tenant="acme", policy="desk", formats=("parquet", "sft"))
    filled.compact(grace=0, min_files=2)
    assert export(filled, tmp_path / "b", tenant="acme", policy="desk", formats=("parquet", "sft")) == first
    loop.take(make.event(make.thumb(1, "bad", id="again", time=1_763_900_900.0), episode="ep_3"))
    third = export(filled, tmp_path / "c", tenant="acme", policy="desk", formats=("parquet", "sft"))
    assert third["hash"] != first["hash"]


def test_a_query_of_ones_own_is_pinned_too(filled, tmp_path):
    query = "SELECT call, thumb FROM turns WHERE thumb > 0"
    manifest = export(filled, tmp_path / "q", tenant="acme", policy="desk", query=query)
    assert [(file["name"], file["rows"], file["query"]) for file in manifest["files"]] == [("query.parquet", 1, query)]
    with pytest.raises(QueryRefused):
        export(filled, tmp_path / "w", tenant="acme", policy="desk", query="DROP VIEW turns")


def test_what_is_refused_says_why(filled, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ExportRefused, match="is not empty"):
        export(filled, tmp_path / "full", tenant="acme", policy="desk")
    with pytest.raises(ExportRefused, match="no format 'csv'; choose from: parquet, sft, preferences"):
        export(filled, tmp_path / "x", tenant="acme", policy="desk", formats=("csv",))


def test_an_unknown_policy_is_an_empty_set(filled, tmp_path):
    manifest = export(filled, tmp_path / "x", tenant="acme", policy="nobody", formats=("parquet", "sft"))
    assert {file["rows"] for file in manifest["files"]} == {0}
