"""Assembly: one final state from events in any order; what joins, what waits, what is quarantined."""

from __future__ import annotations

import itertools
import math
from array import array
from pathlib import Path

import pytest
from everloop import wire
from everloop.config import Config
from everloop.episode import Episode, Split
from everloop.errors import ContractError
from everloop.event import CallTokens, Ended, Message, ToolResult
from everloop.home import Home
from everloop.trajectory import Trajectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.assemble import Assembler
from pipelines.gold import GoldItem, GoldSet

NO_HOME = Home(Path("/nonexistent"))


def run(make, emitted, batches, config=None, home=None):
    """The last Episode and Trajectory that come of batches of events, and how many versions there were."""
    assembler = Assembler(config or Config(), home or NO_HOME)
    state, offset, found = make.State(), 0, []
    for batch in batches:
        for event in batch:
            assert assembler.handle(state, make.record(event, offset), 0.0) == []
            offset += 1
        found += emitted(assembler.flush(state, 0.0))
    episodes = [one for one in found if isinstance(one, Episode)]
    trajectories = [one for one in found if isinstance(one, Trajectory)]
    return (episodes[-1] if episodes else None, trajectories[-1] if trajectories else None, len(episodes))


def story(make):
    """A whole episode: two calls and a tool, numbered; feedback that is early, revised, withdrawn; the end."""
    first = make.call("c1", tokens=CallTokens(prompt=[1, 5], completion=[7, 2], logprobs=[-0.5, -0.25]))
    second = make.call("c2", tokens=CallTokens(prompt=[1, 5, 7, 2, 9], completion=[4], logprobs=[-1.0]))
    return [
        make.event(first, seq=0, subject="sue"),
        make.event(ToolResult(id="t1", name="route", result="done", call="c1"), seq=1, time=1_763_900_000.5),
        make.event(second, seq=2, subject="sue", time=1_763_890_000.0),  # a clock that is far behind
        make.event(make.thumb(-1, "c1", id="f1", time=1_763_900_010.0)),
        make.event(make.thumb(1, "c1", id="f2", time=1_763_900_020.0)),
        make.event(make.thumb(1, None, id="f3", time=1_763_900_030.0, rater=None)),
        make.event(make.correction("card_lost", "c2", id="f4", time=1_763_900_040.0)),
        make.event(make.correction("x", "c1", id="f5", time=1_763_900_041.0, withdrawn=True)),
        make.event(Ended(events=3), "end"),
    ]


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_duplicates_and_batches_give_the_same_final_state(make, emitted, data):
    events = story(make)
    expected = run(make, emitted, [events])
    doubled = data.draw(st.lists(st.sampled_from(events), max_size=4))
    shuffled = data.draw(st.permutations(events + doubled))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(shuffled)), max_size=4)))
    bounds = [0, *cuts, len(shuffled)]
    batches = [shuffled[a:b] for a, b in itertools.pairwise(bounds)]
    got = run(make, emitted, batches)
    assert got[:2] == expected[:2]


def test_the_whole_story_is_what_was_said(make, emitted):
    episode, trajectory, versions = run(make, emitted, [story(make)])
    assert versions == 1
    assert [turn.call.id for turn in episode.turns] == ["c1", "c2"]
    assert [tool.id for tool in episode.turns[0].tools] == ["t1"]
    assert [word.id for word in episode.turns[0].feedback] == ["f2"]  # the newer thumb; the correction was withdrawn
    assert episode.turns[1].correction == "card_lost"
    assert [word.id for word in episode.feedback] == ["f3"]
    assert (episode.version, episode.complete, episode.subject) == (9, True, "sue")
    assert (episode.started, episode.updated) == (1_763_890_000.0, 1_763_900_000.5)
    assert all(turn.call.tokens is None for turn in episode.turns)
    (sequence,) = trajectory.sequences
    assert sequence.tokens == array("i", [1, 5, 7, 2, 9, 4])
    assert [(span.start, span.end, span.call) for span in sequence.spans] == [(2, 4, "c1"), (5, 6, "c2")]


def test_numbers_order_calls_and_the_log_orders_what_has_none(make, emitted):
    late, early = make.event(make.call("b"), seq=1), make.event(make.call("a"), seq=0)
    unnumbered = make.event(make.call("z"))
    episode, _, _ = run(make, emitted, [[late, early, unnumbered]])
    assert [turn.call.id for turn in episode.turns] == ["a", "z", "b"]  # z followed number 0 in the log
    episode, _, _ = run(make, emitted, [[unnumbered, make.event(make.call("y"))]])
    assert [turn.call.id for turn in episode.turns] == ["z", "y"]


def test_a_duplicate_makes_no_version_and_a_change_makes_one_a_batch(make, emitted):
    call = make.event(make.call())
    episode, _, versions = run(make, emitted, [[call], [call], [call, call]])
    assert (episode.version, versions) == (1, 1)
    thumbs = [make.event(make.thumb(1, "c1", id=f"f{n}", rater=f"r{n}")) for n in range(5)]
    episode, _, versions = run(make, emitted, [[call], thumbs])
    assert (episode.version, versions, len(episode.turns[0].feedback)) == (6, 2, 5)


def test_feedback_before_its_episode_waits_for_the_first_call(make, emitted):
    early = [make.event(make.thumb(1, "c1")), make.event(make.thumb(-1, None, id="whole"))]
    assert run(make, emitted, [early]) == (None, None, 0)
    episode, _, _ = run(make, emitted, [early, [make.event(make.call())]])
    assert [word.value for word in episode.turns[0].feedback] == [1]
    assert [word.value for word in episode.feedback] == [-1]


def test_complete_needs_the_end_and_every_number(make, emitted):
    first, second = make.event(make.call("a"), seq=0), make.event(make.call("b"), seq=1)
    end = make.event(Ended(events=2), "end")
    assert not run(make, emitted, [[first, second]])[0].complete
    assert not run(make, emitted, [[second, end]])[0].complete
    assert run(make, emitted, [[second, end], [first]])[0].complete
    assert run(make, emitted, [[second, make.event(Ended(), "end")]])[0].complete


def test_another_tenants_event_never_joins(make, emitted):
    mine = make.event(make.call())
    theirs = make.event(make.thumb(-1), tenant="other")
    episode, _, _ = run(make, emitted, [[mine, theirs]])
    assert episode.turns[0].feedback == ()
    forged = make.record(mine, 0)._replace(key="other/ep_1")
    with pytest.raises(ContractError, match="lies under the key other/ep_1"):
        Assembler(Config(), NO_HOME).handle(make.State(), forged, 0.0)


def test_an_episode_with_two_policies_is_one_of_each(loop, make):
    whole = make.event(make.thumb(1, None, id="whole"))
    clerks = make.event(make.thumb(-1, None, id="clerks", rater="carl"), policy="clerk")
    found = loop.take(make.event(make.call("a")), make.event(make.call("b"), policy="clerk"), whole, clerks)
    said = {one.policy: ([t.call.id for t in one.turns], [word.id for word in one.feedback]) for one in found}
    assert said == {"desk": (["a"], ["whole"]), "clerk": (["b"], ["clerks", "whole"])}


def test_tools_go_to_their_call_else_to_the_call_before(make, emitted):
    events = [
        make.event(make.call("a"), seq=0),
        make.event(make.call("b"), seq=1),
        make.event(ToolResult(id="t1", name="x", call="a"), seq=2),
        make.event(ToolResult(id="t2", name="x"), seq=3),
    ]
    episode, _, _ = run(make, emitted, [events])
    assert [[tool.id for tool in turn.tools] for turn in episode.turns] == [["t1"], ["t2"]]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"tokens": CallTokens(prompt=[1], completion=[2, 3], logprobs=[-1.0])}, "1 log-probabilities for 2"),
        ({"tokens": CallTokens(prompt=[1], completion=[2], logprobs=[math.nan])}, "not finite"),
        ({"tokens": CallTokens(prompt=[1], completion=[2], logprobs=[-math.inf])}, "not finite"),
        ({"tokens": CallTokens(prompt=[1], completion=[2], logprobs=[0.5])}, "above 0"),
        ({"tokens": CallTokens(prompt=[1], completion=[2], logprobs=[-1.0], checked=False)}, "counts do not agree"),
    ],
)
def test_what_cannot_be_trusted_is_quarantined_with_its_reason(make, emitted, fields, why):
    episode, trajectory, _ = run(make, emitted, [[make.event(make.call("a")), make.event(make.call("bad", **fields))]])
    assert "call bad" in episode.quarantine
    assert why in episode.quarantine
    assert not [s for one in trajectory.sequences for s in one.spans if s.call == "bad" and s.trainable]


def test_a_failed_call_is_left_out_alone(make, emitted):
    episode, trajectory, _ = run(
        make, emitted, [[make.event(make.call("a")), make.event(make.call("b", error="gone"))]]
    )
    assert episode.quarantine is None
    assert {s.call: s.trainable for one in trajectory.sequences for s in one.spans} == {"a": True, "b": False}


@pytest.mark.parametrize("moment", [math.nan, math.inf, -1.0])
def test_a_time_that_is_no_time_is_refused(make, moment):
    event = make.event(make.call(), time=moment)
    with pytest.raises(ContractError, match=r"has the time|not a Event"):
        Assembler(Config(), NO_HOME).handle(make.State(), make.record(event, 0), 0.0)


def test_bytes_that_are_no_event_are_refused(make):
    record = make.record(make.event(make.call()), 0)
    assembler = Assembler(Config(), NO_HOME)
    for value in (b"", b"\xc1garbage", wire.seal({"id": "x"}), None):
        with pytest.raises(ContractError):
            assembler.handle(make.State(), record._replace(value=value), 0.0)


def test_a_flush_that_failed_emits_everything_when_tried_again(make, emitted, home, monkeypatch):
    assembler, state = Assembler(Config(), home), make.State()
    assembler.handle(state, make.record(make.event(make.call()), 0), 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(wire, "encode", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
        with pytest.raises(OSError, match="no space"):
            assembler.flush(state, 0.0)
    assert len(emitted(assembler.flush(state, 0.0))) == 2


def test_state_outlives_the_process_and_a_body_in_the_blob_store(make, emitted, home):
    state = make.State()
    big = make.event(make.call(asked="word " * 100_000))
    record = make.record(big, 0)._replace(value=wire.encode(big, home.blobs))
    before = Assembler(Config(), home)
    before.handle(state, record, 0.0)
    before.flush(state, 0.0)
    after = Assembler(Config(), home)
    after.handle(state, make.record(make.event(make.thumb()), 1), 0.0)
    records = after.flush(state, 0.0)
    episode = wire.decode(Episode, records[0].value, home.blobs)
    assert (episode.version, episode.turns[0].feedback[0].value) == (2, 1)
    assert episode.turns[0].call.messages[0].text.startswith("word word")


def test_gold_near_duplicates_are_held_out_from_then_on(loop, make, home):
    assert loop.take(make.event(make.call()))[0].split is Split.TRAIN
    GoldSet(home.root / "gold").add("acme", "desk", [GoldItem.of("WHERE is my card", "card_arrival", split="report")])
    assert loop.take(make.event(make.thumb()))[0].split is Split.REPORT
    assert loop.take(make.event(make.call("d"), episode="ep_2", tenant="other"))[0].split is Split.TRAIN


def test_unknown_fields_of_a_newer_producer_survive(make, emitted):
    call = make.call(from_the_future={"a": [1]}, messages=(Message(role="user", content="x", mood="fine"),))
    episode, _, _ = run(make, emitted, [[make.event(call)]])
    assert episode.turns[0].call.model_extra == {"from_the_future": {"a": [1]}}
    assert episode.turns[0].call.messages[0].model_extra == {"mood": "fine"}
