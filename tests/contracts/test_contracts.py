"""Contracts on the wire: exact round trips, unknown fields kept, a newer and an older release side by side."""

from __future__ import annotations

import inspect
import math
import re
from array import array

import pytest
from everloop import episode, event, feedback, release, run, score, trajectory, wire
from everloop.contract import Contract
from everloop.episode import Episode, Turn
from everloop.errors import ContractError
from everloop.event import Call, CallTokens, Ended, Event, FeedbackGiven, Message, Sampling, ToolResult
from everloop.feedback import Feedback, Preference
from everloop.release import Adapter, CanaryPlan, Release, Route
from everloop.run import Command, DeadLetter, RewardVersion, Run
from everloop.score import Score
from everloop.topics import TOPICS
from everloop.trajectory import Sequence, Span, Trajectory

NOON = 1_763_900_000.0
OWNER = {"tenant": "acme", "policy": "desk"}

# The worked example of a call: what the gateway records of one answer.
CALL = Call(
    id="call_1",
    messages=(Message(role="system", content="You are a desk."), Message(role="user", content="Where is my card?")),
    output=Message(
        role="assistant",
        tool_calls=[{"id": "t1", "type": "function", "function": {"name": "route", "arguments": "{}"}}],
    ),
    tools=({"type": "function", "function": {"name": "route"}},),
    finish_reason="tool_calls",
    policy_version="9f2c",
    model="tiny-k2",
    sampling=Sampling(temperature=0.7, max_tokens=32, stop=("\n",)),
    tokens=CallTokens(prompt=[1, 5], completion=[7, 2], logprobs=[-0.5, -0.25], raw_logprobs=[-0.6, -0.3]),
    release="rel_1",
    arm="canary",
    probability=0.25,
    latency=0.125,
)
THUMB = Feedback(id="f1", kind="thumb", value=1, time=NOON, call="call_1", rater="r1")
TURN = Turn(call=CALL.model_copy(update={"tokens": None}), tools=(ToolResult(id="t", name="route"),), feedback=(THUMB,))
SPAN = Span(start=2, end=4, call="call_1", policy_version="9f2c", temperature=0.7)
EXAMPLES: dict[str, Contract] = {
    "call": Event(id="e1", episode="ep_1", subject="s1", seq=0, time=NOON, payload=CALL, **OWNER),
    "tool": Event(id="e2", episode="ep_1", time=NOON, payload=ToolResult(id="t", name="x", error=True), **OWNER),
    "feedback": Event(id="e3", episode="ep_1", time=NOON, payload=FeedbackGiven(feedback=THUMB), **OWNER),
    "end": Event(id="e4", episode="ep_1", time=NOON, payload=Ended(events=2), **OWNER),
    "episode": Episode(id="ep_1", version=3, started=NOON, updated=NOON, turns=(TURN,), feedback=(THUMB,), **OWNER),
    "trajectory": Trajectory(
        episode="ep_1",
        version=3,
        sequences=(Sequence(tokens=[1, 5, 7, 2], logprobs=[0, 0, -0.5, -0.25], spans=(SPAN,)),),
        **OWNER,
    ),
    "score": Score(
        episode="ep_1",
        version=3,
        call="call_1",
        reward_version="rv",
        value=0.75,
        spread=0.1,
        reward=0.5,
        time=NOON,
        **OWNER,
    ),
    "reward": RewardVersion(
        version="rv", path="rewards/acme/desk/rv", updates=7, offsets={"scores/0": 3}, time=NOON, **OWNER
    ),
    "run": Run(id="run_1", state="running", batch="b", parent="base", metrics={"kl": 0.5}, time=NOON, **OWNER),
    "adapter": Adapter(
        hash="9f2c",
        base="tiny-k2",
        run="run_1",
        batch="b",
        uri="models:/x/1",
        rank=8,
        targets=("q",),
        time=NOON,
        **OWNER,
    ),
    "release": Release(
        id="rel_1",
        adapter="9f2c",
        uri="models:/x/1",
        plan=CanaryPlan(),
        evidence={"gate": {"gain": 0.1}},
        time=NOON,
        **OWNER,
    ),
    "route": Route(epoch=2, live="9f2c", uris={"9f2c": "models:/x/1"}, time=NOON, **OWNER),
    "command": Command(id="c", kind="retrain", arguments={"seed": 3}, time=NOON, **OWNER),
    "dead letter": DeadLetter(
        id="d",
        handler="score",
        topic="episodes",
        partition=0,
        offset=3,
        record_key="k",
        value=b"\xff\x00",
        cause="x",
        time=NOON,
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_wire_gives_back_what_it_was_given(name):
    example = EXAMPLES[name]
    assert wire.decode(type(example), wire.encode(example)) == example


@pytest.mark.parametrize(
    "name", sorted(EXAMPLES.keys() - {"dead letter"})
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
