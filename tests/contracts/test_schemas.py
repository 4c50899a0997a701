"""The JSON Schemas in docs/schemas are those of the code."""

from __future__ import annotations

import json

from everloop.topics import TOPICS

from pipelines.schemas import FOLDER, main, schemas


def test_the_exported_schemas_are_those_of_the_contracts():
    exported = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    assert exported == schemas(), "the contracts changed: run python -m pipelines.schemas"


def test_every_topics_contract_has_one():
    assert set(schemas()) == {f"{topic.contract.__name__}.json" for topic in TOPICS.values()}


def test_writing_them_removes_what_is_no_contract_any_more(tmp_path, capsys):
    (tmp_path / "Gone.json").write_text("{}")
    assert main(tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(schemas())
    assert json.loads((tmp_path / "Event.json").read_text())["title"] == "Event"
