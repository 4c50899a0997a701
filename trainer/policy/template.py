"""A chat template for engines that render it themselves: the model's own, behind what :mod:`trainer.policy.chat` does.

vLLM renders a conversation by a Jinja template and nothing else. So what the embedded engine does in Python before it
asks the model's template stands here once more, in Jinja: parts become text, ``developer`` becomes ``system``, control
tokens in a message are refused, and tools of a model whose template knows none are written into the system message.
Both give the same prompt, which a test holds.
"""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase

from trainer.policy.chat import knows_tools
from trainer.policy.tools import PROMPT

_PLAIN = """\
{%- set everloop = namespace(messages=[], text='', told='') -%}
{%- for message in messages -%}
{%- set everloop.text = message['content'] or '' -%}
{%- if everloop.text is not string -%}
{%- for part in everloop.text if part['type'] not in ('text', 'input_text') -%}
{{- raise_exception("content part '" ~ part['type'] ~ "': this model reads text alone") -}}
{%- endfor -%}
{%- set everloop.text = everloop.text | map(attribute='text') | join -%}
{%- endif -%}
{%- set said = everloop.text ~ (message['tool_calls'] | tojson if message['tool_calls'] else '') -%}
{%- for token in CONTROL if token in said -%}
{{- raise_exception("a message holds the control token '" ~ token ~ "': take it out") -}}
{%- endfor -%}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
"""
_KEPT = """\
{%- set everloop.messages = everloop.messages + [dict(message, role=role, content=everloop.text)] -%}
{%- endfor -%}
{%- set messages = everloop.messages -%}
"""
_WRITTEN = """\
{%- if role == 'tool' -%}
{%- set role = 'user' -%}
{%- set everloop.text = '<tool_response>\\n' ~ everloop.text ~ '\\n</tool_response>' -%}
{%- endif -%}
{%- for call in message['tool_calls'] or [] -%}
{%- set its = {'name': call['function']['name'], 'arguments': call['function']['arguments']} -%}
{%- set everloop.text = everloop.text ~ '\\n<tool_call>\\n' ~ (its | tojson) ~ '\\n</tool_call>' -%}
{%- endfor -%}
{%- if message['tool_calls'] -%}{%- set everloop.text = everloop.text | trim -%}{%- endif -%}
{%- set everloop.messages = everloop.messages + [{'role': role, 'content': everloop.text}] -%}
{%- endfor -%}
{%- if tools -%}
{%- for tool in tools -%}
{%- set everloop.told = everloop.told ~ ('\\n' if everloop.told else '') ~ (tool | tojson) -%}
{%- endfor -%}
{%- set everloop.told = BEFORE ~ everloop.told ~ AFTER -%}
{%- if everloop.messages and everloop.messages[0]['role'] == 'system' -%}
{%- set everloop.told = everloop.messages[0]['content'] ~ '\\n\\n' ~ everloop.told -%}
{%- set everloop.messages = everloop.messages[1:] -%}
{%- endif -%}
{%- set everloop.messages = [{'role': 'system', 'content': everloop.told}] + everloop.messages -%}
{%- endif -%}
{%- set messages = everloop.messages -%}
"""


def whole(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template to serve a model with; None: it has none, and takes bare prompts alone."""
    own = tokenizer.chat_template
    if not own:
        return None
    ours = _PLAIN + (_KEPT if knows_tools(tokenizer) else _WRITTEN)
    before, after = PROMPT.split("{tools}")
    said = {
        "CONTROL": list(tokenizer.all_special_tokens),
        "BEFORE": before,
        "AFTER": after.replace("{{", "{").replace("}}", "}"),
    }
    for name, value in said.items():
        ours = ours.replace(name, json.dumps(value, ensure_ascii=False))
    return ours + str(own)
