"""Contracts on the wire: exact round trips, unknown fields kept, a newer and an older release side by side."""

from __future__ import annotations

import inspect
import math
import re
from array import array

import pytest
from everloop import episode, event, examples, feedback, release, run, score, trajectory, wire
from everloop.contract import Contract
from everloop.errors import ContractError
from everloop.event import CallTokens, Event, Message
from everloop.examples import NOON
from everloop.feedback import Feedback, Preference
from everloop.score import Score
from everloop.topics import TOPICS

EXAMPLES = {
    **examples.EXAMPLES,
    "dead letter of bytes": examples.EXAMPLES["dead letter"].model_copy(update={"value": b"\xff\x00"}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_wire_gives_back_what_it_was_given(name):
    example = EXAMPLES[name]
    assert wire.decode(type(example), wire.encode(example)) == example


@pytest.mark.parametrize(
    "name", sorted(EXAMPLES.keys() - {"dead letter of bytes"})
)  # whose value is any bytes: MessagePack alone
def test_json_gives_back_what_it_was_given(name):
    example = EXAMPLES[name]
    assert type(example).model_validate_json(example.model_dump_json()) == example


def test_every_topic_has_an_example():
    assert {type(example) for example in EXAMPLES.values()} == {topic.contract for topic in TOPICS.values()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_contract_is_frozen(name):
    with pytest.raises(ValueError, match="frozen"):
        EXAMPLES[name].schema_version = 2


def _seeded(fields):
    """The same fields as a newer release would write them: one more in every map that is a contract's."""
    if isinstance(fields, dict):
        return {**{key: _seeded(value) for key, value in fields.items()}, "from_the_future": {"deep": [1, None]}}
    return [_seeded(item) for item in fields] if isinstance(fields, list | tuple) else fields


FREE = {"metrics", "offsets", "uris", "headers"}  # maps whose values have one type, where a future field cannot be


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_older_release_keeps_what_a_newer_one_wrote(name):
    example = EXAMPLES[name]
    fields = example.model_dump()
    newer = {
        **_seeded({k: v for k, v in fields.items() if k not in FREE}),
        **{k: fields[k] for k in FREE & fields.keys()},
    }
    read = wire.decode(type(example), wire.seal(newer))
    assert wire.unseal(wire.encode(read)) == wire.unseal(wire.seal(newer))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_newer_release_reads_what_an_older_one_wrote(name):
    """Every field with a default may be missing: that is how fields are added."""
    example = EXAMPLES[name]
    needed = {key for key, field in type(example).model_fields.items() if field.is_required()}
    older = {key: value for key, value in example.model_dump().items() if key in needed}
    read = wire.decode(type(example), wire.seal(older))
    assert {key: getattr(read, key) for key in needed} == {key: getattr(example, key) for key in needed}
    missing = dict(list(older.items())[1:])
    with pytest.raises(ContractError, match="Field required"):
        wire.decode(type(example), wire.seal(missing))


def test_arrays_are_bytes_on_the_wire_and_arrays_in_memory():
    fields = wire.unseal(wire.encode(EXAMPLES["call"]))["payload"]["tokens"]
    assert fields["prompt"] == array("i", [1, 5]).tobytes()
    assert fields["logprobs"] == array("f", [-0.5, -0.25]).tobytes()
    back = wire.decode(Event, wire.encode(EXAMPLES["call"])).payload.tokens
    assert back.prompt == array("i", [1, 5])
    assert back.raw_logprobs == array("f", [-0.6, -0.3])


@pytest.mark.parametrize(
    ("contract", "fields", "said"),
    [
        (CallTokens, {"prompt": ["x"], "completion": [], "logprobs": []}, "int32 array"),
        (CallTokens, {"prompt": [2**40], "completion": [], "logprobs": []}, "int32 array"),
        (CallTokens, {"prompt": "12", "completion": [], "logprobs": []}, "takes an array, bytes or a list"),
        (Score, {"value": math.nan}, "finite number"),
        (Score, {"reward": 1.5}, "less than or equal to 1"),
        (Feedback, {"id": "f", "kind": "thumb", "value": 0.5, "time": NOON}, "use a rating"),
        (Feedback, {"id": "f", "kind": "rating", "value": math.inf, "time": NOON}, "finite number"),
        (Feedback, {"id": "f", "kind": "thumb", "value": 1, "time": math.nan}, "finite number of seconds"),
        (Feedback, {"id": "f", "kind": "correction", "time": NOON}, "needs text"),
        (Message, {"role": "alien"}, "Input should be"),
    ],
)
def test_values_that_are_none_are_refused_with_words(contract, fields, said):
    with pytest.raises(ContractError, match=said):
        wire.decode(contract, wire.seal(fields))


def _documented():
    """(name, code) of every example in a contract's docstring."""
    for module in (event, episode, feedback, trajectory, score, release, run):
        for name, made in inspect.getmembers(module, inspect.isclass):
            found = re.search(r"Example: ``(\w+\(.*?\))``", made.__doc__ or "", re.DOTALL)
            if found and made.__module__ == module.__name__:
                yield pytest.param(" ".join(found[1].split()), id=name)


@pytest.mark.parametrize("code", list(_documented()))
def test_examples_in_docstrings_are_true(code):
    names = {"CallTokens": CallTokens, "Feedback": Feedback, "Message": Message, "Preference": Preference}
    assert isinstance(eval(code, names), Contract)
