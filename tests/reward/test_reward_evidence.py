"""What people's words amount to, what is learned from them, and what they do to a score."""

import math

import pytest
from everloop.feedback import Feedback

from reward.declaration import DEFAULT
from reward.evidence import NOTHING, decide, lessons, said, said_of
from reward.features import examples
from reward.model import SLIPS, Label, Pair, meant, opinion
from reward.reliability import OUTCOME, Piece, Reliability, rater_of


def word(kind, name="w", **fields):
    return Feedback(id=name, kind=kind, time=1.0, **fields)


def model_says(probability, entitled=True):
    return opinion((math.log(probability / (1 - probability)),) * 3, 0.5, entitled)


def test_an_outcome_is_used_before_the_models_opinion():
    one = said_of("a", (word("outcome", value=0.0), word("thumb", value=1)))
    final, source = decide(model_says(0.9), one, 0.5)
    assert (final.value, final.spread, final.reward, final.mask, source) == (0.0, 0.0, -1.0, True, "outcome")


def test_a_thumb_and_an_opinion_are_combined_by_bayes():
    up = said_of("a", (word("thumb", value=1),))
    final, source = decide(model_says(0.5), up, 0.5)
    assert source == "feedback"
    assert final.value == pytest.approx(1 - SLIPS)
    doubted, _ = decide(model_says(0.03), up, 0.5)
    assert 0.3 < doubted.value < 0.45, "one thumb against a sure model weighs mildly"


def test_before_the_model_may_judge_a_thumb_stands_alone():
    final, source = decide(model_says(0.01, entitled=False), said_of("a", (word("thumb", value=1),)), 0.5)
    assert (source, final.mask) == ("feedback", True)
    assert final.value == pytest.approx(1 - SLIPS)


def test_no_word_leaves_the_opinion_as_it_is():
    estimate = model_says(0.3)
    assert decide(estimate, NOTHING, 0.5) == (estimate, "model")
    assert decide(model_says(0.3, entitled=False), NOTHING, 0.5)[0].mask is False


def test_implicit_signals_move_an_opinion_a_little_and_are_no_label():
    kept = said_of("a", (word("implicit", name="kept", value=1.0),))
    final, source = decide(model_says(0.5), kept, 0.5)
    assert (source, kept.label) == ("model", None)
    assert 0.5 < final.value < 0.7


def test_a_correction_makes_the_answer_wrong_whatever_the_thumb_says():
    one = said_of("card", (word("thumb", value=1), word("correction", text="loan")))
    assert (one.label, one.certain, len(one.corrections)) == (0.0, True, 1)
    assert decide(model_says(0.5), one, 0.5)[0].value < 0.5


def test_a_correction_to_the_same_words_confirms_them():
    one = said_of("card desk", (word("correction", text=" card  desk "),))
    assert (one.label, one.certain, one.corrections) == (1.0, True, ())


def test_many_words_stay_bounded():
    crowd = tuple(word("thumb", name=f"w{i}", value=1) for i in range(1000))
    assert said_of("a", crowd).odds == DEFAULT.combine.cap


def test_a_correction_teaches_a_label_and_a_pair(kit):
    one = kit.episode("e", ("my loan", "card"), feedback=[word("correction", text="loan", rater="r")])
    (_, label), (_, pair) = lessons(one, examples(one))
    assert isinstance(label, Label)
    assert (label.value, label.certain, label.watched) == (0.0, True, True)
    assert isinstance(pair, Pair)
    assert (pair.chosen, pair.rejected, pair.absolute) == ("loan", "card", True)


def test_a_correction_teaches_as_much_as_its_rater_is_believed(kit):
    told = word("correction", "c1", text="right", rater="r")
    episode = kit.episode("e", ("asked", "wrong"), feedback=[told])
    believed, hostile = Reliability(), Reliability()
    for i in range(40):
        hostile.learn([Piece("correction", rater_of(told), 0.0), Piece(OUTCOME, None, float(i % 10 > 0))])
    weights = {
        name: [lesson.weight for _, lesson in lessons(episode, examples(episode), trust)]
        for name, trust in (("believed", believed), ("hostile", hostile))
    }
    assert weights["believed"] == [1.0, 1.0]
    assert all(weight < 0.3 for weight in weights["hostile"])


def test_a_preference_teaches_a_pair_alone(kit):
    one = kit.episode("e", ("q", "a"), feedback=[word("preference", chosen="a", rejected="b", rater="r")])
    ((_, pair),) = lessons(one, examples(one))
    assert isinstance(pair, Pair)
    assert not pair.absolute


def test_an_episodes_outcome_is_its_last_answers_label_and_fades_before_it(kit):
    turns = [(f"q{i}", f"a{i}") for i in range(6)]
    one = kit.episode("e", *turns).model_copy(update={"feedback": (word("outcome", value=1.0),)})
    assert [one.label for one in said(one)] == [None] * 5 + [1.0]
    taught = dict(lessons(one, examples(one)))
    assert {number: lesson.weight for number, lesson in taught.items()} == {5: 1.0, 4: 0.5, 3: 0.25, 2: 0.125}
    assert [number for number, lesson in taught.items() if lesson.watched] == [5]


def test_a_failed_call_is_no_answer_to_learn_from(kit):
    one = kit.episode("e", ("q0", "a0"), ("q1", ""), feedback=[kit.thumb(1)], about=1)
    failed = one.turns[1].call.model_copy(update={"error": "engine died"})
    turns = (one.turns[0], one.turns[1].model_copy(update={"call": failed}))
    one = one.model_copy(update={"turns": turns, "feedback": (word("outcome", value=1.0),)})
    assert [(number, lesson.value) for number, lesson in lessons(one, examples(one))] == [(0, 1.0)]


def test_unchanged_words_have_the_same_ids_and_revised_ones_others(kit):
    def ids(*words):
        one = kit.episode("e", ("q", "a"), feedback=words)
        return [lesson.id for _, lesson in lessons(one, examples(one))]

    up = kit.thumb(1)
    assert ids(up) == ids(up, word("comment", text="fine"))
    assert set(ids(up)).isdisjoint(ids(kit.thumb(-1)))


def test_meant_by_hand():
    assert meant(1.0, 0.5) == pytest.approx(0.95)
    assert meant(0.0, 0.5) == pytest.approx(0.05)
    assert meant(1.0, SLIPS) == pytest.approx(0.5)
    # 0.1 · 0.95 / (0.1 · 0.95 + 0.9 · 0.05)
    assert meant(1.0, 0.1) == pytest.approx(0.095 / 0.14)
