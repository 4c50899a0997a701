"""What a span says of a model call or a tool, in the words of three conventions. Pure.

====================  ===========================================  ==============================================
who writes it         a call                                       its messages
====================  ===========================================  ==============================================
OpenTelemetry         ``gen_ai.operation.name``: chat, …           ``gen_ai.input.messages`` (JSON, of parts), …
OpenLLMetry           the same, or ``llm.request.type``            ``gen_ai.prompt.0.content``, …
OpenInference         ``openinference.span.kind``: LLM             ``llm.input_messages.0.message.content``, …
====================  ===========================================  ==============================================

Messages become OpenAI's, as everything here has them. What is no text (images, audio) stays where it came inside the
span, and is named where it did not: nothing that is recorded makes an engine fetch anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import orjson

from services.gateway.ask import DEEPEST, deeper
from services.gateway.otlp import SpanRead

SCOPE = "everloop.gateway"  # of our own spans
CALLS = frozenset({"chat", "text_completion", "generate_content"})
ROLES = {"human": "user", "ai": "assistant", "model": "assistant", "function": "tool"}
KNOWN = frozenset({"system", "developer", "user", "assistant", "tool"})
FINISHES = {"tool_call": "tool_calls"}
NUMBERS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty")
WHOLE = ("top_k", "max_tokens", "seed")
LARGEST = 2**53
LONGEST = 12  # parts of an attribute's name, digits of a number in it
Tree = dict[str, Any]


class Unreadable(ValueError):
    """A span of a call that no record can be made of; says what is missing."""


class Output(NamedTuple):
    """One of the answers to a call: a message, and why it ended."""

    message: dict[str, Any]
    finish_reason: str | None


class Call(NamedTuple):
    """A model call. ``sampling`` are fields of ``everloop.event.Sampling``; ``error`` is None where it did not fail."""

    messages: list[dict[str, Any]]
    outputs: list[Output]
    tools: list[dict[str, Any]]
    model: str
    sampling: dict[str, Any]
    error: str | None
    error_code: str | None


def kind(span: SpanRead) -> str | None:
    """'call', 'tool', or None: nothing that an episode has. Our own spans are none."""
    its = span.attributes
    if span.scope == SCOPE or "everloop.call" in its:
        return None
    operation = its.get("gen_ai.operation.name")
    if isinstance(operation, str):
        return "call" if operation in CALLS else "tool" if operation == "execute_tool" else None
    inference = its.get("openinference.span.kind")
    if inference == "LLM" or its.get("llm.request.type") in ("chat", "completion"):
        return "call"
    return "tool" if inference == "TOOL" or its.get("traceloop.span.kind") == "tool" else None


def response_of(span: SpanRead) -> str:
    """The id of the response that a call got; empty where the span does not say."""
    its = span.attributes
    given = its.get("gen_ai.response.id")
    if given is None and its.get("output.mime_type") == "application/json":
        given = _table(its.get("output.value")).get("id")
    return given if isinstance(given, str) else ""


def call(span: SpanRead) -> Call:
    """The call that a span is about. Raises Unreadable."""
    its = span.attributes
    messages = list(_prompt(its))
    if not messages:
        raise Unreadable(
            "it has no messages: have the instrumentation put content into spans "
            "(OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=span_only, or its own setting)"
        )
    code = _word(its.get("error.type"))
    failed = span.failed or code
    outputs = list(_outputs(its))
    if not outputs:
        if failed is None:
            raise Unreadable("it has no answer: have the instrumentation put content into spans")
        outputs = [Output({"role": "assistant", "content": None}, "error")]
    parameters = _table(its.get("llm.invocation_parameters"))
    models = ("gen_ai.response.model", "gen_ai.request.model", "llm.model_name")
    return Call(
        messages,
        outputs,
        list(_tools(its)),
        next((name for key in models if (name := _word(its.get(key)))), ""),
        _sampling(its, parameters),
        failed,
        code if failed else None,
    )


def tool(span: SpanRead) -> dict[str, Any]:
    """Fields of the ``ToolResult`` that a span is about."""
    its = span.attributes

    def first(*names: str) -> Any:
        return next((its[name] for name in names if its.get(name) is not None), None)

    return {
        "kind": "tool",
        "id": _word(first("gen_ai.tool.call.id", "tool_call.id", "tool.id")) or span.id,
        "name": _word(first("gen_ai.tool.name", "tool.name", "traceloop.entity.name")) or span.name,
        "arguments": _text(first("gen_ai.tool.call.arguments", "input.value", "traceloop.entity.input")),
        "result": _text(first("gen_ai.tool.call.result", "output.value", "traceloop.entity.output")),
        "error": span.failed is not None or "error.type" in its,
    }


def _prompt(its: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """In the first convention that has any: instrumentations may write two."""
    system = _list(its.get("gen_ai.system_instructions"))
    if system:
        yield _message("system", _content(system))
    if given := _list(its.get("gen_ai.input.messages")):
        for message in given:
            yield from _of_parts(message)
    elif rows := _rows(its, "gen_ai.prompt"):
        yield from (_of_fields(row) for row in rows)
    elif rows := _rows(its, "llm.input_messages"):
        yield from (_of_inference(row) for row in rows)
    else:
        for row in _rows(its, "llm.prompts"):
            yield _message("user", _text(_tree(row.get("prompt")).get("text")))


def _outputs(its: Mapping[str, Any]) -> Iterator[Output]:
    given = its.get("gen_ai.response.finish_reasons")
    reasons = given if isinstance(given, list) else [its.get("llm.finish_reason")]
    for at, (message, own) in enumerate(_answers(its)):
        reason = _word(own) or _word(reasons[at] if at < len(reasons) else None)
        yield Output({**message, "role": "assistant"}, FINISHES.get(reason or "", reason))


def _answers(its: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each of the answers, and the reason that stands beside it; in the first convention that has any."""
    if given := _list(its.get("gen_ai.output.messages")):
        for said in given:
            yield from ((message, _tree(said).get("finish_reason")) for message in list(_of_parts(said))[:1])
    elif rows := _rows(its, "gen_ai.completion"):
        yield from ((_of_fields({"role": "assistant", **row}), row.get("finish_reason")) for row in rows)
    elif rows := _rows(its, "llm.output_messages"):
        said = [{"message": {"role": "assistant", **_tree(row.get("message"))}} for row in rows]
        yield from ((_of_inference(row), None) for row in said)
    else:
        for row in _rows(its, "llm.choices"):
            yield _message("assistant", _text(_tree(row.get("completion")).get("text"))), None


def _of_parts(message: Any) -> Iterator[dict[str, Any]]:
    """A message of OpenTelemetry's: its parts may be several of OpenAI's, one for each tool that answered."""
    its = _tree(message)
    parts = [part for part in _list(its.get("parts")) if isinstance(part, dict)]
    answers = [part for part in parts if part.get("type") == "tool_call_response"]
    for part in answers:
        said = part.get("response", part.get("result"))
        yield _message("tool", _text(said), tool_call_id=_word(part.get("id")))
    calls = [_called(part) for part in parts if part.get("type") == "tool_call"]
    if not answers or calls or len(parts) > len(answers):
        yield _message(its.get("role"), _content(parts), calls, name=_word(its.get("name")))


def _content(parts: list[Any]) -> str | list[dict[str, Any]] | None:
    """One text as it is, anything else as OpenAI's parts; None where nothing of it is content."""
    found = [made for part in parts if (made := _part(_tree(part))) is not None]
    if len(found) == 1 and found[0]["type"] == "text":
        return found[0]["text"]  # type: ignore[no-any-return]
    return found or None


def _part(part: Tree) -> dict[str, Any] | None:
    kind, content = part.get("type"), part.get("content")
    if kind in ("text", "refusal"):
        return {"type": "text", "text": _text(content)}
    if kind == "blob" and part.get("modality") == "image":
        return {"type": "image_url", "image_url": {"url": f"data:{part.get('mime_type')};base64,{_text(content)}"}}
    if kind in ("blob", "uri", "file"):
        where = part.get("uri") or part.get("file_id") or part.get("mime_type")
        return {"type": "text", "text": f"[{part.get('modality', kind)}: {_text(where)}]"}
    return None


def _of_fields(row: Tree) -> dict[str, Any]:
    """A message of OpenLLMetry's."""
    calls = [_called(call) for call in _numbered(row.get("tool_calls"))]
    return _named(row, _words(row.get("content")), calls)


def _of_inference(row: Tree) -> dict[str, Any]:
    """A message of OpenInference's."""
    its = _tree(row.get("message"))
    calls = [_tree(call.get("tool_call")) for call in _numbered(its.get("tool_calls"))]
    parts = [_tree(part.get("message_content")) for part in _numbered(its.get("contents"))]
    content = [made for part in parts if (made := _shown(part)) is not None]
    functions = [_called({"id": call.get("id"), **_tree(call.get("function"))}) for call in calls]
    return _named(its, content or _words(its.get("content")), functions)


def _named(its: Tree, content: Any, calls: list[Tree]) -> dict[str, Any]:
    return _message(its.get("role"), content, calls, _word(its.get("tool_call_id")), _word(its.get("name")))


def _words(content: Any) -> str | list[dict[str, Any]] | None:
    """Text; of a JSON list of OpenAI's parts, the parts where all are text. None: there is no content."""
    parts = _list(content) if isinstance(content, str) and content.startswith('[{"') else []
    if parts and all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        return [{"type": "text", "text": _text(part.get("text"))} for part in parts]
    return None if content is None else _text(content)


def _shown(part: Tree) -> dict[str, Any] | None:
    if part.get("type") == "text":
        return {"type": "text", "text": _text(part.get("text"))}
    url = _tree(_tree(part.get("image")).get("image")).get("url")
    if not isinstance(url, str):
        return None
    if url.startswith("data:"):
        return {"type": "image_url", "image_url": {"url": url}}
    return {"type": "text", "text": f"[image: {url}]"}


def _message(
    role: Any, content: Any, calls: list[Tree] | None = None, tool_call_id: str | None = None, name: str | None = None
) -> dict[str, Any]:
    role = ROLES.get(role, role) if isinstance(role, str) else ""
    if role not in KNOWN:
        raise Unreadable(f"a message has the role {role[:40]!r}; roles are: {', '.join(sorted(KNOWN))}")
    if content is None and role != "assistant":
        content = ""
    made = {"role": role, "content": content}
    made |= {"tool_calls": calls} if calls else {}
    return made | {key: value for key, value in (("tool_call_id", tool_call_id), ("name", name)) if value}


def _called(call: Tree) -> dict[str, Any]:
    function = {"name": _word(call.get("name")) or "", "arguments": _text(call.get("arguments"))}
    return {"id": _word(call.get("id")) or "", "type": "function", "function": function}


def _tools(its: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    given = _list(its.get("gen_ai.tool.definitions"))
    given += [{**row, "parameters": _table(row.get("parameters"))} for row in _rows(its, "llm.request.functions")]
    given += [_table(_tree(row.get("tool")).get("json_schema")) for row in _rows(its, "llm.tools")]
    for tool in given:
        if isinstance(tool, dict):
            own = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
            function = tool.get("function", own)
            if isinstance(function, dict) and isinstance(function.get("name"), str):
                yield {"type": "function", "function": function}


def _sampling(its: Mapping[str, Any], parameters: Tree) -> dict[str, Any]:
    def given(name: str) -> Any:
        return its.get(f"gen_ai.request.{name}", parameters.get(name))

    found: dict[str, Any] = {}
    for name in (*NUMBERS, *WHOLE):
        value = given(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            value = max(-LARGEST, min(LARGEST, value))
            found[name] = int(value) if name in WHOLE else float(value)
    stop = its.get("gen_ai.request.stop_sequences")
    if isinstance(stop, list):
        found["stop"] = [word for word in stop if isinstance(word, str)]
    return found


def _rows(its: Mapping[str, Any], prefix: str) -> list[Tree]:
    """The numbered things under a prefix: ``prefix.0.a.b`` is ``[{"a": {"b": …}}]``."""
    root: Tree = {}
    for name, value in its.items():
        if not name.startswith(prefix + "."):
            continue
        at: Any = root
        *path, last = name[len(prefix) + 1 :].split(".", LONGEST)
        for part in path:
            at = at.setdefault(part, {}) if isinstance(at, dict) else None
        if isinstance(at, dict):
            at[last] = value
    return _numbered(root)


def _numbered(rows: Any) -> list[Tree]:
    its = _tree(rows)
    numbers = sorted((name for name in its if name.isascii() and name.isdecimal() and len(name) < LONGEST), key=int)
    return [its[name] for name in numbers if isinstance(its[name], dict)]


def _tree(value: Any) -> Tree:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    """A list, as it is or as JSON text; empty where it is none."""
    given = _json(value) if isinstance(value, str) else value
    return given if isinstance(given, list) else []


def _table(value: Any) -> Tree:
    """An object, as it is or as JSON text; empty where it is none."""
    return _tree(_json(value) if isinstance(value, str) else value)


def _json(text: str) -> Any:
    """What JSON text says; None where it is none. Raises Unreadable where it nests deeper than a request may."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    if text.count("{") + text.count("[") > DEEPEST and deeper(value, DEEPEST):
        raise Unreadable(f"an attribute nests deeper than {DEEPEST} levels")
    return value


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _word(value: Any) -> str | None:
    return value[:256] if isinstance(value, str) and value else None
