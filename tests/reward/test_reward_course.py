"""How an episode will end: learned from what it came to, foretold at each of its turns, and taken back."""

import numpy as np
import pytest
from everloop.config import Config, RewardConfig
from everloop.episode import Split
from everloop.feedback import Feedback
from everloop.score import Score

from reward import course, durable, snapshot
from reward.calibration import auc
from reward.features import examples
from reward.handler import RewardHandler
from reward.model import RewardModel
from reward.poison import name_of
from tests.reward.conftest import run
from trainer import advantages

OPENINGS = ("card lost abroad", "loan for house", "rate of exchange", "pin was blocked")
GOOD, BAD = "look up the account first", "guess without looking"


def outcome(value, name="o", time=20.0):
    return Feedback(id=name, kind="outcome", value=value, time=time)


def planted(kit, number, said=None, **fields):
    """Three turns, of which the second decides; ``said``: the words about the whole, its outcome if None."""
    good = number % 2 == 0
    turns = (
        (f"{OPENINGS[number // 2 % 4]} please", "how can i help"),
        (f"{OPENINGS[number // 2 % 4]} and now", GOOD if good else BAD),
        ("thanks anyway", "glad it worked" if good else "sorry for that"),
    )
    made = kit.episode(f"ep_{number}", *turns, **{"version": 10, "updated": float(number), **fields})
    return made.model_copy(update={"feedback": (outcome(float(good)),) if said is None else said})


@pytest.fixture
def new_handler(home, words):
    config = Config.model_validate({"home": home.root, "tenants": {"default": {}}})
    return lambda: RewardHandler(config, home, lambda name: words)


def live(handler):
    return handler._desks["default", "assistant"].live


def weights(model):
    return [model.values.reservoir.lesson(slot).weight for slot in range(len(model.values.reservoir))]


def state_of(model):
    """Everything that is learned of courses, as it is written: with nothing written yet, all of it is."""
    model.values.touched = True
    model.values.changed = set(range(len(model.values.reservoir)))
    return {name: piece for name, piece in durable.changes(model) if name.startswith("value")}


def foretold(model, episode):
    return course.foretold(model, episode, examples(episode), range(len(episode.turns)))


def test_the_turn_that_decides_is_the_one_at_which_the_value_moves(new_handler, kit):
    outputs = run(handler := new_handler(), kit.MemoryState(), kit.records(*(planted(kit, i) for i in range(160))))
    for number in (200, 201):
        (one, two, _) = foretold(live(handler), planted(kit, number))
        moves = [one[1] - one[0], two[1] - two[0]]
        way = 1 if number % 2 == 0 else -1
        assert abs(moves[0]) < 0.1, "nobody can know it yet"
        assert way * moves[1] > 0.25
        line, most = course.told(
            [(turn + 1, *both) for turn, both in enumerate(foretold(live(handler), planted(kit, number)))]
        )
        assert line.startswith(
            f"P(ends well), as each turn came: {one[0]:.2f} before turn 1; after turn 1: {one[1]:.2f}, 2: "
        )
        assert most.startswith(f"it {'rose' if way > 0 else 'fell'} most with turn 2, by 0.")
    scores = kit.decoded(Score, outputs, "scores")
    assert scores[0].ends_well_before is None, "nothing was learned yet"
    late = [score for score in scores[-90:] if score.call.endswith("-c1")]
    ends = np.array([float(int(score.episode[3:]) % 2 == 0) for score in late])
    assert auc(np.array([score.ends_well_after for score in late]), ends) == 1.0
    assert auc(np.array([score.ends_well_before for score in late]), ends) < 0.75


def with_its_past(episode):
    """Each prompt with the exchanges before it, as an agent sends them."""
    past, turns = (), []
    for turn in episode.turns:
        asked = (*past, *turn.call.messages)
        turns.append(turn.model_copy(update={"call": turn.call.model_copy(update={"messages": asked})}))
        past = (*asked, turn.call.output)
    return episode.model_copy(update={"turns": tuple(turns)})


def test_by_learned_values_credit_lands_on_the_turn_that_decided(new_handler, kit):
    """The trainer sees one outcome at the end; without values every turn would get about the same of it."""
    traffic = [with_its_past(planted(kit, i)) for i in range(240)]
    scores = kit.decoded(Score, run(new_handler(), kit.MemoryState(), kit.records(*traffic)), "scores")
    for name in ("ep_238", "ep_239"):
        before = [score.ends_well_before for score in scores if score.episode == name]
        end = 1.0 if name == "ep_238" else -1.0
        rewards = advantages.shaped(np.array([0.0, 0.0, end]), 2 * np.array(before) - 1, 1.0)
        credit = advantages.gae(rewards, np.zeros(3), discount=1.0, trace=0.5).advantages
        assert np.argmax(end * credit) == 1


def test_what_is_foretold_of_an_end_was_not_learned_from_it(new_handler, kit):
    """An episode that comes with its end at once is foretold as one whose end nobody knows."""
    traffic = kit.records(*(planted(kit, i) for i in range(120)))
    found = []
    for said in ((outcome(0.0),), (outcome(1.0),), ()):
        handler, state = new_handler(), kit.MemoryState()
        run(handler, state, traffic)
        its = kit.decoded(Score, run(handler, state, kit.records(planted(kit, 150, said), start=120)), "scores")
        found.append([(one.ends_well_before, one.ends_well_after) for one in its])
    assert None not in found[0][0]
    assert found[0] == found[1] == found[2]


def test_a_score_keeps_what_was_foretold_when_its_call_was_new(new_handler, kit):
    handler, state = new_handler(), kit.MemoryState()
    run(handler, state, kit.records(*(planted(kit, i) for i in range(120))))
    first = kit.decoded(Score, run(handler, state, kit.records(planted(kit, 150, ()), start=120)), "scores")
    run(handler, state, kit.records(*(planted(kit, i) for i in range(151, 180)), start=121))
    later = planted(kit, 150, (outcome(0.0),), version=11)
    (again,) = kit.decoded(Score, run(handler, state, kit.records(later, start=150)), "scores")
    assert again.label == 0.0
    assert (again.ends_well_before, again.ends_well_after) == (first[2].ends_well_before, first[2].ends_well_after)


def test_a_restart_and_other_batches_end_with_the_same_bits(new_handler, kit):
    records = kit.records(*(planted(kit, i) for i in range(60)))
    whole, parts = new_handler(), None
    run(whole, kit.MemoryState(), records)
    state = kit.MemoryState()
    for start in range(0, 60, 13):
        run(parts := new_handler(), state, records[start : start + 13], batch=7)
    assert whole.status() == parts.status()
    assert len(state_of(live(whole))) == 1 + 60 * 6
    assert state_of(live(whole)) == state_of(live(parts))
    assert snapshot.version_of(live(whole)) == snapshot.version_of(live(parts))


def test_a_snapshot_foretells_the_same_and_its_version_is_of_the_values_too(new_handler, words, kit, tmp_path):
    run(handler := new_handler(), kit.MemoryState(), kit.records(*(planted(kit, i) for i in range(60))))
    model = live(handler)
    version = model.save(tmp_path)
    loaded = RewardModel.load(tmp_path / version, words)
    assert foretold(loaded, planted(kit, 61)) == foretold(model, planted(kit, 61)) != [None] * 3
    model.values.heads.shared += np.float32(1e-3)
    assert snapshot.version_of(model) != version


@pytest.mark.parametrize(
    ("said", "ended", "lessons"),
    [
        ([(outcome(1.0),), (outcome(0.0, "o", 30.0),)], [1, 0], 6),
        ([(outcome(1.0),), ()], [0, 0], 0),
        ([(outcome(1.0),), (), (outcome(1.0),)], [0, 1], 6),
    ],
)
def test_an_end_that_is_revised_or_withdrawn_is_taken_back(new_handler, kit, said, ended, lessons):
    handler, state = new_handler(), kit.MemoryState()
    for number, words in enumerate(said):
        run(handler, state, kit.records(planted(kit, 0, words, version=10 + number), start=number))
    assert live(handler).values.ended == ended
    assert sum(weight > 0 for weight in weights(live(handler))) == lessons
    last = {live(handler).values.reservoir.lesson(slot).label for slot, w in enumerate(weights(live(handler))) if w}
    assert not lessons or float(ended[1]) in last


def test_a_revised_end_is_stepped_against(new_handler, kit):
    handler, state = new_handler(), kit.MemoryState()
    traffic = [planted(kit, i) for i in range(60)]
    run(handler, state, kit.records(*traffic))
    before = foretold(live(handler), traffic[0])[1][1]
    revised = [planted(kit, i, (outcome(0.0, "p", 30.0),), version=11) for i in range(0, 48, 2)]
    run(handler, state, kit.records(*revised, start=60))
    assert foretold(live(handler), traffic[0])[1][1] < before - 0.2
    assert live(handler).values.ended == [54, 6]


def test_a_course_that_goes_on_teaches_its_new_turns_alone_and_a_withdrawn_word_its_own_back(new_handler, kit):
    turns = [("card lost", "how can i help"), ("and now", GOOD), ("again", GOOD)]
    up = [kit.thumb(1, f"t{i}") for i in range(3)]

    def said(count, *about):
        made = kit.episode("e", *turns[:count], version=10 * count + len(about))
        its = [
            turn.model_copy(update={"feedback": (up[i],) if i in about else ()}) for i, turn in enumerate(made.turns)
        ]
        return made.model_copy(update={"turns": tuple(its)})

    handler, state = new_handler(), kit.MemoryState()
    run(handler, state, kit.records(said(2, 1)))
    assert [live(handler).values.reservoir.count, live(handler).values.ended] == [4, [0, 1]]
    run(handler, state, kit.records(said(3, 1, 2), start=1))
    assert [live(handler).values.reservoir.count, live(handler).values.ended] == [6, [0, 1]]
    run(handler, state, kit.records(said(3, 1).model_copy(update={"version": 50}), start=2))
    assert [weight > 0 for weight in weights(live(handler))] == [True] * 4 + [False] * 2


def test_an_end_that_only_somebody_said_who_is_heard_no_more_is_taken_back(home, words, kit):
    def handler(**reward):
        tenants = {"default": {"policies": {"assistant": {"reward": reward}}}}
        return RewardHandler(Config.model_validate({"home": home.root, "tenants": tenants}), home, lambda name: words)

    def thumbed(number):
        made = planted(kit, number, (), version=20)
        said = kit.thumb(1 if number % 2 == 0 else -1, f"t{number}", 60.0 * number, rater=f"r{number}")
        last = made.turns[-1].model_copy(update={"feedback": (said,)})
        return made.model_copy(update={"turns": (*made.turns[:-1], last)})

    state, traffic = kit.MemoryState(), [thumbed(i) for i in range(60)]
    run(handler(), state, kit.records(*traffic))
    heard_less = handler(distrusted=[name_of("rater", "r51")])
    (score,) = kit.decoded(Score, heard_less.flush(state, 0.0), "scores")
    assert (score.episode, score.ends_well_after is not None) == ("ep_51", True)
    assert live(heard_less).values.ended == [29, 30]
    assert weights(live(heard_less))[51 * 6 : 52 * 6] == [0.0] * 6
    assert sum(weight > 0 for weight in weights(live(heard_less))) == 59 * 6
    again = thumbed(51)
    measured = again.model_copy(update={"version": 30, "feedback": (outcome(1.0),)})
    run(heard_less, state, kit.records(measured, start=60))
    assert live(heard_less).values.ended == [29, 31], "what was measured stands"


def test_an_outcome_decides_what_a_later_thumb_says_otherwise_of(new_handler, kit):
    made = planted(kit, 0, ())
    measured = made.turns[1].model_copy(update={"feedback": (outcome(1.0),)})
    thumbed = made.turns[2].model_copy(update={"feedback": (kit.thumb(-1),)})
    one = made.model_copy(update={"turns": (made.turns[0], measured, thumbed)})
    run(handler := new_handler(), kit.MemoryState(), kit.records(one))
    assert live(handler).values.ended == [0, 1]
    assert live(handler).values.reservoir.count == 4, "what came after its outcome did not lead there"


@pytest.mark.parametrize("kept", [{"split": Split.GATE}, {"synthetic": True}, {"quarantine": "tokens"}])
def test_held_out_and_synthetic_courses_teach_nothing(new_handler, kit, kept):
    run(handler := new_handler(), kit.MemoryState(), kit.records(planted(kit, 0).model_copy(update=kept)))
    assert not live(handler).values.begun
    assert live(handler).values.ended == [0, 0]


def test_an_episode_that_is_quarantined_later_is_taken_back(new_handler, kit):
    handler, state = new_handler(), kit.MemoryState()
    run(handler, state, kit.records(planted(kit, 0)))
    run(handler, state, kit.records(planted(kit, 0, version=11, quarantine="tokens"), start=1))
    assert live(handler).values.ended == [0, 0]
    assert weights(live(handler)) == [0.0] * 6


def test_a_policy_of_single_answers_is_scored_as_without_courses(new_handler, kit, monkeypatch):
    traffic = kit.records(*kit.desk_traffic(120, every=2))
    state, bare = kit.MemoryState(), kit.MemoryState()
    outputs = run(new_handler(), state, traffic)
    with monkeypatch.context() as without:
        without.setattr(course, "learn", lambda *args, **options: None)
        without.setattr(course, "foretold", lambda model, episode, its, turns: [None] * len(turns))
        same = run(new_handler(), bare, traffic)
    assert outputs == same
    assert state.entries == bare.entries
    assert not [key for key in state.entries if "/value" in key]
    assert all(score.ends_well_before is None for score in kit.decoded(Score, outputs, "scores"))


def test_courses_leave_what_labels_teach_as_it_was(new_handler, kit, monkeypatch):
    """The heads of success see the same labels in the same order: an opinion does not depend on values."""
    traffic = kit.records(*(planted(kit, i) for i in range(80)))
    with_values = new_handler()
    run(with_values, kit.MemoryState(), traffic)
    monkeypatch.setattr(course, "learn", lambda *args, **options: None)
    run(without := new_handler(), kit.MemoryState(), traffic)
    assert not live(without).values.begun
    for name, array in live(with_values).heads.arrays().items():
        assert array.tobytes() == live(without).heads.arrays()[name].tobytes()


def test_answers_beside_each_other_are_one_moment_and_failed_calls_none(new_handler, kit):
    made = planted(kit, 0)
    first, second, third = made.turns
    beside = second.model_copy(update={"call": second.call.model_copy(update={"id": "beside", "choice": 1})})
    failed = third.model_copy(update={"call": third.call.model_copy(update={"id": "failed", "error": "no"})})
    one = made.model_copy(update={"turns": (first, second, beside, failed, third)})
    run(handler := new_handler(), kit.MemoryState(), kit.records(one))
    assert live(handler).values.reservoir.count == 6


def test_a_long_course_teaches_a_bounded_number_of_turns(new_handler, kit):
    turns = [(f"{OPENINGS[i % 4]} {i}", GOOD) for i in range(100)]
    one = kit.episode("long", *turns).model_copy(update={"feedback": (outcome(1.0),)})
    run(handler := new_handler(), kit.MemoryState(), kit.records(one))
    assert live(handler).values.reservoir.count == 2 * course.MOST


def test_what_is_not_finite_teaches_nothing_and_is_never_said(words, kit):
    model = RewardModel(RewardConfig(), words)
    one = planted(kit, 0)
    its = examples(one)
    calls = {one.turns[2].call.id: {"taught": {f"{one.turns[2].call.id}=1!": [1.0, float("nan"), 0.0, 0]}}}
    known = {}
    course.learn(model, one, its, calls, known, teaches=True)
    assert model.values.refused == 6
    assert model.values.ended == [0, 0]
    assert not len(model.values.reservoir)
    assert known == {}
    model.values.ended = [20, 20]
    model.values.heads.shared[:] = np.nan
    assert foretold(model, one) == [None] * 3


def test_a_state_cut_short_is_refused(new_handler, words, kit):
    run(handler := new_handler(), kit.MemoryState(), kit.records(*(planted(kit, i) for i in range(4))))
    model = live(handler)
    model.changed_slots = set(range(len(model.reservoir)))
    pieces = dict(durable.changes(model)) | state_of(model)
    pieces["values"] = pieces["values"][:-4]
    with pytest.raises(Exception, match="damaged"):
        durable.restore(RewardModel(RewardConfig(), words), sorted(pieces.items()))
