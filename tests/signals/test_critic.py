"""The policy as its own critic: it compares two of its answers, and weighs what checks and outcomes bear out."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from everloop.errors import ConfigError

from reward.declaration import load
from reward.judges import JudgesHandler
from reward.reliability import Piece, Reliability, rater_of, source_of

NOON = 1_763_900_000.0


def failures(it: Any) -> dict[str, int]:
    return it.handler.status()["acme/desk"]["failures"]


def test_it_compares_its_answer_with_another_one_that_nobody_sees(bench, judge):
    it = bench(judge.as_critic(), JudgesHandler)
    it.take(it.call("c1", "Where is it?", "card"))
    assert it.words("c1") == {"critic:self": ("implicit", 1.0)}
    again, first, swapped = judge.asked
    assert (again["messages"], again["temperature"]) == ([{"role": "user", "content": "Where is it?"}], 1.0)
    material = [json.loads(one["messages"][1]["content"]) for one in (first, swapped)]
    assert [(one["first"], one["second"]) for one in material] == [("card", "loan"), ("loan", "card")]
    assert {one["model"] for one in judge.asked} == {"desk"}, "the policy by its name"
    assert {one["X-Everloop-Capture"] for one in judge.headers} == {"off"}, "what it is asked is no traffic"
    said = {one.id for one in it.said}
    it.again()
    assert len(judge.asked) == 3, "all of it is remembered on disk"
    assert {one.id for one in it.said} == said


def test_two_answers_that_were_given_are_compared_without_asking_for_another(bench, judge):
    it = bench(judge.as_critic(name="me"), JudgesHandler)
    it.take(it.call("c1", "Where is it?", "loan", seq=0), it.call("c2", "Where is it?", "card", choice=1, seq=0))
    assert it.words("c1") == {"critic:me": ("implicit", 0.0)}
    assert it.words("c2") == {"critic:me": ("implicit", 1.0)}
    assert len(judge.asked) == 2


@pytest.mark.parametrize(
    ("answer", "found", "asked"),
    [("card", {}, 1), ("", {"critic:self nonsense": 1}, 1), ({"content": None}, {"critic:self nonsense": 1}, 1)],
)
def test_where_there_is_no_other_answer_there_is_nothing_to_compare(bench, judge, answer, found, asked):
    judge.answer = lambda body: answer
    it = bench(judge.as_critic(), JudgesHandler)
    it.take(it.call("c1", "Where is it?", "card"))
    assert (it.words("c1"), failures(it), len(judge.asked)) == ({}, found, asked)


def test_another_answer_is_of_the_same_budget(bench, judge):
    it = bench(judge.as_critic(per_day=4), JudgesHandler)
    it.take(*(it.call(f"c{i}", f"Where is it, {i}?", "card", episode=f"ep_{i}") for i in range(3)))
    assert len(judge.asked) == 4
    assert failures(it)["critic:self over_budget"] >= 1


def test_answers_that_a_provider_gave_are_not_its_own(bench, judge):
    it = bench(judge.as_critic(), JudgesHandler)
    event = it.call("c1", "Where is it?", "card")
    theirs = event.payload.model_copy(update={"policy_version": "provider"})
    it.take(event.model_copy(update={"payload": theirs}))
    assert judge.asked == []


def test_it_weighs_something_where_checks_bear_it_out_and_nothing_where_there_are_none(bench, judge):
    dice = random.Random(5)

    def say(asked: dict[str, Any]) -> str:
        """Right nine times in ten, whichever stands first."""
        right = random.Random("".join(sorted((asked["first"], asked["second"])))).random() < 0.9
        return json.dumps({"better": "first" if (asked["first"].startswith("card")) == right else "second"})

    judge.say, judge.answer = say, lambda body: "unlike" if "card" in body["messages"][0]["content"] else "card else"
    it = bench(judge.as_critic(per_day=1000), JudgesHandler)
    goods = {f"ep_{i}": dice.random() < 0.5 for i in range(100)}
    it.take(
        *(
            it.call(f"c {id}", f"{'card' if good else 'loan'} {id}?", f"{'card' if good else 'loan'} {id}", episode=id)
            for id, good in goods.items()
        )
    )
    alone, checked, thumbed = Reliability(), Reliability(), Reliability()
    for id, good in goods.items():
        words = [Piece(source_of(word), rater_of(word), word.success) for word in it.episodes[id].turns[0].feedback]
        assert {piece.source for piece in words} == {"critic:self"}
        alone.learn(words)
        thumbed.learn([*words, Piece("thumb", id, float(good))])
        checked.learn([*words, Piece("check:sum", None, float(good)), Piece("thumb", id, float(good))])
    assert sum(alone.weighs("critic:self")) == 0.0
    assert sum(thumbed.weighs("critic:self")) == 0.0, "what people like is not what it is held against"
    assert sum(checked.weighs("critic:self")) / 2 > 0.5


def test_a_critic_without_a_place_to_ask_it_is_refused(tmp_path):
    path = tmp_path / "reward.toml"
    path.write_text('[critic]\nrubric = "It is right."\n')
    with pytest.raises(ConfigError, match=r"critic\.url"):
        load(str(path))
