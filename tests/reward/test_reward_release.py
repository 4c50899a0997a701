"""Which snapshots take over: paired on labels new to both, with the sentence that says why not."""

import json
import os

import numpy as np
import pytest
from everloop.config import Config, RewardConfig
from everloop.run import RewardVersion
from everloop.score import Score

from reward import snapshot
from reward.desk import Desk
from reward.features import Example
from reward.handler import RewardHandler
from reward.model import Label, RewardModel
from reward.release import Shadow, delong
from tests.reward.conftest import run


@pytest.fixture
def new_handler(home, words):
    config = Config.model_validate({"home": home.root, "tenants": {"default": {}}})
    return lambda: RewardHandler(config, home, lambda name: words)


@pytest.fixture
def learned(home, words, kit):
    """A model that has learned from the first rated episodes of the desk."""

    def learn(count, flip=False):
        model = RewardModel(Config(home=home.root).policy("default", "assistant").reward, words)
        model.learn([lesson(one, flip) for one in kit.desk_traffic(count)])
        return model

    return learn


def lesson(episode, flip=False):
    (turn,) = episode.turns
    up = (turn.feedback[0].value > 0) != flip
    return Label(episode.id, example(episode), float(up))


def example(episode):
    (turn,) = episode.turns
    return Example(turn.call.messages[0].content, turn.call.output.content)


def shadowed(kit, incumbent, candidate, labels=120):
    shadow = Shadow(500)
    for one in kit.desk_traffic(400)[-labels:]:
        values = [model.estimate([example(one)])[0].value for model in (incumbent, candidate)]
        shadow.add(*values, lesson(one).value, example(one))
    return shadow


def test_the_paired_difference_of_auc_has_the_error_that_resampling_finds():
    rng = np.random.default_rng(3)
    labels = (rng.random(300) < 0.4).astype(float)
    first = labels + rng.normal(size=300)
    second = labels + 0.5 * first + rng.normal(size=300)
    apart, error = delong(first, second, labels)
    drawn = []
    for _ in range(400):
        rows = rng.integers(0, 300, 300)
        drawn.append(delong(first[rows], second[rows], labels[rows])[0])
    assert apart > 0
    assert error == pytest.approx(np.std(drawn), rel=0.2)
    assert delong(first, first, labels) == (0.0, 0.0)


def test_a_better_candidate_takes_over_and_a_worse_one_is_refused_with_why(learned, kit):
    good, bad = learned(200), learned(200, flip=True)
    better = shadowed(kit, bad, good).judge(bad, good)
    worse = shadowed(kit, good, bad).judge(good, bad)
    assert better.takes_over
    assert better.evidence["auc"] > better.evidence["incumbent_auc"]
    assert not worse.takes_over
    assert "worse by more than chance" in worse.reason
    assert worse.evidence["auc_upper"] < 0


def test_an_equal_candidate_takes_over_and_few_labels_decide_nothing(learned, kit):
    one, two = learned(200), learned(200)
    assert shadowed(kit, one, two).judge(one, two).takes_over
    few = shadowed(kit, one, two, labels=10).judge(one, two)
    assert not few.takes_over
    assert few.reason.startswith("waits: 10 labels")


def test_a_candidate_waits_until_a_loss_can_be_ruled_out(learned, kit):
    """It is as good as the incumbent on the whole and differs by chance: few pairs leave open what many rule out."""
    model, rng, shadow = learned(200), np.random.default_rng(5), Shadow(4000)
    for number in range(4000):
        label = float(number % 2)
        both = 0.5 + 0.2 * (label - 0.5) + 0.1 * rng.normal()
        incumbent, candidate = both + 0.03 * rng.normal(size=2)
        shadow.add(incumbent, candidate, label, Example("asked", "answered"))
        if number == 99:
            verdict = shadow.judge(model, model)
            assert not verdict.takes_over
            assert verdict.reason.startswith("waits: over 100 labels new to both")
            assert "cannot be ruled out yet, 0.01 may be lost" in verdict.reason
    assert shadow.judge(model, model).evidence["auc_lower"] >= -0.01


def test_what_is_not_finite_never_takes_over(learned, kit):
    good, broken = learned(200), learned(200)
    broken.heads.shared[0, 0] = np.nan
    verdict = Shadow(500).judge(good, broken)
    assert (verdict.takes_over, "not finite" in verdict.reason) == (False, True)


def test_a_candidate_that_likes_planted_answers_is_refused(learned, kit):
    good, fooled = learned(200), learned(200)
    shadow = shadowed(kit, good, fooled)
    fooled.heads.own[:] *= -1
    verdict = shadow.judge(good, fooled)
    assert not verdict.takes_over
    assert verdict.evidence["planted_lose"] < verdict.evidence["incumbent_planted_lose"] - 0.2
    assert "saying nothing beats" in verdict.reason


def test_opinions_that_follow_length_are_refused(learned, kit):
    model = learned(200)
    shadow = Shadow(500)
    for i in range(200):
        words, up = 1 + i % 40, float(i % 2)
        candidate = 0.5 * up + words / 80
        shadow.add(0.3 + 0.4 * up, candidate, up, Example("asked", "word " * words))
    verdict = shadow.judge(model, model)
    assert not verdict.takes_over
    assert verdict.evidence["length_correlation"] > 0.5


def test_turned_labels_keep_the_version_before_and_the_scores_by_it(new_handler, kit):
    """From some moment on everything that is learned is wrong, and what people then say is right again."""
    honest = kit.desk_traffic(500)
    turned = [
        one.model_copy(
            update={
                "turns": tuple(t.model_copy(update={"feedback": (kit.thumb(-t.feedback[0].value),)}) for t in one.turns)
            }
        )
        for one in honest[200:300]
    ]
    handler, state = new_handler(), kit.MemoryState()
    run(handler, state, kit.records(*honest[:200]))
    before = handler.status()["default/assistant"]["version"]
    (desk,) = handler._desks.values()
    desk.live.learn([lesson(one) for one in turned] * 3)  # what only the live model hears
    outputs = run(handler, state, kit.records(*honest[300:360], start=200))
    versions = kit.decoded(RewardVersion, outputs, "reward-versions")
    assert versions
    assert versions[0].state == "refused"
    assert versions[0].reason.startswith("refused: ")
    status = handler.status()["default/assistant"]
    assert status["version"] == before
    assert status["refused_version"] == versions[-1].version
    assert {score.reward_version for score in kit.decoded(Score, outputs, "scores")} == {before}


def test_a_restart_and_a_rebuild_decide_the_same(new_handler, home, kit):
    records = kit.records(*kit.desk_traffic(260))
    whole, parts = kit.MemoryState(), kit.MemoryState()
    at_once = kit.decoded(RewardVersion, run(new_handler(), whole, records), "reward-versions")
    again = []
    for start in range(0, 260, 20):
        again += run(new_handler(), parts, records[start : start + 20], batch=7)
    assert kit.decoded(RewardVersion, again, "reward-versions") == at_once
    judged = [one for one in at_once if "auc_lower" in one.evidence]
    assert len(judged) >= 3
    assert all(one.evidence["auc_lower"] >= -0.01 for one in judged if one.state == "released")
    assert all("AUC" in one.reason for one in judged if one.evidence["auc_lower"] < -0.01)
    held = [json.loads(state.entries["model/default/assistant/desk"]) for state in (whole, parts)]
    assert held[0]["shadow"] == held[1]["shadow"]


def test_the_version_that_a_person_went_back_to_is_the_last_to_make_room(words, home, kit, monkeypatch):
    monkeypatch.setattr(snapshot, "KEPT", 3)
    desk, folder = (
        Desk("default", "assistant", RewardConfig(), words, home.root),
        home.root / "rewards/default/assistant",
    )
    made = []
    for number, one in enumerate(kit.desk_traffic(60)):
        desk.learn(lesson(one))
        if number % 15 == 14:
            if len(made) == 3:
                for age, version in enumerate(made):
                    os.utime(folder / version / "model.json", (age, age))
                desk.score_by_order(made[0])
                desk.pinned = "by ada: it was good"
            made.append(desk.freeze(float(number)).version)
    assert desk.version == made[0]
    assert {version for version in made if (folder / version).exists()} == {made[0], *made[2:]}
