"""What a score owes to length is learned of the newest lessons and taken out; nothing of it where there is no slope."""

import numpy as np
import pytest
from everloop.config import RewardConfig

from reward import durable, model, snapshot
from reward.features import Example
from reward.length import BAD, GOOD, PAIR, WORDS, Length, length_of
from reward.model import Label, Pair, RewardModel


def taught(slope, count=3000, seed=0, usual=2.0):
    random, made = np.random.default_rng(seed), Length()
    for _ in range(count):
        said = int(random.integers(3))
        length = float(random.normal(0 if said == PAIR else usual, 1))
        made.add(said, length, slope * length + 2.0 * said + float(random.normal(0, 0.5)), 1.0)
    return made


@pytest.mark.parametrize("slope", [-0.4, 0.0, 0.4])
def test_the_slope_is_that_within_labels_held_a_little_to_none(slope):
    """Labels shift the logits here, which is no slope; the prior keeps 500 faded lessons from being believed whole."""
    assert taught(slope).slope == pytest.approx(slope * 500 / 700, abs=0.05)


def test_it_follows_the_newest_lessons():
    made, random = taught(0.4), np.random.default_rng(1)
    before = made.slope
    for _ in range(2000):
        length = float(random.normal(2, 1))
        made.add(GOOD, length, -0.4 * length, 1.0)
    assert before > 0.2
    assert made.slope < -0.2


def test_words_that_no_encoder_reads_count_no_more():
    assert length_of("a " * WORDS) == length_of("a " * 10 * WORDS) > length_of("a " * (WORDS - 1))
    assert Length().part(["", "a b"]).tolist() == [0.0, 0.0]


def test_an_answer_of_the_usual_length_owes_nothing():
    made = Length()
    for number in range(400):
        words = number % 20 + 1
        made.add((BAD, GOOD)[number % 2], length_of("a " * words), 0.1 * words, 1.0)
    usual = round(np.exp(made.usual) - 1)
    short, middle, long = made.part(["a", "a " * usual, "a " * 80]).tolist()
    assert short < -0.1 < abs(middle) < 0.1 < long


@pytest.fixture(scope="module")
def short_is_liked(words):
    """Half of the words of a long answer come again and again, so that this encoder's vectors tell its length."""
    random, made = np.random.default_rng(0), RewardModel(RewardConfig(), words)
    for i in range(500):
        short, long = (" ".join(["fact", str(random.integers(1000)), *["indeed so"] * more]) for more in (1, 12))
        better = (short, long) if random.random() < 0.85 else (long, short)
        made.learn([Pair(f"p{i}", f"asked {random.integers(1000)}", *better)])
    return made


def test_a_taste_for_short_answers_is_taken_out_of_the_score(short_is_liked, monkeypatch):
    def apart():
        said = [" ".join(["fact", "7", *["indeed so"] * more]) for more in (1, 12)]
        short, long = short_is_liked.estimate([Example("asked 7", answer) for answer in said])
        return float(np.mean(short.logits) - np.mean(long.logits))

    corrected = apart()
    monkeypatch.setattr(short_is_liked, "length", Length())
    vectors_alone = apart()
    monkeypatch.setattr(model, "STYLE_IS_SCORED", True)
    assert abs(corrected) < 0.8 * vectors_alone
    assert vectors_alone < apart(), "style, scored, tells it too"


def test_it_is_part_of_version_snapshot_and_state(short_is_liked, words, tmp_path):
    version = short_is_liked.save(tmp_path)
    loaded = RewardModel.load(tmp_path / version, words)
    assert loaded.length.slope == short_is_liked.length.slope < 0
    config, live, state = RewardConfig(), RewardModel(RewardConfig(), words), {}
    for i in range(60):
        live.learn([Label(f"l{i}", Example(f"p {i % 7}", "so " * (i % 9 + 1)), float(i % 9 < 4))])
        state.update(durable.changes(live))
    back = RewardModel(config, words)
    assert durable.restore(back, sorted(state.items()))
    assert back.length.slope == live.length.slope != 0
    before = snapshot.version_of(back)
    assert before == snapshot.version_of(live)
    back.length.add(GOOD, 1.0, 1.0, 1.0)
    assert snapshot.version_of(back) != before
