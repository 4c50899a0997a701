"""Prototypes: nearness before any label, learning from labels in any order, a bounded number of answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.prototypes import NAMES, Prototypes, key_of

AXES = np.eye(4, dtype=np.float32)
ALL = np.ones(2, np.float32)


def seen(known, prompt, answer, own):
    features = known.features(prompt[None], np.array([0]), [key_of(answer)], own[None], np.array([0]))
    return dict(zip(NAMES, features.mean(0)[0].tolist(), strict=True))


def test_an_answer_that_was_never_rated_is_judged_by_its_nearness():
    known = Prototypes(2, 4)
    assert seen(known, AXES[0], "a", AXES[0])["similarity"] == pytest.approx(0.5)
    assert seen(known, AXES[0], "b", AXES[1])["similarity"] == pytest.approx(-0.5)


def test_good_ratings_draw_the_centre_to_their_prompts():
    known = Prototypes(2, 4)
    for _ in range(6):
        known.add(key_of("a"), AXES[0], AXES[3], ALL, 1.0, 0.0)
    # 6 prompts on axis 3, and the answer itself on axis 0 with weight 1 or 4: cosines 6 / √37 and 6 / √52
    expected = (6 / 37**0.5 + 6 / 52**0.5) / 2 - 0.5
    assert seen(known, AXES[3], "a", AXES[0])["similarity"] == pytest.approx(expected, abs=1e-6)
    assert seen(known, AXES[3], "a", AXES[0])["chosen"] > 0.99


def test_a_rival_that_fits_better_speaks_against_an_answer():
    known = Prototypes(2, 4)
    known.add(key_of("rival"), AXES[1], AXES[0], ALL, 3.0, 0.0)
    alone = Prototypes(2, 4)
    assert seen(known, AXES[0], "new", AXES[2])["rival"] < seen(alone, AXES[0], "new", AXES[2])["rival"] == 0


def test_bad_ratings_are_remembered_near_their_prompts_alone():
    known = Prototypes(2, 4)
    known.add(key_of("a"), AXES[0], AXES[3], ALL, 0.0, 3.0)
    assert seen(known, AXES[3], "a", AXES[0])["badly_rated"] == pytest.approx(0.5)
    assert seen(known, AXES[2], "a", AXES[0])["badly_rated"] == pytest.approx(0.0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=1, max_size=20), st.randoms())
def test_every_order_of_labels_gives_the_same(labels, random):
    shuffled = list(labels)
    random.shuffle(shuffled)
    features = []
    for order in (labels, shuffled):
        known = Prototypes(2, 4)
        for prompt, answer, good in order:
            known.add(key_of(str(answer)), AXES[answer], AXES[prompt], ALL, float(good), float(not good))
        features.append([list(seen(known, AXES[p], str(a), AXES[a]).values()) for p in range(4) for a in range(4)])
    np.testing.assert_allclose(features[0], features[1], atol=1e-5)


def test_capacity_holds_and_the_least_labelled_answer_makes_room():
    known = Prototypes(2, 4, capacity=3)
    for name, weight in (("a", 3.0), ("b", 1.0), ("c", 2.0), ("d", 1.0)):
        known.add(key_of(name), AXES[0], AXES[1], ALL, weight, 0.0)
    assert set(known.rows) == {key_of("a"), key_of("c"), key_of("d")}
    assert known.own.shape[0] <= 3
    assert seen(known, AXES[1], "b", AXES[0])["support"] == 0


def test_packed_rows_come_back_the_same_bits():
    random = np.random.default_rng(1)
    known, back = Prototypes(2, 4), Prototypes(2, 4)
    for i in range(40):
        members = random.integers(0, 2, 2).astype(np.float32)
        prompt = random.normal(size=4).astype(np.float32)
        known.add(key_of(str(i % 20)), AXES[i % 4], prompt, members, random.random(), random.random())
    for row in range(20):
        back.unpack(row, known.pack(row))
    back.totals[:] = known.totals
    assert back.rows == known.rows
    for name in ("good", "bad", "counts", "own", "_centres", "_faults"):
        axis = {"good": 1, "bad": 1, "counts": 2}.get(name, 0)
        assert np.array_equal(
            getattr(known, name).take(range(20), axis=axis), getattr(back, name).take(range(20), axis=axis)
        )


def test_a_cut_row_is_refused():
    known = Prototypes(2, 4)
    known.add(key_of("a"), AXES[0], AXES[1], ALL, 1.0, 0.0)
    with pytest.raises(ValueError, match="row 0"):
        Prototypes(2, 4).unpack(0, known.pack(0)[:-4])


def test_white_space_does_not_make_another_answer():
    assert key_of(" card  arrival\n") == key_of("card arrival") != key_of("card")
