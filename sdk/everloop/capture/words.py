"""Feedback as the gateway takes it: fields made from what the agent said, checked before they are queued."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from everloop.feedback import Feedback, FeedbackKind
from everloop.ids import OBJECT, RESPONSE, Ids, unique


def target(call: object) -> dict[str, str]:
    """Which answer is meant: a response object of the openai client, its id, a call id, or None (the episode).

    Raises ValueError for anything else.
    """
    if call is None:
        return {}
    named = call if isinstance(call, str) else getattr(call, "id", None)
    if not isinstance(named, str) or not named:
        raise ValueError(f"call takes a response, its id, or a call id; not {type(call).__name__}")
    return {"call": named} if named.startswith("call_") else {"response_id": named}


def thumb_value(value: object) -> float:
    """+1 or -1 of True, False, 1 or -1. Raises ValueError for anything else."""
    if isinstance(value, bool):
        return 1.0 if value else -1.0
    if isinstance(value, int | float) and value in (1, -1):
        return float(value)
    raise ValueError(f"a thumb is True, False, 1 or -1, not {value!r}; use rate() for anything between")


def fields_of(kind: FeedbackKind, about: dict[str, str], rater: str | None, **said: Any) -> dict[str, Any]:
    """One item of ``POST /v1/feedback``. ``about``: episode, policy, call, response_id, as far as they are known.

    Raises ValueError where it can never be taken: a number out of range, words that are missing.
    """
    said = {name: value for name, value in said.items() if value is not None}
    item = {"id": unique("fb_"), "kind": kind.value, "time": time.time(), **said}
    if rater is not None:
        item["rater"] = rater
    try:
        Feedback.model_validate(item)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"{where}: {problem['msg']}" if where else problem["msg"]) from None
    return {**about, **item}


def packed(fields: dict[str, Any]) -> bytes:
    """JSON; messages may be the openai client's own objects.

    Raises TypeError or ValueError where something in it is not JSON (NaN is not).
    """
    return json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain).encode()


def _plain(value: object) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def call_id(call: object) -> str | None:
    """The call id behind a response object of the openai client, its id, or a call id; None where there is none."""
    named = call if isinstance(call, str) else getattr(call, "id", None)
    if not isinstance(named, str):
        return None
    try:
        return Ids.call_of(named) if named.startswith((RESPONSE, OBJECT)) else named
    except ValueError:
        return named


def as_text(value: object) -> str:
    """Text as it is, None as nothing, anything else as JSON; what has no JSON form as Python shows it."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return repr(value)
