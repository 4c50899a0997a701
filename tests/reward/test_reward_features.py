"""What the model sees of a call."""

import math

import pytest
from everloop.episode import Turn
from everloop.event import Call, Message, ToolResult

from reward.features import (
    CONTENT,
    STRUCTURE,
    STYLES,
    Example,
    answer_text,
    content_vector,
    examples,
    prompt_text,
    structures,
    style_vector,
)


def say(role, content=None, **fields):
    return Message(role=role, content=content, **fields)


def test_prompt_is_the_users_last_words_without_the_system_prompt():
    assert prompt_text([say("system", "You are a bank."), say("user", "Where is my card?")]) == "Where is my card?"


def test_prompt_of_a_longer_talk_has_the_last_words_first_and_the_answer_before_them():
    talk = [say("user", "Hello"), say("assistant", "Hi, what is it?"), say("user", "My card")]
    assert prompt_text(talk) == "My card\nHi, what is it?"


def test_prompt_after_a_tool_has_the_users_words_and_the_tools():
    asked = say("assistant", tool_calls=[{"function": {"name": "find", "arguments": '{"id": 1}'}}])
    talk = [say("user", "My card"), asked, say("tool", "x" * 1000)]
    words, call, result = prompt_text(talk).split("\n")
    assert (words, call) == ("My card", 'find({"id": 1})')
    assert len(result) == 240


def test_contracts_and_plain_dicts_look_the_same():
    talk = [say("user", "My card"), say("assistant", "Yes?"), say("user", [{"type": "text", "text": "Now"}])]
    assert prompt_text([message.model_dump() for message in talk]) == prompt_text(talk) == "Now\nYes?"


def test_an_answer_that_says_and_does_nothing_is_empty():
    assert answer_text(say("assistant", "  ")) == ""
    assert answer_text(say("assistant", None)) == ""
    assert prompt_text([]) == ""


def test_structure_counts_what_was_before_the_answer(kit):
    one = kit.episode("e", ("a", "again"), ("b", "again"), ("c", "done"))
    failing = (
        ToolResult(id="t1", name="x", error=True),
        ToolResult(id="t2", name="x", result='{"error": "no such card"}'),
        ToolResult(id="t3", name="x", result="Error: no seat"),
        ToolResult(id="t4", name="x", result='{"seats": 3}'),
    )
    turns = (one.turns[0].model_copy(update={"tools": failing}), *one.turns[1:])
    first, second, third = structures(one.model_copy(update={"turns": turns}))
    assert (first.tools, first.tool_errors, first.retries) == (0, 0, 0)
    assert (second.tools, second.tool_errors, second.retries) == (4, 3, 1)
    assert (third.turn, third.retries) == (2, 1)
    assert dict(zip(STRUCTURE, third.vector(), strict=True))["tool_error_share"] == 0.75


def test_a_turn_without_text_or_messages_is_data_not_a_crash(kit):
    bare = Turn(call=Call(id="c", messages=(), output=Message(role="assistant")))
    (example,) = examples(kit.episode("e", ("a", "b")).model_copy(update={"turns": (bare,)}))
    assert (example.prompt, example.answer) == ("", "")


def test_style_is_apart_and_bounded():
    assert style_vector("") == [0.0] * STYLES
    assert style_vector("word " * 10) == [math.log(11) / 5, *[0.0] * (STYLES - 1)]
    assert all(value < 3 for value in style_vector("word " * 100_000))


def test_style_counts_what_only_looks():
    shown = style_vector("# Plan\n- **one**!\n2. two\n```\n3 apples - none\n```")
    counts = [round(math.exp(3 * value) - 1) for value in shown[2:]]
    assert counts == [2, 1, 2, 2, 1, 5]


def test_how_much_was_asked_and_taken_up():
    asked = "Ann has 12 pears and 3 bags, Bob has 1,200 pears. How many pears?"
    found = dict(zip(CONTENT, content_vector(Example(asked, "12 * 3 = 36 pears")), strict=True))
    assert found["numbers_used"] == pytest.approx(2 / 3 - 0.5)
    assert found["numbers_given"] == pytest.approx(2 / 3 - 0.5)
    assert found["words_repeated"] == pytest.approx(3 / 6 - 0.5), "12, 3 and pears"
    longer = dict(zip(CONTENT, content_vector(Example(f"{asked} Think of 5, 6 and 7", "36")), strict=True))
    assert longer["asked_words"] > found["asked_words"]
    assert longer["asked_numbers"] > found["asked_numbers"]
    assert longer["numbers_used"] == -0.5
    assert content_vector(Example("", ""))[2:] == [0.0, 0.0, 0.0], "nothing was there to be taken up"
    assert max(map(abs, content_vector(Example("7 8 " * 10_000, "")))) <= 2
