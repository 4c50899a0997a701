"""Words as they come: whole characters, stop strings, tool calls kept back."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from trainer.policy import tools
from trainer.rollout.words import Words


def of_bytes(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are single bytes: the hardest case."""
    return bytes(ids).decode("utf-8", "replace")


def streamed(text: str, stops: Sequence[str] = (), known: Sequence[str] = ()) -> tuple[list[str], list[dict]]:
    words, shown = Words(of_bytes, stops, dict.fromkeys(known, True)), []
    for byte in text.encode():
        stopped = words.take([byte])
        shown.append(words.show())
        if stopped:
            break
    words.end()
    rest, calls = words.finish()
    return [*shown, rest], calls


@pytest.mark.parametrize("text", ["plain", "é", "日本語 and 🎉🎉", "a\ufffdb", ""])
def test_no_character_is_ever_half(text: str) -> None:
    shown, _ = streamed(text)
    assert "".join(shown) == text
    assert all("\ufffd" not in piece for piece in shown) or "\ufffd" in text


def test_an_answer_cut_in_a_character_says_so_at_the_end() -> None:
    words = Words(of_bytes)
    for byte in "né".encode()[:2]:
        words.take([byte])
    assert words.show() == "n"
    words.end()
    assert words.finish() == ("\ufffd", [])


def test_nothing_of_a_stop_string_is_ever_shown() -> None:
    shown, _ = streamed("one END two ENDING", ["ENDING", "ENDED"])
    assert "".join(shown) == "one END two "
    assert "".join(streamed("one END", ["ENDING"])[0]) == "one END"


def test_the_earliest_stop_string_counts() -> None:
    words = Words(of_bytes, ["two", "one"])
    assert words.take(b"zero one two")
    assert words.text == "zero "


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_a_tool_call_is_read_and_not_shown() -> None:
    shown, calls = streamed("Let me look.\n" + call("find", city="Bern") + call("find", city="Genf"), (), ["find"])
    assert "".join(shown).rstrip() == "Let me look."
    assert [json.loads(one["function"]["arguments"]) for one in calls] == [{"city": "Bern"}, {"city": "Genf"}]
    assert len({one["id"] for one in calls}) == 2


@pytest.mark.parametrize("text", ["<tool_call>{broken", call("unknown"), "a < b <tool", "<tool_call>[1]</tool_call>"])
def test_what_is_no_call_of_a_known_tool_is_words(text: str) -> None:
    shown, calls = streamed(text, (), ["find"])
    assert "".join(shown) == text
    assert calls == []


def test_without_tools_in_the_request_nothing_is_taken_for_a_call() -> None:
    text = call("find")
    shown, calls = streamed(text)
    assert ("".join(shown), calls) == (text, [])


def test_tools_and_their_results_become_plain_messages() -> None:
    asked = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"city": "Bern"}'}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    plain = tools.as_plain(messages, [tool])
    assert [message["role"] for message in plain] == ["system", "user", "assistant", "user"]
    assert plain[0]["content"].startswith("Be kind.\n\n")
    assert json.dumps(tool) in plain[0]["content"]
    assert tools.parse(plain[2]["content"], {"find": True})[1][0]["function"] == asked["function"]
    assert plain[3]["content"] == "<tool_response>\nsun\n</tool_response>"
    assert tools.as_plain(messages[:2], []) == messages[:2]
