"""The gateway's API in OpenAPI's words, made from the tables that it checks requests by.

It is served at ``/openapi.json`` and kept in ``docs/openapi.json``; ``python -m services.gateway.openapi`` writes the
file anew.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from services.gateway import openapi_schemas as schemas
from services.gateway.keys import SCOPES

FILE = Path(__file__).parents[2] / "docs" / "openapi.json"
Fields = dict[str, Any]
WORDS = {
    400: "What was sent is not sound, or not done here; `message` says what to do.",
    401: "No key, or none that is known.",
    403: "The key may not do this.",
    404: "There is no such thing of yours.",
    408: "The body came too slowly; the connection ends.",
    413: "The body is larger than gateway.max_body_bytes; the connection ends.",
    422: "What was sent does not fit, or an Idempotency-Key came again with another body.",
    429: "The tenant sends, or the engine has, too much; see Retry-After.",
    500: "The gateway failed, or its redaction hook did.",
    502: "The engine failed.",
    503: "The engine is away, the gateway stops, or the answer could not be recorded; see Retry-After.",
    504: "The engine took too long.",
    "4XX": "The engine refuses the request, in its own words.",
}
BODY = (400, 408, 413)
KEYED = (401, 403, 429)
STORED = (500, 503)
CALL = (*BODY, *KEYED, 404, 422, *STORED, 502, 504, "4XX")


def document() -> Fields:
    """The whole description. Pure: the same at every call."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Everloop gateway",
            "version": "1",
            "description": "OpenAI's API for your policies, with what Everloop adds: episodes, feedback and events. "
            "docs/http.md says what each means.",
        },
        "security": [{"key": []}],
        "paths": {
            "/v1/chat/completions": {"post": _call("chat", "An answer in chat's form", "ChatCompletion")},
            "/v1/completions": {"post": _call("completion", "An answer to one bare prompt", "Completion")},
            "/v1/responses": {"post": _call("response", "An answer as a Response", "Response")},
            "/v1/models": {"get": _asked("models", "Your policies", "Models", KEYED)},
            "/v1/models/{model}": {"get": _asked("model", "One policy", "Model", (*KEYED, 404), [schemas.MODEL])},
            "/v1/feedback": {"post": _feedback()},
            "/v1/feedback/tokens": {
                "post": _told("grantToken", "A token that a browser may hold", "TokenAsked", 200, "Token", KEYED)
            },
            "/v1/events": {"post": _told("sendEvents", "What an SDK saw", "Events", 202, "Taken", (*KEYED, *STORED))},
            "/healthz": {"get": _health("alive", "Whether the process works; if not, start it anew")},
            "/readyz": {"get": _health("ready", "Whether requests should come")},
            "/status": {"get": _status()},
            "/metrics": {"get": _open("metrics", "For Prometheus", {"text/plain": {"schema": {"type": "string"}}})},
            "/openapi.json": {"get": _open("description", "This document", _json({"type": "object"}))},
        },
        "components": {
            "schemas": schemas.components(),
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": f"An API key (ek_…) of scope {', '.join(SCOPES)}; for feedback a token (ft_…) too.",
                }
            },
        },
    }


def _call(id: str, summary: str, answer: str) -> Fields:
    content = {**_json(_ref(answer)), "text/event-stream": {"schema": schemas.SENT_EVENT}}
    asked = {"chat": "ChatAsked", "completion": "CompletionAsked", "response": "ResponseAsked"}[id]
    return {
        "operationId": id,
        "summary": summary,
        "parameters": schemas.CALL_HEADERS,
        "requestBody": {"required": True, "content": _json(_ref(asked))},
        "responses": {
            "200": {"description": "The answer.", "headers": schemas.ANSWER_HEADERS, "content": content},
            **_refusals(CALL),
        },
    }


def _feedback() -> Fields:
    codes = (*KEYED, *STORED, 404)
    return _told("giveFeedback", "What somebody says of an answer", "FeedbackGiven", 202, "FeedbackTaken", codes) | {
        "parameters": [schemas.IDEMPOTENCY_KEY]
    }


def _told(id: str, summary: str, body: str, code: int, answer: str, codes: tuple[Any, ...]) -> Fields:
    return {
        "operationId": id,
        "summary": summary,
        "requestBody": {"required": True, "content": _json(_ref(body))},
        "responses": {
            str(code): {"description": "Taken.", "content": _json(_ref(answer))},
            **_refusals((*BODY, *codes, 404, 422)),
        },
    }


def _asked(
    id: str, summary: str, answer: str, codes: tuple[Any, ...], parameters: list[Fields] | None = None
) -> Fields:
    return {
        "operationId": id,
        "summary": summary,
        **({"parameters": parameters} if parameters else {}),
        "responses": {"200": {"description": summary, "content": _json(_ref(answer))}, **_refusals(codes)},
    }


def _health(id: str, summary: str) -> Fields:
    content = _json(_ref("Health"))
    said = {code: {"description": words, "content": content} for code, words in (("200", "Yes."), ("503", "No."))}
    return {"operationId": id, "summary": summary, "security": [], "responses": said}


def _status() -> Fields:
    made = _open("status", "What runs here, for this machine alone", _json({"type": "object"}))
    made["responses"]["403"] = {
        "description": "Asked from another machine.",
        "content": _json(_ref("Error")),
    }
    return made


def _open(id: str, summary: str, content: Fields) -> Fields:
    said = {"200": {"description": summary, "content": content}}
    return {"operationId": id, "summary": summary, "security": [], "responses": said}


def _refusals(codes: tuple[Any, ...]) -> Fields:
    chosen = [code for code in WORDS if code in codes]
    return {str(code): {"description": WORDS[code], "content": _json(_ref("Error"))} for code in chosen}


def _json(schema: Fields) -> Fields:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> Fields:
    return {"$ref": f"#/components/schemas/{name}"}


@cache
def written() -> str:
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    FILE.write_text(written(), encoding="utf-8")
    print(FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
