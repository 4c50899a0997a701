"""A whole chat answer, parsed without its log-probabilities and token ids.

The engine spells every sampled token out (text, bytes, alternatives): nine tenths of an answer's bytes, which the
agent does not get; and a prompt may have thousands of ids. They are cut out and go to the record as they came: its
writer finds out whether they are numbers.

Safe because a quote inside a JSON string is escaped: the keys looked for cannot stand in anybody's words. Should the
cut end too early (inside a word, or at alternatives of a token), what is left is no JSON: then everything is parsed.
Only for an answer of one choice: the cut would go from the first one's to the last one's.
"""

from __future__ import annotations

from typing import Any

import orjson

OPENS = b'"logprobs":{"content":[{'
BEFORE = len(b'"logprobs":{"content":')
CLOSES = b"}]}"
PROMPT, COMPLETION = "prompt_token_ids", "token_ids"


def loads(raw: bytes) -> Any:
    """As ``orjson.loads``, but ``content`` of the log-probabilities and lists of ids may be JSON still: bytes.

    Raises orjson.JSONDecodeError.
    """
    start = raw.find(OPENS)
    end = raw.find(CLOSES, raw.rfind(b'"logprob":'))
    if start < 0 or end < start:
        return orjson.loads(raw)
    rest, prompt = _without(b'%b"logprobs":null%b' % (raw[:start], raw[end + len(CLOSES) :]), PROMPT)
    rest, completion = _without(rest, COMPLETION)
    try:
        answer = orjson.loads(rest)
        (choice,) = answer["choices"]
        if choice["logprobs"] is None:
            choice["logprobs"] = {"content": raw[start + BEFORE : end + len(CLOSES) - 1]}
            if _put_back(answer, PROMPT, prompt) and _put_back(choice, COMPLETION, completion):
                return answer
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        pass
    return orjson.loads(raw)


def _without(raw: bytes, name: str) -> tuple[bytes, bytes]:
    """(JSON with null for the list of numbers under this name, that list); as it was, and none, where it has none."""
    key = b'"%b":[' % name.encode()
    start = raw.find(key)
    opens = start + len(key) - 1
    end = raw.find(b"]", opens) + 1
    if start < 0 or not raw[opens + 1 : opens + 2].isdigit():
        return raw, b""
    return b"%bnull%b" % (raw[:opens], raw[end:]), raw[opens:end]


def _put_back(fields: dict[str, Any], name: str, numbers: bytes) -> bool:
    """Whether what was cut out, if anything was, is of these fields."""
    if numbers:
        if fields[name] is not None:
            return False
        fields[name] = numbers
    return True
