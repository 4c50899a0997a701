"""Changes of three kinds are told apart, and nothing is said where nothing changed."""

import numpy as np
import pytest
from everloop.config import RewardConfig

from reward import durable, snapshot
from reward.drift import SPAN, Detector, Drift
from reward.features import Example
from reward.model import Label, RewardModel

SIZE = 48


def told_of(changes, seed, count=1600):
    """Kinds that were alarmed in the second half of a stream whose three sides change at its middle, or do not."""
    random, drift = np.random.default_rng(seed), Drift(SIZE)
    topics = random.normal(size=(2, SIZE))
    for i in range(count):
        late = i >= count // 2
        topic = topics[int("inputs" in changes and late)]
        prompt = topic / 7 + random.normal(size=SIZE) / 7
        drift.asked((prompt / np.linalg.norm(prompt)).astype(np.float32))
        good = 0.35 if "labels" in changes and late else 0.6
        foretold = float(np.clip(good + random.choice([-0.3, 0.3]), 0.05, 0.95))
        meant = foretold if not ("calibration" in changes and late) else 1.2 - foretold
        drift.told(float(random.random() < meant), foretold)
    return {kind for kind, many in drift.counts.items() if many}


@pytest.mark.parametrize("changes", [{"inputs"}, {"labels"}, {"calibration"}, {"inputs", "labels"}])
def test_planted_drift_is_told_apart(changes):
    """At least 7 of 8 streams give exactly what was planted."""
    found = [told_of(changes, seed) for seed in range(8)]
    assert sum(one == changes for one in found) >= 7, found


def test_a_stationary_stream_gives_no_alarm():
    """At most one of forty streams of 1600 calls and labels."""
    assert len([seed for seed in range(1000, 1040) if told_of(set(), seed)]) <= 1


def test_detectors_go_on_from_their_bytes_to_the_same_alarm():
    random, one, other = np.random.default_rng(0), Drift(SIZE), Drift(SIZE)
    for i in range(3 * SPAN):
        label = float(random.random() < (0.6 if i < 2.5 * SPAN else 0.2))
        if i % 300 == 0:
            other = Drift(SIZE)
            other.unpack(one.pack())
        assert one.told(label, 0.6) == other.told(label, 0.6)
    assert one.pack() == other.pack()
    assert one.counts["labels"] == 1
    assert len(one.pack()) < 7 * (2 * SPAN + 2) + 1
    for cut in (-1, 1):
        with pytest.raises(ValueError, match="bytes of drift"):
            Drift(SIZE).unpack(one.pack()[:cut])


def test_what_is_not_finite_is_not_counted():
    detector = Detector(0.01)
    assert not any(detector.add(value) for value in (float("nan"), float("inf"), -float("inf")))
    assert not detector.values


def turned(words, **config):
    """A model of which every label means the opposite from its 600th on."""
    model = RewardModel(RewardConfig(**config), words)
    things, random = ("card", "loan", "rate", "pin"), np.random.default_rng(3)
    for i in range(900):
        asked, answered = random.choice(things, 2)
        right = (asked == answered) == (i < 600)
        model.learn([Label(f"l{i}", Example(f"{asked} {i % 9}", f"{answered} desk"), float(right))])
        if model.drift.counts["calibration"]:
            break
    return model


def test_a_drift_does_what_the_configuration_says(words):
    quiet = turned(words, on_drift={})
    assert quiet.drift.counts["calibration"] == 1
    assert not quiet.frozen
    assert len(turned(words, on_drift={"calibration": ("recalibrate",)}).calibration.pairs) == 100
    assert turned(words, on_drift={"calibration": ("freeze",)}).frozen
    retrained = turned(words, on_drift={"calibration": ("retrain",)})
    assert retrained.updates == quiet.updates
    assert np.abs(retrained.heads.shared - quiet.heads.shared).max() > 1e-3


def test_a_drift_and_what_it_froze_survive_a_restart(words):
    live = turned(words, on_drift={"calibration": ("freeze", "recalibrate", "retrain")})
    back = RewardModel(live.config, words)
    assert durable.restore(back, sorted(durable.changes(live)))
    assert back.frozen
    assert back.drift.counts == live.drift.counts
    assert snapshot.version_of(back) == snapshot.version_of(live)
