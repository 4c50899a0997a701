"""AUC, calibration error and Platt's line by worked examples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.calibration import FEWEST, Calibration, auc, calibration_error, solved


def test_auc_by_hand():
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == 0.75
    assert auc(np.array([0.5, 0.5]), np.array([0, 1])) == 0.5
    assert auc(np.array([0.5, 0.6]), np.array([1, 1])) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=30))
def test_auc_is_the_share_of_pairs_in_the_right_order(pairs):
    predicted, labels = np.array([p / 10 for p, _ in pairs]), np.array([float(label) for _, label in pairs])
    ups, downs = predicted[labels == 1], predicted[labels == 0]
    found = auc(predicted, labels)
    if not len(ups) or not len(downs):
        assert found is None
    else:
        above = (ups[:, None] > downs).mean() + (ups[:, None] == downs).mean() / 2
        assert found == pytest.approx(above)


def test_calibration_error_by_hand():
    predicted = np.array([0.1] * 10 + [0.8] * 10)
    labels = np.array([0.0] * 9 + [1.0] + [1.0] * 6 + [0.0] * 4)
    # the first half says 0.1 and is right a tenth of the time; the second says 0.8 and is right in 0.6
    assert calibration_error(predicted, labels, bins=2) == pytest.approx(0.1)


def test_line_corrects_overconfident_logits():
    random = np.random.default_rng(0)
    calibration = Calibration(500)
    for _ in range(500):
        logit = random.normal()
        calibration.add(3 * logit - 1, 0.5, float(random.random() < 1 / (1 + np.exp(-logit))))
    slope, shift, slips = calibration.curve
    assert slope == pytest.approx(1 / 3, abs=0.1)
    assert shift == pytest.approx(1 / 3, abs=0.25)
    assert slips < 0.08


def test_nothing_is_said_of_too_few_or_of_one_kind():
    calibration = Calibration(100)
    for _ in range(FEWEST - 1):
        calibration.add(2.0, 0.9, 1.0)
    assert (calibration.auc, calibration.error, calibration.curve[0]) == (None, None, 1.0)
    calibration.add(2.0, 0.9, 1.0)
    assert calibration.auc is None
    assert calibration.error == pytest.approx(0.1)
    assert np.isfinite(calibration.curve).all()


def test_window_forgets():
    calibration = Calibration(50)
    for i in range(200):
        calibration.add(0.0, 0.5, float(i >= 150))
    assert len(calibration.pairs) == 50
    assert calibration.error == pytest.approx(0.5)


def test_slips_are_found_and_nothing_is_ever_sure():
    random = np.random.default_rng(1)
    calibration = Calibration(2000)
    for _ in range(2000):
        good = random.random() < 0.5
        slipped = random.random() < 0.1
        calibration.add(6.0 if good else -6.0, 0.5, float(good != slipped))
    assert calibration.curve[2] == pytest.approx(0.1, abs=0.03)
    assert calibration.heard(1.0) == pytest.approx(0.9, abs=0.03)


def test_three_equations_are_solved():
    random = np.random.default_rng(3)
    half = random.normal(size=(3, 5))
    known, told = half @ half.T, random.normal(size=3)
    assert solved(np.column_stack([known, told]).tolist()) == pytest.approx(np.linalg.solve(known, told).tolist())


def test_one_answer_is_judged_by_its_topics_line():
    calibration, random = Calibration(200, topics=2), np.random.default_rng(4)
    for i in range(150):
        calibration.add(float(random.normal()), 0.5, float(random.random() < (0.2, 0.9)[i % 2]), topic=i % 2)
    members = [-1.0, 0.3, 2.0]
    for topic in range(2):
        lines = calibration.line(np.array(members), np.array([topic]))
        assert calibration.good(members, topic) == pytest.approx((1 / (1 + np.exp(-lines))).mean())
    assert calibration.good(members, 1) > calibration.good(members, 0)
