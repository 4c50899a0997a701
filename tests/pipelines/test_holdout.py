"""Held-out splits: shares, leaks, near-duplicates."""

from __future__ import annotations

import pytest
from everloop.config import HoldoutConfig
from everloop.episode import Split
from everloop.event import Message
from hypothesis import given
from hypothesis import strategies as st

from pipelines.holdout import near_duplicate_key, prompt_key, split_of, touches

SHARES = HoldoutConfig(gate=0.2, report=0.1)


@pytest.mark.parametrize(
    "other",
    ["where is my card", "Where is my card???", "Hi, where is the my CARD?", "my card, where is", "Where is my cards?"],
)
def test_near_duplicates_have_one_key(other):
    assert near_duplicate_key("Where is my card?") == near_duplicate_key(other)


def test_numbers_and_accents_make_no_difference_but_words_do():
    assert near_duplicate_key("I paid 10 at the café") == near_duplicate_key("I paid 2500 at the cafe")
    assert near_duplicate_key("I lost my card") != near_duplicate_key("I found my card")
    assert near_duplicate_key("???") != near_duplicate_key("!!")


@given(st.text())
def test_every_text_has_a_key(text):
    assert near_duplicate_key(text) == near_duplicate_key(text)
    assert len(near_duplicate_key(text)) == 24


def test_shares_are_those_configured_where_units_and_texts_are_many():
    found = [split_of("acme", "desk", f"s{n}", f"question about subject number {'x' * n}", SHARES) for n in range(3000)]
    assert abs(found.count(Split.GATE) / 3000 - 0.2) < 0.025
    assert abs(found.count(Split.REPORT) / 3000 - 0.1) < 0.02
    nothing = HoldoutConfig()
    assert all(split_of("acme", "desk", f"s{n}", "x", nothing) is Split.TRAIN for n in range(50))


def test_a_held_out_unit_or_text_is_never_trained_on_with_any_other():
    pairs = [(f"s{n % 60}", "word " + "y" * (n % 47)) for n in range(2000)]
    splits = {pair: split_of("acme", "desk", *pair, SHARES) for pair in pairs}
    always_held = {unit for unit in {p[0] for p in pairs} if all(splits[p] != "train" for p in pairs if p[0] == unit)}
    held_texts = {text for text in {p[1] for p in pairs} if all(splits[p] != "train" for p in pairs if p[1] == text)}
    assert 0 < len(always_held) < 60
    assert 0 < len(held_texts) < 47
    # What is held out is so for a reason that holds for the unit or the text everywhere.
    assert all(unit in always_held or text in held_texts for (unit, text), split in splits.items() if split != "train")


def test_tenants_and_policies_hold_out_different_people():
    units = [f"s{n}" for n in range(200)]
    mine = [split_of("acme", "desk", unit, unit * 9, SHARES) for unit in units]
    assert mine != [split_of("other", "desk", unit, unit * 9, SHARES) for unit in units]
    assert mine != [split_of("acme", "clerk", unit, unit * 9, SHARES) for unit in units]


def test_gold_is_touched_by_any_message_of_the_user_or_by_all_of_them():
    single = {prompt_key([Message(role="user", content="Where is my card?")]): Split.GATE}
    chat = [Message(role="user", content="hello there"), Message(role="user", content="where is my card")]
    assert touches([chat], single) is Split.GATE
    whole = {prompt_key(chat): Split.REPORT}
    assert touches([chat], whole) is Split.REPORT
    assert touches([chat], {**single, **whole}) is Split.REPORT
    assert touches([chat[:1]], whole) is None
    assert touches([[Message(role="assistant", content="Where is my card?")]], single) is None
