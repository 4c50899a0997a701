"""Taking back: what a rater taught before he was found out is undone, held, shown, and learned again where trusted."""

import shutil

import numpy as np
import pytest
from everloop.config import Config, RewardConfig
from everloop.feedback import Feedback
from everloop.run import RewardVersion
from everloop.score import Score
from pydantic import ValidationError

from reward.features import Example
from reward.handler import RewardHandler
from reward.known import Known
from reward.model import Label, Pair, RewardModel, Trace
from reward.poison import Guard, name_of
from reward.taught import Lessons, Place, Taught

PUSHER = name_of("rater", "pusher")


@pytest.fixture
def desk(home, words):
    def of(**reward):
        tenants = {"default": {"policies": {"assistant": {"reward": reward}}}}
        return RewardHandler(Config.model_validate({"home": home.root, "tenants": tenants}), home, lambda name: words)

    return of


def taken(handler, state, records):
    outputs = [one for record in records for one in handler.handle(state, record, 0.0)]
    return outputs + handler.flush(state, 0.0)


def crowd(kit, count):
    """The desk's traffic, a rating a minute."""
    made = []
    for i, one in enumerate(kit.desk_traffic(count)):
        (turn,) = one.turns
        feedback = tuple(word.model_copy(update={"time": 60.0 * i}) for word in turn.feedback)
        made.append(one.model_copy(update={"turns": (turn.model_copy(update={"feedback": feedback}),)}))
    return made


def pushing(kit, count, others=()):
    """Thumbs down of one rater, an hour apart, each with a correction to one wrong answer; ``others`` rate the first
    answer too."""
    made = []
    for i in range(count):
        at = {"time": 1e6 + 3600.0 * i, "rater": "pusher"}
        said = [Feedback(id=f"d{i}", kind="thumb", value=-1, **at)]
        said += [Feedback(id=f"c{i}", kind="correction", text="gold desk", **at)]
        said += [Feedback(id=f"o{r}", kind="thumb", value=-1, **at | {"rater": r}) for r in others if i == 0]
        made.append(kit.episode(f"bad_{i}", (f"number {i} lost my card", "card desk"), feedback=said, updated=1e6 + i))
    return made


def model_of(handler):
    (made,) = handler._desks.values()
    return made.live


def answered(model):
    """What is remembered of every answer, by its key."""
    its = model.prototypes
    sums = {key: (its.good[:, row], its.bad[:, row], its.counts[:, :, row]) for key, row in its.rows.items()}
    return {key: arrays for key, arrays in sums.items() if arrays[2].max() > 1e-3}


def test_what_a_pusher_taught_is_taken_back_when_he_is_heard_no_more(desk, kit):
    state, honest, handler = kit.MemoryState(), desk(), desk()
    taken(honest, kit.MemoryState(), kit.records(*crowd(kit, 100)))
    taken(handler, state, kit.records(*crowd(kit, 100)))
    first = kit.decoded(Score, taken(handler, state, kit.records(*pushing(kit, 1), start=100)), "scores")
    assert first[0].label == 0.0, "he was heard at first"
    assert first[0].quarantined is None
    assert handler.status()["default/assistant"]["poison"]["taken_back"] == 0
    assert answered(model_of(handler)).keys() > answered(model_of(honest)).keys()

    outputs = taken(handler, state, kit.records(*pushing(kit, 5)[1:], start=101))
    model, status = model_of(handler), handler.status()["default/assistant"]
    poison = status["poison"]
    assert poison["taken_back"] >= 2
    assert poison["held"] == 10, "every thumb and every correction is held now"
    assert poison["newest_held"][0]["name"] == PUSHER
    for key, sums in answered(model_of(honest)).items():
        for ours, theirs in zip(answered(model)[key], sums, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert answered(model).keys() == answered(model_of(honest)).keys()
    assert model.seen == model_of(honest).seen
    silent = [slot for slot in range(len(model.reservoir)) if model.reservoir.lesson(slot).weight == 0]
    assert len(silent) == poison["taken_back"]
    again = {score.episode: score for score in kit.decoded(Score, outputs, "scores")}
    assert again["bad_0"].quarantined == "taken back: its rater pushed one answer"
    assert again["bad_0"].label is None
    assert again["bad_0"].source == "model"
    assert model.reliability.worth("thumb", "pusher") == model.reliability.worth("thumb", "nobody")

    restarted = desk()
    taken(restarted, state, [])
    assert restarted.status()["default/assistant"]["poison"] == poison
    once_more = pushing(kit, 1)[0].model_copy(update={"version": 9})
    taken(restarted, state, kit.records(once_more, start=400))
    assert restarted.status()["default/assistant"]["updates"] == status["updates"], "the same words teach nothing again"


def test_taking_back_is_the_same_through_a_restart(desk, kit):
    whole, parted = kit.MemoryState(), kit.MemoryState()
    records = kit.records(*crowd(kit, 100), *pushing(kit, 6))
    handler = desk()
    taken(handler, whole, records)
    for start in range(0, len(records), 27):
        handler = desk()
        taken(handler, parted, records[start : start + 27])
    # how often the desk was written is all that differs
    assert {k: v for k, v in whole.entries.items() if not k.endswith("/desk")} == {
        k: v for k, v in parted.entries.items() if not k.endswith("/desk")
    }


def test_a_label_that_others_stand_behind_is_not_taken_back(desk, kit):
    state, handler = kit.MemoryState(), desk()
    taken(handler, state, kit.records(*crowd(kit, 100), *pushing(kit, 6, others=["r1"])))
    (made,) = handler._desks.values()
    assert made.guard.guilty(PUSHER)
    (left,) = made.guard.taught.of(PUSHER)
    assert left == "bad_0-c0=0!"
    assert sorted(made.guard.taught.get(left).raters) == ["pusher", "pusher", "r1"]


def test_whom_a_person_has_heard_no_more_loses_what_he_taught_and_gets_it_again_when_trusted(desk, kit):
    state, rater = kit.MemoryState(), name_of("rater", "r8")
    taken(desk(), state, kit.records(*crowd(kit, 100)))
    handler = desk(distrusted=[rater])
    outputs = taken(handler, state, [])
    status = handler.status()["default/assistant"]
    assert (status["labels"], status["poison"]["taken_back"], status["poison"]["held"]) == (99, 1, 1)
    (score,) = kit.decoded(Score, outputs, "scores")
    assert (score.episode, score.quarantined) == ("ep_8", "taken back: a person had its rater heard no more")
    more = kit.episode("more", ("my card", "card desk"), feedback=[kit.thumb(1, rater="r8")], updated=1e6)
    (held,) = kit.decoded(Score, taken(handler, state, kit.records(more, start=100)), "scores")
    assert held.quarantined == "a person had its rater heard no more"

    trusting = desk(trusted=[rater])
    taken(trusting, state, [])
    assert trusting.status()["default/assistant"]["labels"] == 101
    assert trusting.status()["default/assistant"]["poison"]["held"] == 0


def test_who_is_distrusted_is_a_rater_and_not_trusted():
    with pytest.raises(ValidationError, match="no rater: a rater's name begins with 'rater:'"):
        RewardConfig(distrusted=("answer:0123456789abcdef",))
    with pytest.raises(
        ValidationError, match="rater:0123456789abcdef is trusted and distrusted: take it out of one of the two"
    ):
        RewardConfig(distrusted=("rater:0123456789abcdef",), trusted=("rater:0123456789abcdef",))
    for wrong in ("rater:", "rater:ciejvdnyemug", "ada"):
        with pytest.raises(ValidationError, match="names nobody: a name is 'rater:', 'answer:' or 'call:'"):
            RewardConfig(trusted=(wrong,))


def lesson(number, rater="r"):
    said = Label(f"l{number}", Example(f"p {number}", "a"), 1.0)
    return Taught(said, Trace(1.0, 0.9, 0.1, number), Place(f"e{number}", f"c{number}", float(number)), [rater])


def test_the_oldest_lessons_are_forgotten_and_the_rest_survive_packing():
    lessons = Lessons(most=20)
    for number in range(30):
        lessons.note(lesson(number, f"r{number % 2}"))
    lessons.drop("l29")
    packed = {name: value for name, value in lessons.changes() if value is not None}
    again = Lessons(most=20)
    again.restore(packed)
    assert [*again.kept] == [*lessons.kept] == [f"l{number}" for number in range(10, 29)]
    assert again.of(name_of("rater", "r1")) == lessons.of(name_of("rater", "r1"))
    assert next(iter(lessons.of(name_of("rater", "r0")))) == "l10"
    assert lessons.get("l10") == again.get("l10") == lesson(10, "r0")
    assert dict(again.changes()) == {}
    guard = Guard(window=100)
    guard.taught.note(lesson(1))
    restored = Guard(window=100)
    restored.restore({name: value for name, value in guard.changes() if value is not None})
    assert restored.taught.kept == guard.taught.kept


@pytest.mark.parametrize("absolute", [True, False])
def test_a_pair_that_is_taken_back_leaves_prototypes_as_they_were(words, absolute):
    model = RewardModel(RewardConfig(), words)
    model.learn([Label(f"l{i}", Example(f"p {i}", "chosen one"), float(i % 2)) for i in range(40)])
    before = {key: [array.copy() for array in sums] for key, sums in answered(model).items()}
    pair = Pair("x", "p 3", "chosen one", "another one", weight=0.7, absolute=absolute)
    model.learn([pair])
    assert any((answered(model)[key][0] != before[key][0]).any() for key in before)
    number = model.reservoir.count - 1
    model.take_back_pair(pair, number)
    after = answered(model)
    assert after.keys() == before.keys()
    for key, sums in before.items():
        for ours, theirs in zip(after[key], sums, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert model.reservoir.lesson(number).weight == 0


def growing(kit, number, turns, version, kind, *, said=True):
    """An episode of which as a whole one customer says the same better answer, whatever its turns are by then."""
    its = [(f"q{number} {turn} lost", f"answer {number} {turn}") for turn in range(turns)]
    words = {"correction": {"text": "better"}, "preference": {"chosen": "better", "rejected": f"answer {number} 0"}}
    word = Feedback(id=f"w{number}", kind=kind, time=1e6 + number * 0.1, rater=f"x{number}", **words[kind])
    one = kit.episode(f"b{number}", *its, version=version, updated=1e6 + version)
    return one.model_copy(update={"feedback": (word,) if said else ()})


@pytest.mark.parametrize("kind", ["correction", "preference"])
def test_what_is_held_and_moves_on_with_its_episode_is_learned_once_and_can_be_withdrawn(desk, kit, kind):
    state, handler = kit.MemoryState(), desk()
    taken(handler, state, kit.records(*crowd(kit, 300)))
    taken(handler, state, kit.records(*[growing(kit, i, 1, 1, kind) for i in range(40)], start=400))
    (made,) = handler._desks.values()
    assert [name for name in made.guard.held if name.endswith("w39")], "forty say the same within four seconds"
    later = kit.episode("z", ("x y", "z"), feedback=[kit.thumb(1, "zz", 1e6 + 7200)], updated=1e6 + 7200)
    taken(handler, state, kit.records(later, growing(kit, 39, 2, 2, kind), start=500))
    name = vouched_by(made)

    trusting = desk(trusted=[name])
    taken(trusting, state, [])
    (made,) = trusting._desks.values()
    known = Known.unpacked(state.get("episode/default/assistant/b39"))
    learned = [one for one in known.learned if one.endswith("w39")]
    assert len(learned) == 1
    assert not [one for one in made.guard.held if one.endswith("w39")]
    taken(trusting, state, kit.records(growing(kit, 39, 2, 3, kind, said=False), start=600))
    known = Known.unpacked(state.get("episode/default/assistant/b39"))
    assert not [one for one in known.learned if one.endswith("w39")]
    assert not [one for one in made.guard.taught.kept if one.endswith("w39")]


def vouched_by(made):
    """What a person would trust to let the newest held words in."""
    return made.guard.status(1)["newest_held"][0]["name"]


def test_scores_that_a_take_back_changes_name_a_version_that_is_there(desk, kit, home):
    state, rater = kit.MemoryState(), name_of("rater", "r8")
    taken(desk(), state, kit.records(*crowd(kit, 100)))
    shutil.rmtree(home.root / "rewards")
    outputs = taken(desk(distrusted=[rater]), state, [])
    (score,) = kit.decoded(Score, outputs, "scores")
    (version,) = kit.decoded(RewardVersion, outputs, "reward-versions")
    assert score.reward_version == version.version
    assert (home.root / version.path / "model.json").exists()


def corrected(kit, *more, version=1):
    word = Feedback(id="w", kind="correction", text="gold desk", time=1e6, rater="who")
    return kit.episode("e", ("lost card", "pin desk"), feedback=[word, *more], version=version, updated=1e6 + version)


def test_a_correction_that_is_taken_back_leaves_no_score_that_a_trainer_learns_it_from(desk, kit):
    """Also where somebody else spoke of the same answer, whose label stays learned."""
    state, who = kit.MemoryState(), name_of("rater", "who")
    other = kit.thumb(-1, "t", 1e6, rater="r5")
    taken(desk(), state, kit.records(*crowd(kit, 300), corrected(kit, other)))
    handler = desk(distrusted=[who])
    (score,) = kit.decoded(Score, taken(handler, state, []), "scores")
    assert (score.episode, score.quarantined) == ("e", "taken back: a person had its rater heard no more")
    assert (score.source, score.label) == ("model", None)
    (again,) = kit.decoded(
        Score, taken(handler, state, kit.records(corrected(kit, other, version=2), start=400)), "scores"
    )
    assert again.quarantined is not None
    assert handler.status()["default/assistant"]["labels"] == 301, "of two raters one stands by it"


def test_who_was_trusted_and_then_is_not_loses_the_score_of_what_he_corrected(desk, kit):
    state, who = kit.MemoryState(), name_of("rater", "who")
    taken(desk(), state, kit.records(*crowd(kit, 300)))
    taken(desk(distrusted=[who]), state, kit.records(corrected(kit), start=400))
    trusting = desk(trusted=[who])
    taken(trusting, state, [])
    (there,) = kit.decoded(Score, taken(trusting, state, kit.records(corrected(kit, version=2), start=401)), "scores")
    assert (there.source, there.quarantined) == ("feedback", None)
    (gone, *_) = kit.decoded(Score, taken(desk(distrusted=[who]), state, []), "scores")
    assert (gone.source, gone.label) == ("model", None)
    assert gone.quarantined == "taken back: a person had its rater heard no more"


@pytest.mark.parametrize("who", ["who", None])
def test_what_was_measured_stays_in_the_score_of_who_is_heard_no_more(desk, kit, who):
    """Whoever said it: an outcome by somebody else, beside his correction, and one by himself."""
    state, name = kit.MemoryState(), name_of("rater", "who")
    outcome = Feedback(id="o", kind="outcome", value=0.0, time=1e6, rater=who)
    taken(desk(), state, kit.records(*crowd(kit, 300), corrected(kit, outcome)))
    scores = kit.decoded(Score, taken(desk(distrusted=[name]), state, []), "scores")
    assert {(one.source, one.label, one.reward, one.mask) for one in scores} == {("outcome", 0.0, -1.0, True)}
    assert {one.quarantined for one in scores} == {"taken back: a person had its rater heard no more"}


def test_a_correction_that_finds_no_share_left_leaves_its_calls_label_in_the_score(desk, kit):
    """Nobody is silenced there: what is held of him is a lesson, and not his word."""
    state, handler = kit.MemoryState(), desk()
    others, stream = crowd(kit, 300), []
    for i in range(100):
        said = [Feedback(id=f"t{i}", kind="thumb", value=-1, time=600.0 * i, rater="busy")]
        said += [Feedback(id=f"w{i}", kind="correction", text=f"right {i}", time=600.0 * i, rater="busy")]
        mine = kit.episode(f"b{i}", (f"word {i} lost", f"answer {i}"), feedback=said, updated=float(i))
        stream += [*others[3 * i : 3 * i + 3], mine]
    scores = kit.decoded(Score, taken(handler, state, kit.records(*stream)), "scores")
    (made,) = handler._desks.values()
    held = {about["episode"] for about in made.guard.status(999)["newest_held"] if about["rule"] == "share"}
    known = {name: Known.unpacked(state.get(f"episode/default/assistant/{name}")) for name in held}
    both = [one for one in scores if one.episode in held and f"{one.call}=0!" in known[one.episode].learned]
    assert len(both) > 10
    assert all(score.quarantined is None and score.label == 0.0 for score in both)


def test_an_end_that_was_measured_stays_where_only_a_correction_is_taken_back(desk, kit):
    state, name = kit.MemoryState(), name_of("rater", "who")
    word = Feedback(id="w", kind="correction", text="gold desk", time=1e6, rater="who")
    outcome = Feedback(id="o", kind="outcome", value=1.0, time=1e6)
    one = kit.episode("e", ("q", "a desk"), ("lost card", "pin desk"), feedback=[word], updated=1e6, version=3)
    one = one.model_copy(update={"feedback": (outcome,)})
    taken(desk(), state, kit.records(*crowd(kit, 300), one))
    taken(desk(distrusted=[name]), state, [])
    known = Known.unpacked(state.get("episode/default/assistant/e"))
    assert known.end["value"] == 1.0
    assert "e-c1=1!" in known.learned
