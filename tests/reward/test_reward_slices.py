"""Which part of a report a call lies in: its turn, topic, language and answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from everloop.config import RewardConfig

from reward.features import Example
from reward.language import language
from reward.model import Label, RewardModel
from reward.report import Row
from reward.slices import READ, slices

ROW = Row("e", "c", 0, "card desk", "base", "v", True, 1.0, prompt="lost card")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("When will my new card arrive?", "English"),
        ("Will a transfer incur a fee?", "English"),
        ("Wann kommt meine neue Karte an?", "German"),
        ("Où est ma carte ? Je ne la trouve pas.", "French"),
        ("J’ai perdu ma carte.", "French"),
        ("¿Dónde está mi tarjeta?", "Spanish"),
        ("Dov'è la mia carta? Non la trovo.", "Italian"),
        ("Onde está o meu cartão?", "Portuguese"),
        ("Waar is mijn kaart?", "Dutch"),
        ("私のカードはどこですか", "Japanese"),
        ("내 카드는 어디에 있나요", "Korean"),
        ("Где моя карта?", "script Cyrillic"),
        ("我的卡在哪里", "script Han"),
        ("Super, meine Karte", None),
        ("Visa Mastercard Apple Pay", None),
        ("12,50 €", None),
        ("", None),
    ],
)
def test_a_language_is_told_where_its_commonest_words_or_its_letters_say_so(text: str, told: str | None) -> None:
    assert language(text) == told


def test_calls_lie_in_the_topic_of_their_prompt_under_the_name_of_a_typical_one(letters: Any) -> None:
    model = RewardModel(RewardConfig(), letters)
    for at, prompt in enumerate(("bbb ccc", "xxx yyy")):
        model.learn([Label(f"l{at}", Example(prompt, "yes"), 1.0)])
    assert len(model.topics.centres) == 2
    prompts = ["bbb ccc", "bbb cc", "bb ccc d", "xxx yy", "xxx yyy"]
    rows = [replace(ROW, call=f"c{at}", prompt=prompt, time=float(at)) for at, prompt in enumerate(prompts)]
    of = model.topics.of(letters.encode(prompts)).tolist()
    found = {name: [r.prompt for r in its] for name, its in slices(rows, model).items() if name.startswith("topic")}
    assert {name.partition(":")[0]: its for name, its in found.items()} == {
        f"topic {topic}": [prompt for prompt, its in zip(prompts, of, strict=True) if its == topic] for topic in set(of)
    }
    for name, its in found.items():
        assert name.partition(": ")[2].strip("'") in its
    assert not [name for name in slices(rows, None) if name.startswith("topic")], "its snapshot is gone"
    untaught = RewardModel(RewardConfig(), letters)
    assert not [name for name in slices(rows, untaught) if name.startswith("topic")]


def test_only_the_newest_prompts_are_read_for_their_topic(letters: Any) -> None:
    model = RewardModel(RewardConfig(), letters)
    model.learn([Label("l", Example("lost my card", "yes"), 1.0)])
    rows = [replace(ROW, call=f"c{at}", prompt=f"card {at}", time=float(at)) for at in range(READ + 5)]
    (its,) = (its for name, its in slices(rows, model).items() if name.startswith("topic"))
    assert [row.call for row in its] == [f"c{at}" for at in range(5, READ + 5)]


def test_turns_languages_adapters_and_answers_get_parts_where_there_is_something_in_them() -> None:
    rows = [replace(ROW, turn=turn, prompt="Wann kommt meine Karte an?", label=1.0, predicted=0.5) for turn in (0, 2)]
    rows += [replace(ROW, turn=0, adapter="a1", label=1.0, predicted=0.5)] * 20
    parts = {name: len(its) for name, its in slices(rows, None).items()}
    assert parts == {
        "all": 22,
        "turn 1": 21,
        "turns 2 to 3": 1,
        "by a1": 20,
        "by base": 2,
        "in German": 2,
        "answer 'card desk'": 22,
    }
