"""The JSON Schemas in docs/schemas are those of the code."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from everloop.contract import Contract
from everloop.examples import EXAMPLES
from everloop.topics import TOPICS

from pipelines.schemas import FOLDER, main, schemas


def test_the_exported_schemas_are_those_of_the_contracts():
    exported = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    assert exported == schemas(), "the contracts changed: run python -m pipelines.schemas"


def test_every_topics_contract_has_one():
    assert set(schemas()) == {f"{topic.contract.__name__}.json" for topic in TOPICS.values()}


@pytest.mark.parametrize(
    "contract", dict.fromkeys(topic.contract for topic in TOPICS.values()), ids=lambda one: one.__name__
)
def test_each_has_worked_examples_that_are_of_it(contract):
    its = json.loads((FOLDER / f"{contract.__name__}.json").read_text())["examples"]
    assert its
    for example in its:
        assert contract.model_validate_json(json.dumps(example)).model_dump(mode="json") == example


def test_the_contracts_nested_in_them_have_one_too():
    shown = {type(part) for example in EXAMPLES.values() for part in parts(example)}
    defined = {name for content in schemas().values() for name in json.loads(content).get("$defs", {})}
    made = {one.__name__: one for one in every(Contract)}
    assert {name for name in defined if name in made} <= {one.__name__ for one in shown}


def parts(thing):
    """A contract and everything in it."""
    yield thing
    if isinstance(thing, Contract):
        thing = [value for _, value in thing]
    elif isinstance(thing, dict):
        thing = thing.values()
    if not isinstance(thing, str | bytes) and isinstance(thing, Iterable):
        for part in thing:
            yield from parts(part)


def every(kind):
    return [kind, *(one for each in kind.__subclasses__() for one in every(each))]


def test_writing_them_removes_what_is_no_contract_any_more(tmp_path, capsys):
    (tmp_path / "Gone.json").write_text("{}")
    assert main(tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(schemas())
    assert json.loads((tmp_path / "Event.json").read_text())["title"] == "Event"
