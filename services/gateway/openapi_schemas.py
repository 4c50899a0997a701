"""The schemas of the gateway's API: what may be sent, made from the tables of ``ask`` and ``responses``; what comes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from everloop.feedback import FeedbackKind

from services.gateway import ask, desk, events, feedback, items, responses
from services.gateway.checks import Check
from services.gateway.door import LONGEST_NAME
from services.gateway.tokens import LONGEST
from services.gateway.turns import LATEST

Fields = dict[str, Any]
TEXT: Fields = {"type": "string"}
NAME: Fields = {"type": "string", "minLength": 1, "maxLength": 256}
PRINTABLE: Fields = {**NAME, "pattern": r"^[\x21-\x7E]+$"}


def _header(name: str, schema: Fields, words: str) -> Fields:
    return {"name": name, "in": "header", "schema": schema, "description": words}


SAID: Fields = {"type": "string", "maxLength": LONGEST_NAME, "description": "Printable; empty is as good as none."}
IDEMPOTENCY_KEY = _header("Idempotency-Key", SAID, "The same key is the same request.")
SEQ: Fields = {"type": ["integer", "string"], "minimum": 0, "maximum": LATEST, "maxLength": 0}
CALL_HEADERS = [
    _header("X-Everloop-Episode", SAID, "Your name for the episode, or an `ep_…` id that you were given."),
    _header("X-Everloop-Seq", SEQ, "Number among its events; empty is as good as none."),
    _header("X-Everloop-Subject", SAID, "Whom it is about; else `user`. Stored as a keyed hash."),
    _header("X-Everloop-Capture", {"enum": ["on", "off"]}, "off: nothing of this request is stored."),
    IDEMPOTENCY_KEY,
]
ANSWER_HEADERS = {
    name: {"schema": TEXT, "description": words}
    for name, words in {
        "X-Everloop-Episode": "The episode's id; not with capture off.",
        "X-Everloop-Call": "The call's id; not with capture off.",
        "X-Everloop-Policy-Version": "The adapter's hash, or `base`, that answered.",
        "X-Everloop-Arm": "`live`, `control` or `canary`; not with capture off.",
    }.items()
}
MODEL = {"name": "model", "in": "path", "required": True, "schema": TEXT, "description": "A policy's name."}


def components() -> Fields:
    return {
        "ChatAsked": _asked(ask.CHECKS, ["model", "messages"], ask.FOREIGN["chat/completions"], messages=MESSAGES),
        "CompletionAsked": _asked(ask.CHECKS, ["model", "prompt"], ask.FOREIGN["completions"], prompt=PROMPT),
        "ResponseAsked": _asked(responses.PARAMETERS, ["model"], (), **RESPONSE)
        | {
            "anyOf": [
                _object(["input"], True, input={"type": ["string", "array"]}),
                _object(["instructions"], True, instructions=TEXT),
            ]
        },
        "FeedbackGiven": {"anyOf": [_feedback(), _object(["feedback"], feedback=_batch(_feedback()))]},
        "TokenAsked": _object(["response_id"], True, response_id=NAME, ttl=_maximum(1, LONGEST)),
        "Events": _object(["events"], events=_batch(_event())),
        **ANSWERS,
    }


def _asked(checks: Mapping[str, Check], required: list[str], without: Iterable[str], **known: Fields) -> Fields:
    """A request body. Null is as good as left out; what is not named is refused."""
    named = {name: _or_null(check.schema) for name, check in checks.items() if name not in without}
    return {**_object(required, **{**named, **known}), "additionalProperties": False}


def _object(required: list[str], more: bool = False, **properties: Fields) -> Fields:
    made = {"type": "object", "required": required, "properties": properties}
    return made if more else {**made, "additionalProperties": False}


def _or_null(schema: Fields) -> Fields:
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return {**schema, "type": [*kinds, "null"]}


def _maximum(low: float, high: float) -> Fields:
    return {"type": "number", "minimum": low, "maximum": high}


def _batch(item: Fields) -> Fields:
    return {"type": "array", "items": item, "minItems": 1, "maxItems": desk.MOST}


def _tagged(kind: str, required: list[str], **properties: Fields) -> Fields:
    return _object(["type", *required], True, type={"const": kind}, **properties)


DATA: Fields = {"type": "string", "pattern": "^data:"}
PART: Fields = {
    "anyOf": [
        _tagged("text", ["text"], text=TEXT),
        _tagged("image_url", ["image_url"], image_url={"anyOf": [DATA, _object(["url"], True, url=DATA)]}),
        _object(["type"], True, type={"enum": sorted(ask.PARTS - {"text", "image_url"})}),
    ]
}
CONTENT: Fields = {"anyOf": [TEXT, {"type": "array", "items": PART}]}
MESSAGES: Fields = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            _object(
                ["role", "content"],
                True,
                role={"enum": sorted(ask.ROLES - {"assistant", "tool"})},
                content=CONTENT,
                name={"type": ["string", "null"]},
            ),
            _object(
                ["role"],
                True,
                role={"const": "assistant"},
                content={"anyOf": [*CONTENT["anyOf"], {"type": "null"}]},
                tool_calls={"type": ["array", "null"], "items": {"type": "object"}},
            ),
            _object(
                ["role", "content", "tool_call_id"],
                True,
                role={"const": "tool"},
                content=CONTENT,
                tool_call_id={"type": "string", "minLength": 1},
            ),
        ]
    },
}
PROMPT: Fields = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 1},
    ]
}
INPUT_PART: Fields = {
    "anyOf": [
        _tagged("input_text", ["text"], text=TEXT),
        _tagged("output_text", ["text"], text=TEXT),
        _tagged("refusal", ["refusal"], refusal=TEXT),
        _tagged("input_image", ["image_url"], image_url=DATA),
        _tagged("input_file", ["file_data"], file_data=DATA),
    ]
}
INPUT_CONTENT: Fields = {"anyOf": [TEXT, {"type": "array", "items": INPUT_PART}]}
SOME: Fields = {"type": "string", "minLength": 1}
ITEM: Fields = {
    "anyOf": [
        _object(
            ["role", "content"],
            True,
            type={"const": "message"},
            role={"enum": list(items.ROLES)},
            content=INPUT_CONTENT,
        ),
        _tagged("function_call", ["call_id", "name", "arguments"], call_id=SOME, name=SOME, arguments=TEXT),
        _tagged("function_call_output", ["call_id", "output"], call_id=SOME, output=INPUT_CONTENT),
        _tagged("reasoning", []),
    ]
}
FORMAT: Fields = {
    "anyOf": [
        _tagged("text", []),
        _tagged("json_object", []),
        _tagged("json_schema", ["name", "schema"], name=TEXT, schema={"type": "object"}),
        {"type": "null"},
    ]
}
FUNCTION: Fields = _tagged("function", ["name"], name=SOME)
CHOICE: Fields = {"anyOf": [{"enum": [*responses.CHOICES, None]}, _tagged("function", ["name"], name=TEXT)]}
RESPONSE: dict[str, Fields] = {
    "input": {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": ITEM}]},
    "tools": {"type": ["array", "null"], "items": FUNCTION},
    "tool_choice": CHOICE,
    "include": {"type": ["array", "null"], "items": {"enum": list(responses.INCLUDES)}},
    "text": {"anyOf": [_object([], format=FORMAT, verbosity={"type": ["string", "null"]}), {"type": "null"}]},
    "reasoning": {"anyOf": [_object([], effort={"type": ["string", "null"]}), {"type": "null"}]},
    "truncation": {"enum": ["disabled", None]},
    "background": {"enum": [False, None]},
}


def _feedback() -> Fields:
    said: dict[str, Fields] = {
        **{name: {"type": ["string", "null"]} for name in sorted(feedback.ACCEPTED)},
        "response_id": NAME,
        "episode": NAME,
        "kind": {"enum": [kind.value for kind in FeedbackKind]},
        "value": {"type": ["number", "null"]},
        "choice": {"type": "integer", "minimum": 0, "maximum": 999},
        "time": {"type": ["number", "null"], "minimum": 0},
        "withdrawn": {"type": ["boolean", "null"]},
    }
    about = {"oneOf": [{"required": ["response_id"]}, {"required": ["episode"]}]}
    return _object(["kind"], **said) | about


def _event() -> Fields:
    said: dict[str, Fields] = {
        **{name: {"type": ["string", "null"], "minLength": 1, "maxLength": 256} for name in sorted(events.ACCEPTED)},
        "id": PRINTABLE,
        "episode": PRINTABLE,
        "seq": {"type": ["integer", "null"], "minimum": 0, "maximum": LATEST},
        "time": {"type": ["number", "null"], "minimum": 0},
        "payload": _object(["kind"], True, kind={"enum": list(events.KINDS)}),
    }
    return _object(["id", "episode", "payload"], **said)


SENT_EVENT: Fields = {
    "type": "object",
    "description": "One server-sent event of a stream; `data` is JSON, or [DONE] at the end of chat and completions.",
    "required": ["data"],
    "properties": {"event": TEXT, "data": TEXT},
}
ANSWERS: dict[str, Fields] = {
    "Error": _object(
        ["error"],
        error=_object(
            ["message", "type", "code", "param"],
            message=TEXT,
            type={
                "enum": [
                    "invalid_request_error",
                    "authentication_error",
                    "permission_error",
                    "rate_limit_error",
                    "server_error",
                ]
            },
            code={"type": ["string", "null"]},
            param={"type": ["string", "null"]},
        ),
    ),
    "ChatCompletion": _object(
        ["id", "object", "created", "model", "choices"],
        True,
        id={"type": "string", "pattern": "^chatcmpl-"},
        object={"const": "chat.completion"},
        created={"type": "integer"},
        model=TEXT,
        choices={"type": "array", "minItems": 1, "items": _object(["index", "message", "finish_reason"], True)},
    ),
    "Completion": _object(
        ["id", "object", "created", "model", "choices"],
        True,
        id={"type": "string", "pattern": "^chatcmpl-"},
        model=TEXT,
        choices={"type": "array", "minItems": 1, "items": _object(["index", "text", "finish_reason"], True)},
    ),
    "Response": _object(
        ["id", "object", "created_at", "status", "model", "output", "usage", "error", "incomplete_details"],
        True,
        id={"type": "string", "pattern": "^resp_"},
        object={"const": "response"},
        created_at={"type": "integer"},
        status={"enum": ["completed", "incomplete"]},
        model=TEXT,
        output={
            "type": "array",
            "minItems": 1,
            "items": _object(["id", "type", "status"], True, type={"enum": ["reasoning", "message", "function_call"]}),
        },
        store={"const": False},
    ),
    "Model": _object(
        ["id", "object", "created", "owned_by"],
        id=TEXT,
        object={"const": "model"},
        created={"type": "integer"},
        owned_by=TEXT,
    ),
    "Models": _object(
        ["object", "data"],
        object={"const": "list"},
        data={"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
    ),
    "Taken": _object(["accepted"], accepted={"type": "integer", "minimum": 1}),
    "FeedbackTaken": _object(
        ["accepted", "ids"], accepted={"type": "integer", "minimum": 1}, ids={"type": "array", "items": TEXT}
    ),
    "Token": _object(["token", "expires"], token={"type": "string", "pattern": "^ft_"}, expires={"type": "integer"}),
    "Health": _object(
        ["ok", "trouble"],
        ok={"type": "boolean"},
        trouble={"type": "object", "additionalProperties": TEXT},
    ),
}
