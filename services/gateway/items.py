"""Input items of ``/v1/responses`` as chat messages: what the engine is asked and the log keeps is the same for both.

::

    message (typed or easy)            the message of its role
    assistant message, function_call   one assistant message, as long as nothing else stands between them
    function_call_output               a tool's message
    reasoning                          left out: a model does not read its earlier thoughts again
"""

from __future__ import annotations

from typing import Any

from services.gateway.checks import bad, shown

ROLES = ("user", "assistant", "system", "developer")
TAKEN = ("message", "function_call", "function_call_output", "reasoning")
Message = dict[str, Any]


def messages(given: Any, instructions: str | None) -> list[Message]:
    """The messages of ``input``, after those of ``instructions``. Raises Refused (400), naming the item."""
    found: list[Message] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*found, {"role": "user", "content": given}]
    if not given and instructions is None:
        raise bad("'input' is missing or empty: send a text, or a list of items", "input")
    for at, item in enumerate(given or ()):
        _take(found, item, f"input[{at}]")
    if not found:
        raise bad("'input' has nothing for a model to read: send a message beside the reasoning", "input")
    return found


def _take(found: list[Message], item: Any, where: str) -> None:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "message":
        _join(found, _message(item, where))
    elif kind == "function_call":
        _join(found, _called(item, where))
    elif kind == "function_call_output":
        call = _text(item, "call_id", where)
        found.append({"role": "tool", "tool_call_id": call, "content": _content(item.get("output"), f"{where}.output")})
    elif kind == "item_reference":
        raise bad(
            f"{where} refers to an item that was not kept: the gateway keeps no items. Send the item itself (clients "
            "that send references do so with 'store': false)",
            "input",
        )
    elif kind != "reasoning":
        raise bad(f"{where} is of type {shown(kind)}; taken are: {', '.join(TAKEN)}", "input")


def _message(item: dict[str, Any], where: str) -> Message:
    role = item.get("role")
    if role not in ROLES:
        raise bad(f"{where} has role {shown(role)}; roles are: {', '.join(ROLES)}", "input")
    return {"role": role, "content": _content(item.get("content"), f"{where}.content")}


def _called(item: dict[str, Any], where: str) -> Message:
    function = {"name": _text(item, "name", where), "arguments": item.get("arguments")}
    if not isinstance(function["arguments"], str):
        raise bad(f"{where}.arguments must be a text: the call's arguments in JSON", "input")
    call = {"id": _text(item, "call_id", where), "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _join(found: list[Message], message: Message) -> None:
    """Words and calls that stand together are one answer, as the model gave it."""
    last = found[-1] if found else {}
    if message["role"] != "assistant" or last.get("role") != "assistant":
        found.append(message)
    elif "tool_calls" in message:
        last.setdefault("tool_calls", []).extend(message["tool_calls"])
    elif last["content"] is None:
        last["content"] = message["content"]
    else:
        found.append(message)


def _content(given: Any, where: str) -> Any:
    """Text as it is, and so what is text alone; else parts as chat has them."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise bad(f"{where} must be a text or a list of parts, not {shown(given)}", "input")
    parts = [_part(part, f"{where}[{at}]") for at, part in enumerate(given)]
    if len(parts) == 1 and parts[0]["type"] == "text":
        return parts[0]["text"]
    return parts or ""


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("input_text", "output_text"):
        return {"type": "text", "text": _text(part, "text", where, empty=True)}
    if kind == "refusal":
        return {"type": "refusal", "refusal": _text(part, "refusal", where, empty=True)}
    if kind == "input_image":
        image = {"url": _data(part, "image_url", where)}
        return {"type": "image_url", "image_url": image | _named(part, "detail", where)}
    if kind == "input_file":
        file = {"file_data": _data(part, "file_data", where)}
        return {"type": "file", "file": file | _named(part, "filename", where)}
    raise bad(f"{where} is of type {shown(kind)}; parts are input_text, output_text, input_image, input_file", "input")


def _data(part: dict[str, Any], name: str, where: str) -> str:
    given = part.get(name)
    if not isinstance(given, str) or not given.startswith("data:"):
        raise bad(
            f"{where}.{name} must be a data: URL. The gateway keeps no files and fetches nothing from the network; "
            "send the bytes themselves as data:<type>;base64,…",
            "input",
        )
    return given


def _named(part: dict[str, Any], name: str, where: str) -> dict[str, str]:
    return {} if part.get(name) is None else {name: _text(part, name, where)}


def _text(item: dict[str, Any], name: str, where: str, *, empty: bool = False) -> str:
    given = item.get(name)
    if not isinstance(given, str) or not (given or empty):
        raise bad(f"{where}.{name} must be a text{'' if empty else ', and not an empty one'}", "input")
    return given
