"""What says nothing loses from the start, whatever was asked; what people rate well, or thanks allow, does not."""

import numpy as np
import pytest
from everloop.config import RewardConfig

from benchmarks.shortcuts import NOTHING
from reward import explain, hollow, probes
from reward.encoder import Encoder
from reward.features import Example
from reward.hollow import NAMES, SAYINGS, Hollow, closes
from reward.model import Label, RewardModel

TAUGHT = [one for kind in SAYINGS.values() for one in kind]
PROMPT = "How do I reset the password of my router?"
RIGHT = "Hold the small button on its back for ten seconds, then log in with the password on the label."


@pytest.fixture(scope="module")
def minilm():
    return Encoder(threads=1)


def of(encoder, prompt, answer):
    """By kind, how far an answer is of it."""
    asked, said = encoder.encode([prompt]), encoder.encode([answer])
    return dict(zip(NAMES, Hollow().features(encoder, [prompt], asked, said)[0].tolist(), strict=True))


def test_nothing_that_is_measured_with_is_taught():
    planted = [*(text for _, text in NOTHING.values()), *probes.HOLLOW, probes.REFUSAL, *probes.QUESTIONS]
    plain = [{" ".join(text.lower().split()) for text in texts} for texts in (planted, TAUGHT)]
    assert len(plain[1]) == len(TAUGHT)
    assert not plain[0] & plain[1]


@pytest.mark.models
@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("It's always a pleasure to assist you!", "offers"),
        ("Thanks a lot for your question.", "thanks"),
        ("Well, that depends on many things.", "vague"),
        ("See the answer below.", "placeholder"),
        ("Sorry, I cannot answer that.", "declines"),
        ("What do you mean?", "asks_back"),
    ],
)
def test_paraphrases_are_told_by_kind_and_answers_are_not(minilm, answer, kind):
    found = of(minilm, PROMPT, answer)
    assert found[kind] > 0.3
    assert found[kind] == max(found.values())
    assert max(of(minilm, PROMPT, RIGHT).values()) == 0
    assert max(of(minilm, answer, answer).values()) == 0, "what is like its own prompt fits that one"


@pytest.mark.models
def test_it_does_not_hang_on_how_alike_an_encoder_finds_all_texts(minilm):
    class Alike:
        """Every two texts have most of their vectors in common, as with many larger encoders."""

        def encode(self, texts):
            return np.pad(minilm.encode(texts) * np.sqrt(0.3), ((0, 0), (0, 1)), constant_values=np.sqrt(0.7))

    for answer in (RIGHT, "Thanks a lot for your question.", "What do you mean?"):
        assert of(Alike(), PROMPT, answer) == pytest.approx(of(minilm, PROMPT, answer), abs=1e-3)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Thanks!", True),
        ("No, that was all. Bye\nIs there anything else?", True),
        ("Thanks! Where is my card?", False),
        ("Where is my card\nThank you for waiting", False),
        ("I bypass thankless work", False),
    ],
)
def test_thanks_may_be_answered_in_kind(prompt, expected):
    assert closes(prompt) is expected


def beats(model, prompt, first, second):
    one, other = model.estimate([Example(prompt, first), Example(prompt, second)])
    return np.mean(one.logits) > np.mean(other.logits)


@pytest.mark.models
def test_it_loses_before_anything_was_learned_and_may_win_where_it_belongs(minilm):
    model = RewardModel(RewardConfig(), minilm)
    kinds = [(kind, text) for kind, text in NOTHING.values() if kind not in ("declines", "asks back")]
    assert kinds
    assert all(beats(model, PROMPT, RIGHT, text) for _, text in kinds)
    assert beats(model, "Thanks!", "You're welcome!", RIGHT)


@pytest.mark.models
def test_what_several_people_rate_well_wins_where_they_do(minilm):
    """The same sentence, to prompts that it was rated well for, against an answer that was rated badly there."""
    model, polite = RewardModel(RewardConfig(), minilm), "Thanks a lot for your question."
    prompt = "Please open a ticket for me"
    assert beats(model, prompt, RIGHT, polite)
    for i in range(6):
        model.learn([Label(f"g{i}", Example(f"Please open ticket {i}", polite), 1.0)])
        model.learn([Label(f"b{i}", Example(f"Please open ticket {i}", RIGHT), 0.0)])
    assert beats(model, prompt, polite, RIGHT)


@pytest.mark.models
def test_labels_move_it_and_an_explanation_names_it(minilm):
    example = Example(PROMPT, "Thanks a lot for your question.")
    model = RewardModel(RewardConfig(), minilm)
    before = dict(explain.contributions(model, example))
    assert before["thanks"] < -1
    assert set(NAMES) <= set(explain.WORDS)
    model.learn([Label(f"l{i}", Example(f"{PROMPT} {i}", f"{t} {i}"), 0.0) for i, t in enumerate(TAUGHT)])
    column = -len(NAMES) + NAMES.index("thanks")
    assert model.heads.own[:, column].mean() < hollow.PRIOR[NAMES.index("thanks")]


@pytest.mark.models
def test_answers_that_come_twice_in_a_batch_are_seen_as_alone(minilm):
    model = RewardModel(RewardConfig(), minilm)
    shown = [Example(p, a) for p in (PROMPT, "Thanks!") for a in (RIGHT, "What do you mean?", RIGHT, "You're welcome!")]
    together = model.seen_of(shown, style=True).own
    alone = np.concatenate([model.seen_of([one], style=True).own for one in shown], axis=1)
    np.testing.assert_allclose(together, alone, atol=1e-4)
