"""Over-optimisation: two windows on end with a rising proxy and no gain on gold, and nothing less, stop training."""

import math

import pytest

from pipelines.overoptimise import Window, verdict

PARTED = Window("r", 0.2, -0.01, 100, 10.0)
FLAT = Window("r", 0.2, 0.0, 100, 11.0)
GOOD = Window("r", 0.2, 0.03, 100, 12.0)
STILL = Window("r", 0.0, -0.01, 100, 13.0)


@pytest.mark.parametrize(
    "windows", [[], [PARTED], [PARTED, GOOD], [GOOD, PARTED], [PARTED, STILL], [PARTED, GOOD, FLAT]]
)
def test_training_goes_on(windows):
    assert verdict(windows) is None


@pytest.mark.parametrize("windows", [[PARTED, FLAT], [GOOD, FLAT, PARTED], [FLAT, FLAT, FLAT]])
def test_training_stops(windows):
    assert "the reward model was pleased and gold was not" in str(verdict(windows))


def test_the_sentence_has_the_numbers():
    assert "+0.20 reward, -1.0 gold points over 100 items and +0.20 reward, +0.0 gold points" in str(
        verdict([PARTED, FLAT])
    )


def test_what_a_person_looked_at_counts_no_more():
    assert verdict([PARTED, FLAT], since=10.5) is None
    assert verdict([PARTED, FLAT, FLAT._replace(time=14.0)], since=10.5)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_number_stops_nothing(broken):
    assert verdict([PARTED, FLAT._replace(proxy=broken)]) is None
    assert verdict([PARTED, FLAT._replace(gold=-broken)]) is None
