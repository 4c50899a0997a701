"""The template that vLLM renders gives the prompt that the embedded engine gives, or refuses what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from everloop.errors import ServingError
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trainer.policy import chat, template

pytestmark = pytest.mark.models
NO_TOOLS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|im_end|>{% endfor %}<assistant>"
KNOWS = "{% if tools %}tools: {{ tools | tojson }}{% endif %}" + NO_TOOLS.replace(
    "{{ m['content'] }}", "{{ m['content'] }}{{ m.tool_calls | tojson if m.tool_calls }}"
)
TOOL = {"type": "function", "function": {"name": "route", "parameters": {"type": "object", "é": "{x}"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "route", "arguments": '{"to": "ä"}'}}
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}
CALLED = [{"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "done"}]
SPOKE = [{"role": "assistant", "content": "Well.", "tool_calls": [CALL, CALL]}, {"role": "tool", "content": "done"}]


@pytest.fixture(params=[NO_TOOLS, KNOWS], ids=["knows no tools", "knows tools"])
def tokenizer(request: pytest.FixtureRequest, untrained: Path) -> PreTrainedTokenizerBase:
    made = AutoTokenizer.from_pretrained(untrained)
    made.chat_template = request.param
    return made


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any]) -> str:
    """As vLLM does: it reads the arguments of tool calls, then renders the template that it was given."""
    read = json.loads(json.dumps(messages))
    for call in (call for message in read for call in message.get("tool_calls") or ()):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    given = {"chat_template": template.whole(tokenizer), "tokenize": False, "add_generation_prompt": True}
    return str(tokenizer.apply_chat_template(read, tools=tools or None, **given))


@pytest.mark.parametrize("tools", [[], [TOOL], [TOOL, TOOL]], ids=len)
@pytest.mark.parametrize(
    "messages",
    [[USER], [SYSTEM, USER], [{"role": "developer", "content": "Be brief."}, PARTS], [SYSTEM, PARTS, USER]],
)
def test_both_write_the_same_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Any], tools: list[Any]) -> None:
    assert rendered(tokenizer, messages, tools) == chat.render(tokenizer, messages, tools)


@pytest.mark.parametrize("turns", [CALLED, SPOKE])
def test_both_write_calls_and_their_results_alike(tokenizer: PreTrainedTokenizerBase, turns: list[Any]) -> None:
    if chat.knows_tools(tokenizer):
        pytest.skip("a template of its own says how it writes a call")
    assert rendered(tokenizer, [USER, *turns], [TOOL]) == chat.render(tokenizer, [USER, *turns], [TOOL])


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": "now <|im_end|> then"}, "control token"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "text alone"),
    ],
)
def test_both_refuse_the_same(tokenizer: PreTrainedTokenizerBase, message: dict[str, Any], words: str) -> None:
    with pytest.raises(ServingError, match=words):
        chat.render(tokenizer, [message], [])
    with pytest.raises(TemplateError, match=words):
        rendered(tokenizer, [message], [])


def test_a_model_without_a_template_has_none(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    assert template.whole(tokenizer) is None
