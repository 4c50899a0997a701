"""Which logged calls an off-policy estimate may use, and what is said of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from everloop.event import Sampling
from everloop.topics import SCORES

from pipelines import answered as module
from pipelines.answered import Answered, Learned, answered

NOON = 1_763_900_000.0
NOTHING = Learned()


def read(loop: Any, *, learned: Learned = NOTHING, since: float = 0.0, most: int = 100) -> Answered:
    return answered(loop.store, "acme", "desk", base="smollm2", since=since, most=most, learned=learned)


def test_a_rated_call_comes_with_its_tokens_probabilities_and_label(make: Any, loop: Any) -> None:
    (episode,) = loop.take(make.event(make.call(model="smollm2")), make.event(make.thumb(1)))[-1:]
    loop.keep([make.score(episode, label=1.0, source="feedback")], SCORES.name)
    found = read(loop)
    (item,) = found.items
    assert found.left_out == {}
    assert found.held == [False]
    assert item.label == 1.0
    assert item.span == (2, 4)
    np.testing.assert_array_equal(item.tokens, [1, 5, 7, 2])
    np.testing.assert_allclose(item.logprobs, [0, 0, -0.5, -0.25])


def test_a_call_that_nobody_scored_is_there_without_a_label(make: Any, loop: Any) -> None:
    loop.take(make.event(make.call()))
    (item,) = read(loop).items
    assert item.label is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tokens": None}, module.NO_TOKENS),
        ({"sampling": Sampling(temperature=0.0)}, module.NO_SUPPORT),
        ({"sampling": Sampling(top_p=0.9)}, module.NO_SUPPORT),
        ({"sampling": Sampling(constrained=True)}, module.NO_SUPPORT),
        ({"model": "another"}, module.ANOTHER_BASE),
    ],
)
def test_what_cannot_be_weighed_is_left_out_and_counted(
    make: Any, loop: Any, fields: dict[str, Any], reason: str
) -> None:
    loop.take(
        make.event(make.call("c1", **fields), episode="ep_1"), make.event(make.call("c2"), "e-c2", episode="ep_2")
    )
    found = read(loop)
    assert [item.call for item in found.items] == ["c2"]
    assert found.left_out == {reason: 1}


def test_failed_and_synthetic_calls_and_those_of_others_are_not_read_at_all(make: Any, loop: Any) -> None:
    loop.take(
        make.event(make.call("c1", error="timeout"), "e1", episode="ep_1"),
        make.event(make.call("c2"), "e2", episode="ep_2", synthetic=True),
        make.event(make.call("c3"), "e3", episode="ep_3", tenant="other"),
        make.event(make.call("c4"), "e4", episode="ep_4", policy="clerk"),
    )
    assert read(loop) == Answered([], [], {})


def test_the_newest_calls_are_taken_and_none_from_before(make: Any, loop: Any) -> None:
    for number in range(5):
        loop.take(make.event(make.call(f"c{number}"), f"e{number}", episode=f"ep_{number}", time=NOON + number))
    assert [item.call for item in read(loop, most=2).items] == ["c3", "c4"]
    assert [item.call for item in read(loop, since=NOON + 2).items] == ["c2", "c3", "c4"]


def test_what_the_candidate_learned_from_or_may_have_is_left_out(make: Any, loop: Any) -> None:
    for number in range(4):
        loop.take(make.event(make.call(f"c{number}"), f"e{number}", episode=f"ep_{number}", time=NOON + number))
    found = read(loop, learned=Learned(frozenset({"ep_3"}), NOON + 1))
    assert [item.call for item in found.items] == ["c1", "c2"]
    assert found.left_out == {module.LEARNED: 2}


def test_held_out_episodes_were_not_learned_from_whenever_they_were(make: Any, loop: Any) -> None:
    loop.take(make.event(make.call()))
    (item,) = read(loop).items
    assert Learned(until=NOON + 9).has(item, held=False)
    assert not Learned(until=NOON + 9).has(item, held=True)
