"""The handler "score": what is learned once, what crosses nobody, what a given-up batch leaves, what comes out."""

import json

import numpy as np
import ormsgpack
import pytest
from everloop import wire
from everloop.config import Config
from everloop.episode import Split
from everloop.errors import ContractError
from everloop.event import Call, Event, FeedbackGiven, Message
from everloop.feedback import Feedback
from everloop.log.base import Record
from everloop.run import RewardVersion
from everloop.score import Score
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.assemble import Assembler
from reward import durable, encoder
from reward.features import Example
from reward.handler import RewardHandler
from reward.model import RewardModel
from tests.reward.conftest import run


@pytest.fixture
def config(home):
    return Config.model_validate({"home": home.root, "tenants": {"default": {}, "other": {}}})


@pytest.fixture
def new_handler(config, home, words):
    return lambda: RewardHandler(config, home, lambda name: words)


@pytest.fixture
def minilm_like(tmp_path, words, monkeypatch):
    """An encoder over a folder, its network in place of weights: what it is of arithmetic is the real one."""
    folder = tmp_path / "folder"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 48}')
    monkeypatch.setattr(encoder.Encoder, "_through_network", lambda self, texts: words.encode(texts))
    return lambda: encoder.Encoder(str(folder))


def without_counts(state):
    """Entries that do not depend on how records fell into batches."""
    return {key: value for key, value in state.entries.items() if not key.endswith("/desk")}


def test_every_call_gets_a_score_by_a_version_that_is_there(new_handler, home, kit):
    outputs = run(new_handler(), kit.MemoryState(), kit.records(*kit.desk_traffic(120, every=2)))
    scores = kit.decoded(Score, outputs, "scores")
    versions = {one.version: one for one in kit.decoded(RewardVersion, outputs, "reward-versions")}
    assert len(scores) == 120
    assert {score.reward_version for score in scores} <= versions.keys()
    assert all((home.root / one.path / "model.json").exists() for one in versions.values())
    assert [one.updates for one in versions.values()] == [0, 50]
    rated = [score for score in scores if score.label is not None]
    assert len(rated) == 60
    assert all(score.source == "feedback" and score.predicted is not None for score in rated)
    silent = [score for score in scores if score.label is None]
    assert all(score.source == "model" and score.predicted is None for score in silent)
    assert not silent[0].mask, "nothing was learned yet"
    assert silent[-1].mask


def test_scores_name_the_snapshot_that_says_the_same_again(new_handler, home, words, kit):
    episodes = kit.desk_traffic(200, every=2)
    outputs = run(new_handler(), kit.MemoryState(), kit.records(*episodes))
    last = [score for score in kit.decoded(Score, outputs, "scores") if score.source == "model"][-1]
    model = RewardModel.load(home.root / "rewards/default/assistant" / last.reward_version, words)
    from reward.features import examples

    (example,) = next(examples(one) for one in episodes if one.id == last.episode)
    assert model.estimate([example])[0].value == pytest.approx(last.value, abs=1e-6)


def test_it_gets_better_with_feedback(new_handler, kit):
    handler = new_handler()
    run(handler, kit.MemoryState(), kit.records(*kit.desk_traffic(400)))
    status = handler.status()["default/assistant"]
    assert status["auc"] > 0.85
    assert status["calibration_error"] < 0.1
    assert (status["updates"], status["labels"]) == (400, 400)
    assert 0.1 < status["thumbs_up_share"] < 0.5


def test_the_same_record_twice_changes_nothing_twice(new_handler, kit):
    records = kit.records(*kit.desk_traffic(80))
    once, twice = kit.MemoryState(), kit.MemoryState()
    run(new_handler(), once, records)
    handler = new_handler()
    run(handler, twice, records)
    assert run(handler, twice, records) == []
    assert without_counts(twice) == without_counts(once)


def test_batches_do_not_matter(new_handler, kit):
    records = kit.records(*kit.desk_traffic(130))
    states = [kit.MemoryState() for _ in range(3)]
    outputs = [run(new_handler(), state, records, batch) for state, batch in zip(states, (500, 7, 1), strict=True)]
    assert without_counts(states[0]) == without_counts(states[1]) == without_counts(states[2])
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_restart_goes_on_where_the_state_is(new_handler, kit):
    records = kit.records(*kit.desk_traffic(130))
    whole, parts = kit.MemoryState(), kit.MemoryState()
    run(new_handler(), whole, records)
    for start in range(0, 130, 26):
        run(new_handler(), parts, records[start : start + 26])
    assert without_counts(whole) == without_counts(parts)


def test_a_state_of_a_later_release_is_taken_up(new_handler, kit):
    state, records = kit.MemoryState(), kit.records(*kit.desk_traffic(10))
    run(new_handler(), state, records)
    for key, held in state.entries.items():
        if key.startswith("episode/"):
            state.entries[key] = ormsgpack.packb([*ormsgpack.unpackb(held), {"more": 1}])
        if key.endswith("/desk"):
            desk = json.loads(held)
            state.entries[key] = json.dumps(desk | {"watch": desk["watch"] | {"more": [1.0]}, "more": 1}).encode()
    assert run(new_handler(), state, records) == []


def test_rebuilt_from_the_log_it_is_the_same_version(new_handler, home, kit):
    records = kit.records(*kit.desk_traffic(110))
    first, again = new_handler(), new_handler()
    run(first, kit.MemoryState(), records)
    run(again, kit.MemoryState(), records, batch=13)
    assert first.status() == again.status()


@pytest.mark.parametrize("failing", ["encode", "write", "commit"])
def test_a_batch_that_was_given_up_leaves_no_trace(new_handler, words, kit, monkeypatch, failing):
    records = kit.records(*kit.desk_traffic(90))
    undisturbed = kit.MemoryState()
    run(new_handler(), undisturbed, records, 30)

    handler, state = new_handler(), kit.MemoryState()
    run(handler, state, records[:30], 30)
    before = dict(state.entries)
    if failing == "commit":  # learned and flushed, but the log or the disk refused
        run(handler, state, records[30:60], 30)
    else:
        target, name = {"encode": (type(words), "encode"), "write": (kit.MemoryState, "put")}[failing]
        with monkeypatch.context() as patch:
            patch.setattr(target, name, lambda *args: (_ for _ in ()).throw(OSError("no")))
            with pytest.raises(OSError, match="no"):
                run(handler, state, records[30:60], 30)
    state.entries = before
    if failing == "commit":
        run(handler, state, records[30:60], 30)
    else:
        handler.flush(state, 0.0)  # the stream tries a failed flush again, with the records it has
    run(handler, state, records[60:], 30)
    assert state.entries == undisturbed.entries


def test_nothing_crosses_tenants_or_policies(new_handler, kit):
    traffic = kit.desk_traffic(60)
    others = [one.model_copy(update={"tenant": "other", "id": f"ep_o{one.id}"}) for one in traffic[:1]]
    state, handler = kit.MemoryState(), new_handler()
    outputs = run(handler, state, kit.records(*traffic, *others))
    assert handler.status()["default/assistant"]["updates"] == 60
    assert handler.status()["other/assistant"]["updates"] == 1
    alone = kit.MemoryState()
    run(new_handler(), alone, kit.records(*others, start=60))
    theirs = {key: value for key, value in state.entries.items() if "/other/" in key}
    assert theirs == {key: value for key, value in alone.entries.items() if "/other/" in key}
    assert {score.tenant for score in kit.decoded(Score, outputs, "scores")} == {"default", "other"}


@pytest.mark.parametrize(
    "kept", [{"split": Split.GATE}, {"split": Split.REPORT}, {"synthetic": True}, {"quarantine": "tokens"}]
)
def test_held_out_and_synthetic_episodes_teach_nothing(new_handler, kit, kept):
    handler = new_handler()
    traffic = [one.model_copy(update=kept) for one in kit.desk_traffic(10)]
    outputs = run(handler, kit.MemoryState(), kit.records(*traffic))
    scores = kit.decoded(Score, outputs, "scores")
    assert handler.status()["default/assistant"]["updates"] == 0
    assert len(scores) == 10
    assert all(score.predicted is None for score in scores)
    assert all(score.mask is False for score in scores) is ("quarantine" in kept)


def test_late_feedback_scores_its_call_again_and_no_other(new_handler, kit):
    handler, state = new_handler(), kit.MemoryState()
    turns = (("card please", "card desk"), ("loan please", "card desk"))
    run(handler, state, kit.records(kit.episode("e", *turns)))
    rated = kit.episode("e", *turns, feedback=[kit.thumb(-1)], about=1)
    (score,) = kit.decoded(Score, run(handler, state, kit.records(rated, start=1)), "scores")
    assert (score.call, score.version, score.label, score.source) == ("e-c1", 3, 0.0, "feedback")
    older = kit.episode("e", *turns)
    assert run(handler, state, kit.records(older, start=2)) == []


def test_revised_feedback_is_learned_and_the_first_expectation_stays(new_handler, kit):
    handler, state = new_handler(), kit.MemoryState()
    first = kit.episode("e", ("card", "loan desk"), feedback=[kit.thumb(1)], version=2)
    revised = kit.episode("e", ("card", "loan desk"), feedback=[kit.thumb(-1, "f2", 20.0)], version=3)
    (one,) = kit.decoded(Score, run(handler, state, kit.records(first)), "scores")
    (two,) = kit.decoded(Score, run(handler, state, kit.records(revised, start=1)), "scores")
    assert (one.label, two.label) == (1.0, 0.0)
    assert one.predicted == two.predicted
    assert two.reward < one.reward
    assert handler.status()["default/assistant"]["updates"] == 2


@pytest.mark.parametrize("about", ["call", "whole"])
@pytest.mark.parametrize(
    ("changes", "last"), [((1, -1, 1), 1), ((-1, 1, -1), -1), ((1, -1, 1, -1), -1), ((1, None), None)]
)
def test_a_word_that_is_changed_to_and_fro_leaves_what_the_last_one_leaves(new_handler, kit, about, changes, last):
    """None: withdrawn. What is summed is the same; the heads' steps cannot be undone, and point the right way."""
    turns = (("card please", "card desk"), ("loan now", "loan desk"))

    def taught(*values):
        handler, state = new_handler(), kit.MemoryState()
        run(handler, state, kit.records(*kit.desk_traffic(40)))
        for number, value in enumerate(values):
            words = () if value is None else (kit.thumb(value, f"w{number}", float(number)),)
            said = {"feedback": words} if about == "call" else {}
            one = kit.episode("e", *turns, version=number + 1, **said)
            if about == "whole":
                one = one.model_copy(update={"feedback": words})
            run(handler, state, kit.records(one, start=40 + number))
        return handler._desks["default", "assistant"].live

    there, straight, against = taught(*changes), taught(*() if last is None else (last,)), taught(-(last or 1))
    assert there.seen == straight.seen
    assert there.prototypes.rows == straight.prototypes.rows or last is None
    for name in ("good", "bad", "counts", "totals"):
        ours, theirs = getattr(there.prototypes, name), getattr(straight.prototypes, name)
        np.testing.assert_allclose(ours, theirs, atol=0.06)
    assert sum(there.reservoir.lesson(slot).weight for slot in range(len(there.reservoir))) == pytest.approx(
        sum(straight.reservoir.lesson(slot).weight for slot in range(len(straight.reservoir)))
    )
    if last is not None:
        value, expected, other = (m.estimate([Example(*turns[1])])[0].value for m in (there, straight, against))
        way = (value - other) / (expected - other)
        assert 0.3 < way < 1.7, "from what the opposite leaves to what the last one alone leaves"


def test_what_is_no_episode_is_refused_at_once(new_handler, kit):
    (record,) = kit.records(kit.episode("e", ("a", "b")))
    for broken in (record._replace(value=b"nonsense"), record._replace(value=None), record._replace(key="default/x")):
        with pytest.raises(ContractError):
            new_handler().handle(kit.MemoryState(), broken, 0.0)


def test_a_changed_ensemble_is_refused_and_deletes_nothing(home, words, kit):
    def handler(heads):
        policies = {"assistant": {"reward": {"heads": heads}}}
        config = Config.model_validate({"home": home.root, "tenants": {"default": {"policies": policies}}})
        return RewardHandler(config, home, lambda name: words)

    state, records = kit.MemoryState(), kit.records(*kit.desk_traffic(70))
    run(handler(5), state, records[:60])
    before = dict(state.entries)
    with pytest.raises(ContractError, match=r"default/assistant: .*nothing was deleted.*Set .*back"):
        run(handler(3), state, records[60:])
    assert state.entries == before
    run(back := handler(5), state, records[60:])
    assert back.status()["default/assistant"]["updates"] == 70


def test_a_state_of_another_release_is_told_as_such_whatever_its_guard_looks_like(new_handler, kit, monkeypatch):
    state, records = kit.MemoryState(), kit.records(*kit.desk_traffic(40))
    run(new_handler(), state, records[:30])
    state.put("model/default/assistant/guard/core", ormsgpack.packb([30, {}]))
    monkeypatch.setattr(durable, "FORMAT", durable.FORMAT + 1)
    with pytest.raises(ContractError, match=r"default/assistant: .*nothing was deleted.*delete its state"):
        run(new_handler(), state, records[30:])


def test_what_was_learned_goes_on_where_the_processor_reckons_otherwise(home, kit, minilm_like, monkeypatch):
    """bfloat16 is for processors that have it: a state that comes from one goes on in bfloat16 on any other."""

    def handler(arithmetic):
        monkeypatch.setattr(encoder, "precision", lambda: arithmetic)
        ours = minilm_like()
        return RewardHandler(Config(home=home.root), home, lambda name: ours)

    state, records = kit.MemoryState(), kit.records(*kit.desk_traffic(70))
    outputs = run(handler("bfloat16"), state, records[:60])
    run(later := handler("float32"), state, records[60:])
    status = later.status()["default/assistant"]
    assert status["updates"] == 70
    newest = kit.decoded(RewardVersion, outputs, "reward-versions")[-1]
    monkeypatch.setattr(encoder, "precision", lambda: "float32")
    loaded = RewardModel.load(home.root / newest.path, minilm_like())
    assert loaded.encoder.arithmetic == "bfloat16"


def test_while_drift_freezes_opinions_what_is_worth_nothing_is_still_scored_so(new_handler, kit):
    handler, state = new_handler(), kit.MemoryState()
    run(handler, state, kit.records(*kit.desk_traffic(70)))
    desk = handler._desks["default", "assistant"]
    desk.live.frozen_until = desk.live.updates + 100
    said, empty = desk.estimate([Example("card please", "card desk"), Example("card please", "")])
    assert not said.mask
    assert empty.mask
    assert empty.reward == pytest.approx(-1)


def test_whatever_is_said_anew_of_a_call_is_scored_anew(new_handler, kit):
    handler, state = new_handler(), kit.MemoryState()
    run(handler, state, kit.records(*kit.desk_traffic(70)))
    words = [
        kit.thumb(1, "t"),
        Feedback(id="j", kind="implicit", value=0.0, time=11.0, source="judge:clear", name="clear"),
    ]
    found = []
    for number in (1, 2, 2):
        one = kit.episode("e", ("card please", "card desk"), feedback=words[:number], version=number + len(found))
        found.append(len(kit.decoded(Score, run(handler, state, kit.records(one, start=70 + len(found))), "scores")))
    assert found == [1, 1, 0]


def test_a_vanished_snapshot_is_made_anew(new_handler, home, kit):
    state, records = kit.MemoryState(), kit.records(*kit.desk_traffic(70))
    run(new_handler(), state, records[:60])
    for folder in (home.root / "rewards/default/assistant").iterdir():
        folder.rename(home.root / folder.name)
    outputs = run(new_handler(), state, records[60:])
    announced = [one.version for one in kit.decoded(RewardVersion, outputs, "reward-versions")]
    assert len(announced) == 1
    assert {score.reward_version for score in kit.decoded(Score, outputs, "scores")} == set(announced)


ASKED = {"a": "card please", "b": "loan please"}
WORDS = (
    Feedback(id="f1", kind="thumb", value=1, time=1.0, call="a", rater="r"),
    Feedback(id="f2", kind="thumb", value=-1, time=2.0, call="a", rater="r"),
    Feedback(id="f2", kind="thumb", value=-1, time=2.0, call="a", rater="r"),
    Feedback(id="f3", kind="correction", text="loan desk", time=3.0, call="b", rater="r"),
    Feedback(id="f4", kind="rating", value=0.8, time=4.0, call="b", rater="q"),
    Feedback(id="f5", kind="outcome", value=0.0, time=5.0),
    Feedback(id="f6", kind="rating", value=0.2, time=6.0, call="b", rater="p"),
    Feedback(id="f6b", kind="rating", time=7.0, call="b", rater="p", withdrawn=True),
)


def events():
    about = {"tenant": "default", "policy": "assistant", "episode": "ep"}
    for seq, (name, asked) in enumerate(ASKED.items()):
        said = Message(role="assistant", content="card desk")
        call = Call(id=name, messages=(Message(role="user", content=asked),), output=said)
        yield Event(id=f"call-{name}", seq=seq, time=1.0, payload=call, **about)
    for number, word in enumerate(WORDS):
        yield Event(id=f"{word.id}-{number}", time=2.0, payload=FeedbackGiven(feedback=word), **about)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(len(ASKED) + len(WORDS))), batch=st.integers(1, 10))
def test_every_order_of_feedback_ends_with_the_same_labels(new_handler, config, home, kit, order, batch):
    """Through assembly: late, twice, revised, withdrawn, before its call."""
    assembler, handler = Assembler(config, home), new_handler()
    state, assembled = kit.MemoryState(), kit.MemoryState()
    arrived = [list(events())[i] for i in order]
    incoming = [Record("events", 0, i, one.key, wire.encode(one), {}, one.time) for i, one in enumerate(arrived)]
    made = [one for one in run(assembler, assembled, incoming, batch) if one.topic == "episodes"]
    records = [Record("episodes", 0, i, one.key, one.value, one.headers, one.time) for i, one in enumerate(made)]
    scores = kit.decoded(Score, run(handler, state, records, batch), "scores")
    newest = {score.call: score for score in scores}
    assert {call: (s.label, s.source) for call, s in newest.items()} == {"a": (0.0, "feedback"), "b": (0.0, "outcome")}
    assert newest["b"].value == 0.0
    assert np.isfinite(newest["a"].predicted)
