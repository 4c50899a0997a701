"""A whole chat answer, parsed without its log-probabilities.

The engine spells every sampled token out (text, bytes, alternatives): nine tenths of an answer's bytes, which the
agent does not get. They are cut out and go to the record as they came.

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


def loads(raw: bytes) -> Any:
    """As ``orjson.loads``, but ``content`` of the log-probabilities may be JSON still: bytes.

    Raises orjson.JSONDecodeError.
    """
    start = raw.find(OPENS)
    end = raw.find(CLOSES, raw.rfind(b'"logprob":'))
    if start < 0 or end < start:
        return orjson.loads(raw)
    try:
        answer = orjson.loads(b'%b"logprobs":null%b' % (raw[:start], raw[end + len(CLOSES) :]))
        (choice,) = answer["choices"]
        if choice["logprobs"] is None:
            choice["logprobs"] = {"content": raw[start + BEFORE : end + len(CLOSES) - 1]}
            return answer
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        pass
    return orjson.loads(raw)
