"""Feedback to ordered pairs."""

from __future__ import annotations

from everloop.event import Message
from everloop.feedback import Feedback, FeedbackKind

from pipelines.preferences import preferences
from reward.features import structures

PAIR = {"kind": "preference", "time": 1_763_900_000.0, "chosen": "b", "rejected": "a"}


def test_a_preference_and_a_correction_become_pairs_to_the_same_prompt(loop, make):
    messages = (
        Message(role="user", content="hello"),
        Message(role="assistant", content="yes?"),
        Message(role="user", content="my card?"),
    )
    said = [make.event(Feedback(id="p", call="c1", **PAIR)), make.event(make.correction("card_lost"))]
    (episode,) = loop.take(make.event(make.call(messages=messages)), *said)
    found = [(one.prompt, one.chosen, one.rejected, one.source) for one in preferences(episode)]
    assert found == [
        ("my card?", "b", "a", FeedbackKind.PREFERENCE),
        ("my card?", "card_lost", "card_arrival", FeedbackKind.CORRECTION),
    ]


def test_a_correction_that_agrees_with_the_answer_is_no_pair(loop, make):
    (episode,) = loop.take(make.event(make.call()), make.event(make.correction("card_arrival")))
    assert preferences(episode) == ()


def test_a_correction_of_the_whole_is_one_of_the_last_answer(loop, make):
    events = [make.event(make.call("a"), seq=0), make.event(make.call("b", answer="wrong"), seq=1)]
    (episode,) = loop.take(*events, make.event(make.correction("right", None)))
    assert [(one.call, one.rejected) for one in preferences(episode)] == [("b", "wrong")]


def test_answers_to_one_request_are_one_turn_and_the_first_stands_for_it(loop, make):
    calls = [make.call(f"c{choice}", answer=f"answer {choice}", choice=choice) for choice in range(3)]
    events = [make.event(make.call("before", asked="hello"), seq=0), *(make.event(call, seq=1) for call in calls)]
    (episode,) = loop.take(*events, make.event(make.correction("right", None)))
    assert episode.positions == (0, 1, 1, 1)
    assert [(one.call, one.rejected) for one in preferences(episode)] == [("c0", "answer 0")]
    rows = loop.store.rows("SELECT call, turn, turns, correction FROM turns ORDER BY turn, call")
    assert [(r["call"], r["turn"], r["turns"], r["correction"]) for r in rows] == [
        ("before", 0, 2, None),
        ("c0", 1, 2, "right"),
        ("c1", 1, 2, None),
        ("c2", 1, 2, None),
    ]
    assert [one.turn for one in structures(episode)] == [0, 1, 1, 1]


def test_the_store_has_them_typed(loop, make):
    loop.take(make.event(make.call()), make.event(make.correction("card_lost")))
    assert loop.store.rows("SELECT prompt, chosen, rejected, source, rater FROM preferences") == [
        {
            "prompt": "Where is my card?",
            "chosen": "card_lost",
            "rejected": "card_arrival",
            "source": "correction",
            "rater": "rita",
        }
    ]
