"""A whole chat answer, parsed without making an object of each token.

The engine spells every sampled token out (text, bytes, alternatives): nine tenths of an answer's bytes, of which
the record needs one number a token. Hundreds of small objects for each answer are what the gateway's time went to.

Safe because a quote inside a JSON string is escaped: the keys looked for cannot stand in anybody's words. Should the
cut end too early (inside a word, or at alternatives of a token), what is left is no JSON; should it take in more than
one choice, there are more numbers than ids: then everything is parsed.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

OPENS = b'"logprobs":{"content":[{'
CLOSES = b"}]}"
LOGPROB = re.compile(rb'"logprob":(-?[0-9][-+.0-9eE]*)')


def loads(raw: bytes) -> Any:
    """As ``orjson.loads``, but ``logprobs`` of a lone choice may be ``{"token_logprobs": [...]}``.

    Raises orjson.JSONDecodeError.
    """
    start = raw.find(OPENS)
    end = raw.find(CLOSES, raw.rfind(b'"logprob":'))
    if start < 0 or end < start:
        return orjson.loads(raw)
    try:
        answer = orjson.loads(b'%b"logprobs":null%b' % (raw[:start], raw[end + len(CLOSES) :]))
        numbers = orjson.loads(b"[%b]" % b",".join(LOGPROB.findall(raw, start, end)))
        (choice,) = answer["choices"]
        if choice["logprobs"] is None and len(numbers) == len(choice["token_ids"]):
            choice["logprobs"] = {"token_logprobs": numbers}
            return answer
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        pass
    return orjson.loads(raw)
