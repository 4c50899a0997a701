"""The guards' tests: their error rates however often one looks, and how soon they act."""

from __future__ import annotations

import numpy as np

from pipelines.guards import ALPHA, Lengths, blamed, e_value, longer


def test_the_coin_is_fair_on_average_and_seldom_called_loaded() -> None:
    heads = np.random.default_rng(3).random((4000, 200)) < 0.5
    first = np.cumsum(heads, axis=1)
    table = np.array([[e_value(a, n - a) for a in range(n + 1)] + [0.0] * (200 - n) for n in range(201)])
    seen = table[np.arange(1, 201), first]
    assert abs(seen[:, 4].mean() - 1) < 0.2  # a martingale that begins at 1
    assert (seen.max(axis=1) >= 1 / ALPHA).mean() <= ALPHA + 3 * np.sqrt(ALPHA / 4000)


def test_how_many_units_are_affected_before_a_guard_acts() -> None:
    assert next(n for n in range(100) if blamed(n, 0)) == 9
    assert not blamed(0, 50)
    assert not blamed(30, 25)
    assert blamed(80, 30)


def test_lengths_are_compared_with_certainty() -> None:
    twice, usual = Lengths(60, 5.0 + np.log(2), 0.5), Lengths(60, 5.0, 0.5)
    assert round(longer(twice, usual) or 0, 3) == 2.0
    assert longer(usual, usual) is None
    assert longer(usual, twice) is None
    assert longer(twice._replace(units=19), usual) is None
