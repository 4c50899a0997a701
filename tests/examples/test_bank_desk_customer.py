"""The simulated customer: the shares that it promises, and the same opinion however often it is asked."""

from __future__ import annotations

import pytest

from examples.bank_desk.customer import Customer


@pytest.mark.parametrize("answer", ["right", "wrong"])
def test_shares_are_as_promised(answer: str) -> None:
    opinions = [Customer(seed=3).judge(number, "right", answer) for number in range(20_000)]
    thumbs = [opinion.thumb for opinion in opinions if opinion.thumb is not None]
    assert len(thumbs) / 20_000 == pytest.approx(0.6, abs=0.015)
    assert sum(thumb != (answer == "right") for thumb in thumbs) / len(thumbs) == pytest.approx(0.05, abs=0.01)
    corrected = sum(opinion.correction == "right" for opinion in opinions) / 20_000
    assert corrected == pytest.approx(0.05 if answer == "wrong" else 0.0, abs=0.006)


def test_an_opinion_depends_on_seed_and_number_alone() -> None:
    one, two = Customer(seed=1), Customer(seed=2)
    assert [one.judge(n, "a", "b") for n in range(99)] == [one.judge(n, "a", "b") for n in reversed(range(99))][::-1]
    assert [one.judge(n, "a", "b") for n in range(99)] != [two.judge(n, "a", "b") for n in range(99)]
    assert one.name(4) != two.name(4)
