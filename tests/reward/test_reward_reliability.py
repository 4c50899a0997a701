"""Who is believed: sources and raters that are right, careless or hostile, in every order, within bounds."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from everloop.config import Config, RewardConfig
from everloop.feedback import Feedback
from everloop.home import Home
from everloop.score import Score
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import durable
from reward.declaration import Declaration
from reward.evidence import decide, said_of
from reward.handler import RewardHandler
from reward.model import SLIPS, RewardModel, opinion
from reward.reliability import OUTCOME, RATERS, SOURCES, Piece, Reliability, comparable, of_snapshot, rater_of, vote

THUMB = math.log((1 - SLIPS) / SLIPS)


def answers(count: int, seed: int, **right: float) -> list[list[Piece]]:
    """What everybody says of answers of which 65% are good; ``right``: how often whom, by '<source>' or '<rater>'."""
    dice = random.Random(seed)
    made = []
    for number in range(count):
        good = dice.random() < 0.65
        words = [Piece("thumb", f"user-{number}", float(good == (dice.random() < 0.95)))]
        for name, share in right.items():
            said = float(good == (dice.random() < share))
            words.append(Piece("thumb", name, said) if "_" not in name else Piece(name.replace("_", ":"), None, said))
        made.append(words)
    return made


def heard(said: list[list[Piece]]) -> Reliability:
    made = Reliability()
    for pieces in said:
        made.learn(pieces)
    return made


def test_before_anything_was_heard_words_weigh_as_supposed() -> None:
    fresh = Reliability()
    assert fresh.odds("thumb", None, 1.0) == pytest.approx(THUMB)
    assert fresh.odds("rating", "r", 0.25) == pytest.approx(-THUMB / 2)
    assert fresh.odds("implicit:kept", None, 1.0) == pytest.approx(0.5)
    assert fresh.odds("correction", None, 0.0) == pytest.approx(-4.0)
    assert fresh.odds("judge:j", None, 1.0) == fresh.odds("comment", None, 0.0) == 0.0


def test_a_rater_of_just_so_many_words_is_known_after_a_load_or_not_as_before() -> None:
    """Parts of words add up to a whole number of them, or to a hair less, by the order of the sum."""
    for judges in ((3, 1, 3), (1, 3, 3), (6, 7, 1), (3, 3, 3)):
        believed = Reliability()
        for many in judges:
            rest = [Piece(f"judge:{number}", None, 1.0) for number in range(many)]
            believed.learn([Piece("rating", "r", 0.3, person="p"), *rest])
        again = Reliability()
        again.take(believed.dump(), [believed.dump_rater(slot) for slot in range(len(believed.own))])
        assert again.dump_raters() == believed.dump_raters()


def crowd(**right: float) -> list[list[Piece]]:
    """Answers that two ordinary people rate, 95% right; each of ``right`` rates a hundred of them as well."""
    dice = random.Random(1)
    made = []
    for number in range(500):
        good = dice.random() < 0.65
        words = [Piece("thumb", f"{who}-{number}", float(good == (dice.random() < 0.95))) for who in "ab"]
        who = list(right)[number // 100] if number // 100 < len(right) else None
        made.append(words + ([Piece("thumb", who, float(good == (dice.random() < right[who])))] if who else []))
    return made


def test_the_honest_weigh_more_the_careless_little_and_the_hostile_nothing() -> None:
    trust = heard(crowd(honest=1.0, careless=0.5, hostile=0.05))
    honest, careless, hostile = (sum(trust.weighs("thumb", who)) / 2 for who in ("honest", "careless", "hostile"))
    assert careless < 0.6
    assert hostile == 0.0
    assert honest > sum(trust.weighs("thumb")) / 2
    assert sum(heard(crowd(honest=1.0)).weighs("thumb", "honest")) / 2 > THUMB
    assert trust.worth("thumb", "honest") > 4 * trust.worth("thumb", "careless")


def test_judges_come_to_weigh_in_the_order_of_how_right_they_are() -> None:
    trust = heard(answers(300, 3, judge_right=0.9, judge_random=0.5, judge_hostile=0.1))
    right, chance, hostile = (trust.weighs(f"judge:{name}") for name in ("right", "random", "hostile"))
    assert min(right) > 1.0
    assert max(chance) < 0.4
    assert hostile == (0.0, 0.0)


def test_who_always_says_the_same_weighs_nothing() -> None:
    said = answers(300, 4)
    trust = heard([[*words, Piece("judge:nods", None, 1.0)] for words in said])
    assert trust.weighs("judge:nods")[0] < 0.3, "a yes from who never says no tells nothing"


def test_an_outcome_teaches_at_once_and_is_not_taught() -> None:
    trust = heard([[Piece(OUTCOME, None, 1.0), Piece("thumb", "liar", 0.0)] for _ in range(60)])
    assert trust.weighs("thumb", "liar")[1] < 1.0
    np.testing.assert_allclose(trust.probabilities(OUTCOME), [0.005, 0.995])


def test_machines_do_not_vouch_for_each_other() -> None:
    judges = [[Piece(f"judge:{name}", None, 1.0) for name in "abc"] + [vote(0.99)] for _ in range(200)]
    assert heard(judges).tables == {}
    assert comparable("critic:self", "check:c")
    assert comparable("critic:self", OUTCOME)
    assert not comparable("critic:self", "thumb")
    assert not comparable("model", "check:c")
    assert comparable("check:c", "thumb")


def test_nobody_agrees_with_himself() -> None:
    assert heard([[Piece("thumb", "r", 1.0)] for _ in range(50)]).tables == {}


def test_a_thumb_and_a_correction_of_one_person_do_not_vouch_for_each_other() -> None:
    thumb, correction = Piece("thumb", "t", 0.0, person="p"), Piece("correction", "c", 0.0, person="p")
    assert heard([[thumb, correction]] * 50).tables == {}
    assert heard([[thumb, correction._replace(person="q")]] * 50).tables
    against = heard([[thumb, correction, vote(0.95)]] * 60)
    assert set(against.tables) == {("model", "thumb"), ("correction", "model")}


def test_the_models_opinion_counts_as_much_as_it_was_sure() -> None:
    assert vote(0.5).weight == 0.0
    assert vote(0.1) == Piece("model", None, 0.0, pytest.approx(0.8))
    unsure, sure = (heard([[Piece("thumb", "r", 0.0), vote(p)]] * 100) for p in (0.55, 0.99))
    assert sum(unsure.weighs("thumb", "r")) > sum(sure.weighs("thumb", "r"))


SAID = ("thumb", "rating", "implicit:kept", "judge:j", "check:c", "correction", OUTCOME)
PIECES = st.lists(
    st.tuples(st.sampled_from(SAID), st.sampled_from([None, "r1", "r2"]), st.sampled_from([0.0, 0.3, 1.0])).map(
        lambda one: Piece(one[0], one[1] and f"{one[1]} by {one[0]}", one[2])
    ),
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=8), st.randoms(use_true_random=True), st.integers(0, 100))
def test_every_order_and_a_hundred_revisions_leave_the_same(
    said: list[list[Piece]], dice: random.Random, revisions: int
) -> None:
    straight = heard(said)
    shuffled, other = dice.sample(said, len(said)), dice.choice(said)[::-1]
    there = Reliability()
    for pieces in shuffled[:-1]:
        there.learn(pieces)
    for number in range(revisions):  # the last answer's words change to and fro
        held = other if number % 2 else shuffled[-1]
        there.learn(held)
        there.learn(held, sign=-1)
    there.learn(shuffled[-1])
    assert there.tables.keys() == straight.tables.keys()
    for source in SAID:
        for rater in (None, f"r1 by {source}", f"r2 by {source}"):
            np.testing.assert_allclose(
                there.probabilities(source, rater), straight.probabilities(source, rater), atol=1e-6
            )


def test_raters_are_bounded_and_the_least_heard_makes_room() -> None:
    trust = Reliability()
    for _ in range(3):
        trust.learn([Piece("thumb", "regular", 1.0), Piece(OUTCOME, None, 1.0)])
    for number in range(RATERS + 500):
        trust.learn([Piece("thumb", f"once-{number}", 1.0), Piece(OUTCOME, None, 1.0)])
    assert len(trust.own) == len(trust.raters) == RATERS
    assert "regular" in trust.raters
    assert "once-0" not in trust.raters
    before = trust.heard.sum()
    trust.learn([Piece("thumb", "once-0", 1.0), Piece(OUTCOME, None, 1.0)], sign=-1)
    assert trust.heard.sum() == before, "what made room is not taken back from others"


def test_names_that_products_invent_are_bounded() -> None:
    trust = Reliability()
    for number in range(3 * SOURCES):
        trust.learn([Piece(f"implicit:{number}", None, 1.0), Piece("thumb", None, 1.0)])
    assert len(trust.status()) == SOURCES
    assert trust.odds(f"implicit:{2 * SOURCES}", None, 1.0) == pytest.approx(0.5), "as supposed"


def test_a_declaration_bounds_and_leaves_out() -> None:
    declared = Declaration.model_validate(
        {"signals": {"thumb": {"most": 1.0}, "judge:j": {"least": 0.5}, "implicit:kept": {"count": False}}}
    )
    trust = Reliability(declared)
    assert trust.odds("thumb", None, 1.0) == 1.0
    assert trust.odds("judge:j", None, 0.0) == -0.5
    kept = Feedback(id="k", kind="implicit", name="kept", value=1.0, time=1.0)
    assert said_of("a", (kept,), trust).odds == 0.0
    assert said_of("a", (kept,)).odds == pytest.approx(0.5)


def test_a_verdict_that_is_an_outcome_decides_and_a_judges_never_is_one() -> None:
    verdict = {"kind": "outcome", "value": 0.0, "time": 1.0}
    assert said_of("a", (Feedback(id="c", source="check:c", **verdict),)).outcome == 0.0
    judged = said_of("a", (Feedback(id="j", source="judge:j", **verdict),))
    assert (judged.outcome, judged.label, judged.odds) == (None, None, 0.0)
    thumb = Feedback(id="t", kind="thumb", value=1, source="judge:j", time=1.0)
    assert said_of("a", (thumb,)).label is None, "no machine speaks as a person"


def test_a_hostile_thumb_moves_neither_score_nor_lesson() -> None:
    word = Feedback(id="w", kind="thumb", value=-1, rater="hostile", time=1.0)
    said = crowd(hostile=0.05)
    mine = str(rater_of(word))
    trust = heard([[p._replace(rater=mine) if p.rater == "hostile" else p for p in words] for words in said])
    one = said_of("a", (word,), trust)
    assert (one.label, one.odds, one.weight) == (0.0, 0.0, 0.0)
    opinion_held = opinion((2.0, 2.0, 2.0), 0.5, True)
    assert decide(opinion_held, one, 0.5)[0].value == pytest.approx(opinion_held.value)


def test_a_snapshot_and_the_state_keep_what_is_believed(words: Any, tmp_path: Any) -> None:
    model = RewardModel(RewardConfig(), words)
    for pieces in answers(50, 5, honest=1.0, hostile=0.05, judge_right=0.9):
        model.reliability.learn(pieces)
    folder = tmp_path / model.save(tmp_path)
    again = RewardModel(RewardConfig(), words)
    assert durable.restore(again, durable.changes(model))
    assert [name for name, _ in durable.changes(model)] == ["drift", "core"], "nothing that was believed changed since"
    for held in (again.reliability, RewardModel.load(folder, words).reliability, of_snapshot(folder)):
        for who in ("honest", "hostile"):
            assert held.weighs("thumb", who) == model.reliability.weighs("thumb", who)
        assert held.weighs("judge:right") == model.reliability.weighs("judge:right")
    assert again.save(tmp_path / "again") == folder.name


def test_a_damaged_piece_is_refused(words: Any) -> None:
    model = RewardModel(RewardConfig(), words)
    model.reliability.learn([Piece("thumb", "r", 1.0), Piece(OUTCOME, None, 1.0)])
    pieces = dict(durable.changes(model))
    for broken in (b'[["a", "b", [1.0]]]', b'[["a", "b", [NaN, 0, 0, 0]]]', b"[["):
        with pytest.raises(Exception, match="damaged"):
            durable.restore(RewardModel(RewardConfig(), words), {**pieces, "sources": broken}.items())


def test_what_is_shown_names_nobody() -> None:
    trust = heard(answers(60, 6, honest=1.0, judge_right=0.9))
    shown = trust.status()
    assert set(shown) == {"thumb", "judge:right"}
    assert 0.5 < shown["thumb"]["good_if_good"] <= 1
    spread = trust.spread()["thumb"]
    assert spread["raters"] == 61
    assert spread["least"] <= spread["median"] <= spread["most"]
    assert "honest" not in json.dumps([shown, spread])


def settled_tables(kit: Any, tmp_path: Any, versions: list[Any]) -> dict[Any, Any]:
    """What is believed after a handler took these versions of episodes, in this order."""
    handler = RewardHandler(Config(home=tmp_path), Home(tmp_path), lambda name: kit.WordEncoder())
    state = kit.MemoryState()
    for number, one in enumerate(versions):
        for record in kit.records(one, start=number):
            handler.handle(state, record, 0.0)
        handler.flush(state, 0.0)
    return dict(handler._desks["default", "assistant"].live.reliability.tables)


WORDS = st.lists(
    st.tuples(st.sampled_from(["r1", "r2"]), st.sampled_from([-1, 0, 1]), st.sampled_from(["thumb", "outcome"])),
    max_size=5,
)


@settings(max_examples=12, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_feedback_in_every_order_leaves_the_same_belief(
    tmp_path_factory: Any, kit: Any, said: list[Any], dice: random.Random
) -> None:
    """Revised, withdrawn, late and repeated words of several episodes: only what stands in the end counts."""

    def version(name: int, number: int, told: list[Any]) -> Any:
        standing = {(rater, kind): value for rater, value, kind in told}
        words = [
            Feedback(id=f"{rater}-{kind}", kind=kind, rater=rater, time=1.0, value=value if kind == "thumb" else 1.0)
            for (rater, kind), value in standing.items()
            if value
        ]
        asked = (f"q{name}", f"a{name}")  # the same again of the same rater is held, and what is held is not heard
        return kit.episode(f"e{name}", asked, feedback=words, version=number)

    folder = tmp_path_factory.mktemp("orders")
    versions = [
        [version(name, number, told[:number]) for number in range(len(told) + 1)] for name, told in enumerate(said)
    ]
    mixed = []
    waiting = [its.copy() for its in versions]
    while any(waiting):
        its = dice.choice([one for one in waiting if one])
        mixed.append(its.pop(0))
        if dice.random() < 0.3:
            mixed.append(mixed[-1])  # delivered again
    there = settled_tables(kit, folder / "mixed", mixed)
    straight = settled_tables(kit, folder / "straight", [its[-1] for its in versions])
    assert there.keys() == straight.keys()
    for key, table in straight.items():
        np.testing.assert_allclose(there[key], table, atol=1e-9)


def test_words_that_vanish_with_who_said_them_leave_nothing(kit: Any, tmp_path: Any) -> None:
    outcome = Feedback(id="o", kind="outcome", value=1.0, time=1.0)
    spoken = kit.episode("e", ("q", "a"), ("q2", "a2"), feedback=[kit.thumb(1), outcome], version=5)
    without = spoken.turns[1].model_copy(update={"feedback": (outcome,)})
    gone = spoken.model_copy(update={"version": 6, "turns": (spoken.turns[0], without)})
    nothing = spoken.model_copy(update={"version": 7, "turns": spoken.turns[:1]})
    assert settled_tables(kit, tmp_path / "a", [spoken]) != {}
    assert settled_tables(kit, tmp_path / "b", [spoken, gone]) == {}
    assert settled_tables(kit, tmp_path / "c", [spoken, nothing]) == {}


def test_thumbs_up_alone_give_no_opinion_and_no_belief_beyond_what_is_declared(kit: Any, tmp_path: Any) -> None:
    handler = RewardHandler(Config(home=tmp_path), Home(tmp_path), lambda name: kit.WordEncoder())
    state = kit.MemoryState()
    up = [kit.episode(f"e{i}", (f"q{i}", "a"), feedback=[kit.thumb(1, f"f{i}", rater="r")]) for i in range(60)]
    for record in kit.records(*up, kit.episode("quiet", ("q", "a"))):
        handler.handle(state, record, 0.0)
    scores = kit.decoded(Score, handler.flush(state, 0.0), "scores")
    assert scores[-1].episode == "quiet"
    assert not scores[-1].mask, "one kind of label is no ground for an opinion"
    trust = handler._desks["default", "assistant"].live.reliability
    assert trust.tables == {}, "words that nothing contradicts or confirms teach nothing about who said them"
    assert trust.odds("thumb", None, 1.0) == pytest.approx(THUMB)
