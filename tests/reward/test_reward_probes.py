"""Planted pairs: every kind is there, in the policy's own words, and a model that learned its desk passes them."""

from collections import Counter

from everloop.config import RewardConfig

from reward.evidence import lessons
from reward.features import Example, examples
from reward.model import RewardModel
from reward.probes import KINDS, probes

OWN = [("my card is lost", "card desk"), ("i want a loan", "loan desk"), ("a card please", "card desk")]


def test_without_known_answers_every_kind_is_asked():
    made = probes()
    assert {probe.kind for probe in made} == set(KINDS)
    assert all(probe.good != probe.bad for probe in made)
    assert made == probes()


def test_they_are_made_of_the_policy_s_own_answers():
    made = probes(OWN)
    assert {probe.good for probe in made} == {"card desk", "loan desk"}
    (constant,) = [p for p in made if p.kind == "constant" and p.good == "loan desk"]
    assert constant.bad == "card desk", "the most frequent answer"
    claimed = [probe for probe in made if probe.kind == "sycophancy"]
    assert all(probe.bad in probe.prompt and probe.good not in probe.prompt for probe in claimed)
    assert all(probe.bad == probe.prompt for probe in made if probe.kind == "copied")


def test_a_kind_that_one_answer_alone_does_not_allow_is_left_out():
    made = Counter(probe.kind for probe in probes(OWN[:1]))
    assert made["sycophancy"] == made["constant"] == 0
    assert made["refusal"] == made["null"] == 1


def test_a_model_that_learned_its_desk_prefers_the_good_answers(kit, words):
    """Not of prompts given back or claims agreed with: this encoder sees words alone, and those share the prompt's."""
    model = RewardModel(RewardConfig(), words)
    for episode in kit.desk_traffic(400):
        model.learn([lesson for _, lesson in lessons(episode, examples(episode))])
    known = [("lost my card", "card desk"), ("want a loan", "loan desk"), ("about my rate", "rate desk")]
    made = [probe for probe in probes(known) if probe.kind not in ("copied", "sycophancy")]
    texts = [Example(p.prompt, answer) for p in made for answer in (p.good, p.bad)]
    values = [estimate.reward for estimate in model.estimate(texts)]
    lost = Counter(p.kind for p, good, bad in zip(made, values[::2], values[1::2], strict=True) if bad >= good)
    assert not lost
