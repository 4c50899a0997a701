"""Poison: nobody moves the model beyond a share, bursts and duplicates are held, and a person lets them in."""

from collections import Counter

import numpy as np
import pytest
from everloop.config import Config
from everloop.feedback import Feedback
from everloop.score import Score
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.features import Example
from reward.handler import RewardHandler
from reward.model import Label, Pair
from reward.poison import BURST, PUSHES, RULES, TWINS, Guard, Verdict, name_of, share_of_each
from reward.release import same_without
from reward.taught import Place

MINUTE = 60.0


def label(name, prompt="where is it", answer="card desk", value=1.0):
    return Label(str(name), Example(f"{prompt}", answer), value)


def crowd(guard, count, start=0.0, step=MINUTE):
    """So many lessons, each of another rater about other words, one a minute."""
    for i in range(count):
        verdict = guard.weigh(label(i, f"prompt {i}", f"answer {i % 9}"), [f"other{i}"], f"c{i}", start + i * step)
        assert verdict == Verdict(1.0)


def test_shares_follow_the_number_of_raters():
    assert [share_of_each(n) for n in (0, 1, 3, 10, 300, 5000)] == [1.0, 1.0, pytest.approx(2 / 3), 0.2, 0.01, 0.01]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40), st.floats(0.1, 1.0)), min_size=1, max_size=150))
def test_no_rater_ever_holds_more_than_the_share_when_a_lesson_is_learned(words):
    guard = Guard(window=64)
    for number, (rater, prompt, weight) in enumerate(words):
        lesson = Label(str(number), Example(f"prompt {prompt}", f"answer {number}"), 1.0, weight=weight)
        verdict = guard.weigh(lesson, [f"r{rater}"], f"c{number}", number * MINUTE)
        assert 0 <= verdict.weight <= weight
        if len(guard.slots) < guard.window and not verdict.rule:
            share = guard.shares()[name_of("rater", f"r{rater}")]
            assert share <= share_of_each(len(guard.shares())) + 1e-6


def test_of_three_hundred_raters_one_who_speaks_all_day_holds_one_percent():
    guard = Guard(window=4096)
    crowd(guard, 400)
    verdicts = [
        guard.weigh(label(f"x{i}", f"mine {i}", f"a {i}"), ["loud"], f"x{i}", (500 + i) * MINUTE) for i in range(50)
    ]
    assert guard.shares()[name_of("rater", "loud")] == pytest.approx(0.01, abs=1e-3)
    assert verdicts[-1].rule == "share"


def test_one_rater_in_a_burst_is_held_and_others_are_not():
    guard = Guard(window=4096)
    crowd(guard, 400)
    late = 500 * MINUTE
    verdicts = [guard.weigh(label(f"x{i}", f"mine {i}", f"a {i}"), ["bot"], f"x{i}", late) for i in range(60)]
    other = guard.weigh(label("y", "yours", "a y"), ["person"], "y", late)
    assert {v.rule for v in verdicts} == {"", "share", RULES[0]}
    assert not any(v.rule == RULES[0] for v in verdicts[:BURST])
    assert all(v.rule == RULES[0] and v.name == name_of("rater", "bot") for v in verdicts[BURST:])
    assert other.weight == 1.0


def test_many_raters_for_one_answer_are_a_burst_and_what_was_always_frequent_is_none():
    guard = Guard(window=4096)
    for i in range(400):
        guard.weigh(label(i, f"prompt {i}", "hello" if i % 3 else f"answer {i}"), [f"r{i}"], f"c{i}", i * MINUTE)
    late = 500 * MINUTE
    pushed = [guard.weigh(label(f"x{i}", f"p {i}", "Buy  gold!"), [f"s{i}"], f"x{i}", late) for i in range(50)]
    usual = [guard.weigh(label(f"h{i}", f"h {i}", "hello"), [f"h{i}"], f"h{i}", late) for i in range(50)]
    assert [bool(v.rule) for v in pushed] == [i >= BURST for i in range(50)]
    assert pushed[-1].rule == RULES[2]
    assert guard.weigh(label("z", "p z", "buy gold"), ["z"], "z", late).name == pushed[-1].name, "near-identical words"
    assert all(not v.rule for v in usual)


def test_a_crowd_about_one_call_is_a_burst():
    guard = Guard(window=4096)
    crowd(guard, 400)
    late = 500 * MINUTE
    verdicts = [guard.weigh(label(f"x{i}", "p", f"a {i}"), [f"s{i}"], "one", late) for i in range(40)]
    assert [v.rule for v in verdicts] == [""] * BURST + [RULES[1]] * (40 - BURST)


def test_the_same_words_of_the_same_rater_teach_a_few_times():
    guard = Guard(window=4096)
    crowd(guard, 400)
    verdicts = [
        guard.weigh(label(f"x{i}", "Where is it?"), ["r"], f"x{i}", (500 + i) * MINUTE, lambda: True) for i in range(6)
    ]
    assert sum(not v.rule for v in verdicts) <= TWINS
    assert verdicts[-1].rule == "duplicate"
    assert not guard.weigh(label("y", "where is it"), ["another"], "y", 600 * MINUTE).rule


def pushing_rater(guard, count, believed=lambda: False, answer="gold desk"):
    """So many corrections of one rater to one answer, each beside a thumb down for another, an hour apart."""
    verdicts = []
    for i in range(count):
        late = (500 + 60 * i) * MINUTE
        guard.weigh(label(f"d{i}", f"mine {i}", f"answer {i % 9}", 0.0), ["pusher"], f"x{i}", late, believed)
        verdicts.append(guard.weigh(label(f"x{i}", f"mine {i}", answer), ["pusher"], f"x{i}", late, believed))
    return verdicts


def test_pushes_age_with_the_window_and_a_busy_rater_is_not_silenced_by_old_ones():
    guard = Guard(window=200)
    crowd(guard, 150)
    pushing_rater(guard, 4)
    rater = name_of("rater", "pusher")
    assert guard.guilty(rater)
    restored = Guard(window=200)
    restored.restore({name: value for name, value in guard.changes() if value is not None})
    for one in (guard, restored):
        said = 0
        while one.guilty(rater):
            one.weigh(label(f"n{said}", f"new {said}", f"answer {said % 9}"), [f"n{said}"], "n", (900 + said) * MINUTE)
            said += 1
        assert 200 <= said <= 400, "for a window at least, and two at most"
    assert (guard.pushes, guard.pushed) == (restored.pushes, restored.pushed)


def test_one_answer_is_not_pushed_by_one_rater_who_is_then_heard_no_more():
    guard = Guard(window=4096)
    crowd(guard, 400)
    verdicts = pushing_rater(guard, 8)
    assert [verdict.rule for verdict in verdicts] == [""] * PUSHES + ["one answer"] * (8 - PUSHES)
    assert verdicts[-1].name == name_of("rater", "pusher")
    other = guard.weigh(label("o", "something else", "answer 3", 0.0), ["pusher"], "o", 2000 * MINUTE)
    assert (other.rule, other.says) == (
        "one answer",
        "3 words of one rater were for one answer, 4 are learned",
    )
    assert not guard.weigh(label("y", "yours", "gold desk"), ["person"], "y", 2000 * MINUTE).rule


def test_who_is_right_again_and_again_or_vouched_for_or_says_what_all_say_pushes_nothing():
    for options in ({"believed": lambda: True}, {"answer": "hello"}):
        guard = Guard(window=4096)
        for i in range(400):
            guard.weigh(label(i, f"prompt {i}", "hello" if i % 3 else f"answer {i}"), [f"r{i}"], f"c{i}", i * MINUTE)
        assert {verdict.rule for verdict in pushing_rater(guard, 6, **options)} <= {"", "share"}
    guard = Guard(window=4096, trusted=[name_of("rater", "pusher")])
    crowd(guard, 400)
    assert all(verdict.rule in ("", "share") for verdict in pushing_rater(guard, 8))


def test_late_and_shuffled_times_give_the_same_counts():
    words = [(i, (500 + i % 3) * MINUTE + i / 3) for i in range(90)]
    orders = (words, words[::-1], [words[i] for i in np.random.default_rng(0).permutation(90)])
    found = []
    for order in orders:
        guard = Guard(window=4096)
        crowd(guard, 400)
        rules = [guard.weigh(label(f"x{i}", f"p{i}", f"a{i}"), ["bot"], f"x{i}", at).rule for i, at in order]
        found.append(
            (rules.count(RULES[0]), dict(sorted((k, v.total()) for k, v in guard.minutes.items() if k >= 500)))
        )
    assert found[0] == found[1] == found[2]
    assert found[0][0] == 90 - 3 * BURST


def test_memory_is_bounded_however_times_jump():
    guard = Guard(window=100)
    for i in range(2000):
        guard.weigh(label(i, f"p{i}", f"a{i}"), [f"r{i}"], f"c{i}", (i * 7919 % 1000) * MINUTE)
    assert len(guard.slots) == 100
    assert len(guard.minutes) <= 5
    assert len(guard.shares()) <= 100


def test_what_a_guard_knows_is_packed_and_restored():
    guard = Guard(window=100)
    crowd(guard, 150)
    pushing_rater(guard, 5)
    late = 900 * MINUTE
    pair = Pair("fb/1", "p", "chosen", "rejected")
    verdict = guard.weigh(pair, ["r"], "c", late)._replace(rule="duplicate", name="rater:1")
    guard.hold(pair, verdict, Place("ep", "c", late), ["r"])
    guard.forget(guard.slots[7].lesson)
    again = Guard(window=100, trusted=["rater:1"])
    again.restore({name: value for name, value in guard.changes() if value is not None})
    assert again.shares() == guard.shares()
    assert again._slot_of == guard._slot_of
    assert (again.count, again.minutes, again.held) == (guard.count, guard.minutes, guard.held)
    assert again.pushes == guard.pushes == Counter({name_of("rater", "pusher"): 3})
    ((about, lesson),) = again.vouched()
    assert (about["episode"], lesson) == ("ep", pair)


def test_a_time_beyond_all_calendars_is_packed_like_any_other():
    guard = Guard(window=100)
    assert guard.weigh(label(1, "p", "a"), ["r"], "c", 1e300).weight == 1.0
    again = Guard(window=100)
    again.restore(dict(guard.changes()))
    assert again.minutes == guard.minutes


@pytest.fixture
def desk(home, words):
    def of(trusted=()):
        reward = {"trusted": list(trusted)}
        tenants = {"default": {"policies": {"assistant": {"reward": reward}}}}
        return RewardHandler(Config.model_validate({"home": home.root, "tenants": tenants}), home, lambda name: words)

    return of


def pushing(kit, count, start=0):
    """Thumbs of one bot within a second, for one wrong answer each time in other words."""
    return [
        kit.episode(
            f"bad_{i}",
            (f"number {i} lost my card", "gold desk"),
            feedback=[Feedback(id=f"b{i}", kind="thumb", value=1, time=1e6 + i / count, rater="bot")],
            updated=1e6,
        )
        for i in range(start, start + count)
    ]


def taken(handler, state, records):
    outputs = [one for record in records for one in handler.handle(state, record, 0.0)]
    return outputs + handler.flush(state, 0.0)


def spread(kit, count):
    """The desk's traffic, a rating a minute."""
    made = kit.desk_traffic(count)
    timed = [
        turn.model_copy(update={"feedback": tuple(f.model_copy(update={"time": 60.0 * i}) for f in turn.feedback)})
        for i, one in enumerate(made)
        for turn in one.turns
    ]
    return [one.model_copy(update={"turns": (turn,)}) for one, turn in zip(made, timed, strict=True)]


def test_a_bot_s_words_are_held_shown_and_kept_from_training_until_a_person_vouches(desk, kit):
    state, handler = kit.MemoryState(), desk()
    outputs = taken(handler, state, kit.records(*spread(kit, 320), *pushing(kit, 60)))
    status = handler.status()["default/assistant"]
    assert status["labels"] < 320 + 10
    poison = status["poison"]
    assert poison["held"] == 320 + 60 - status["labels"]
    newest = poison["newest_held"][0]
    assert newest["name"] == name_of("rater", "bot")
    assert newest["says"].startswith("60 words of one rater in a minute")
    scores = {score.episode: score for score in kit.decoded(Score, outputs, "scores")}
    assert scores["bad_59"].label is None
    assert scores["bad_59"].source == "model"
    assert scores["bad_59"].quarantined == newest["says"]
    assert scores["ep_7"].label is not None
    assert scores["ep_7"].quarantined is None
    (made,) = handler._desks.values()
    spoke = status["labels"] + poison["taken_back"]
    assert made.live.propensity.labels == spoke, "who is held was not heard to speak"

    again = desk([newest["name"]])
    taken(again, state, [])
    after = again.status()["default/assistant"]
    assert after["labels"] == status["labels"] + poison["held"] - after["poison"]["held"]
    assert after["labels"] > status["labels"]
    assert {one["rule"] for one in after["poison"]["newest_held"]} == {"share"}, "which binds whom a person trusts, too"
    assert after["poison"]["largest_share"] <= 0.0101
    taken(again, state, kit.records(*pushing(kit, 60), start=320))
    assert again.status()["default/assistant"]["updates"] == after["updates"], "the same versions teach nothing again"


def test_held_words_that_are_withdrawn_are_forgotten(desk, kit):
    state, handler = kit.MemoryState(), desk()
    bad = pushing(kit, 60)
    taken(handler, state, kit.records(*spread(kit, 320), *bad))
    held = handler.status()["default/assistant"]["poison"]["held"]
    turn = bad[-1].turns[0].model_copy(update={"feedback": ()})
    taken(handler, state, kit.records(bad[-1].model_copy(update={"version": 9, "turns": (turn,)}), start=400))
    assert handler.status()["default/assistant"]["poison"]["held"] == held - 1


def test_held_words_survive_a_restart(desk, kit):
    state, handler = kit.MemoryState(), desk()
    taken(handler, state, kit.records(*spread(kit, 320), *pushing(kit, 60)))
    before = handler.status()["default/assistant"]["poison"]
    again = desk()
    taken(again, state, [])
    assert again.status()["default/assistant"]["poison"] == before


def test_a_decision_that_hangs_on_one_user_says_so():
    def better(votes):
        return sum(sum(v) for v in votes) > 0

    def size(vote):
        return float(len(vote))

    honest = {f"u{i}": [1.0] for i in range(10)}
    assert same_without(honest, better, size) == ""
    bought = {f"u{i}": [-1.0] for i in range(10)} | {"bot": [1.0] * 30}
    assert same_without(bought, better, size).startswith("without bot the decision would be False, not True")
