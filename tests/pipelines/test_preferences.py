"""Feedback to ordered pairs."""

from __future__ import annotations

from everloop.event import Message
from everloop.feedback import Feedback, FeedbackKind

from pipelines.preferences import preferences

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
