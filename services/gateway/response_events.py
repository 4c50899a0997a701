"""A chat stream as the events of a Response.

::

    created, in_progress
      output_item.added ─ content_part.added ─ output_text.delta … done ─ content_part.done ─ output_item.done
      output_item.added ─ function_call_arguments.delta … done ─ output_item.done
    completed | incomplete | failed, and then error

One item after another, as OpenAI's own: LangChain takes what comes between for a new item. Thoughts and words end where
another item begins. Engines interleave calls, so the first call ends with the answer, and what follows it is told then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from services.gateway import response_object as whole
from services.gateway.ask import Ask
from services.gateway.refusals import Refused, error_fields


@dataclass(slots=True)
class Open:
    """An output item on its way: ``item`` as it began, and what has come of it. ``part``: its kind; "" for a call.

    ``told``: its beginning was sent; else another item is under way, and it waits.
    """

    at: int
    item: dict[str, Any]
    part: str = ""
    words: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    told: bool = False

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def where(self) -> dict[str, Any]:
        """What every event of it says."""
        place = {"item_id": self.item["id"], "output_index": self.at}
        return place | {"content_index": 0} if self.part else place


class Events:
    """Spells one stream. ``id`` is the Response's."""

    def __init__(self, ask: Ask, id: str) -> None:
        self._ask = ask
        self._id = id
        self._number = 0
        self._created = 0
        self._begun = False
        self._finish: str | None = None
        self._items: list[Open] = []
        self._done: dict[int, dict[str, Any]] = {}
        self._talking: Open | None = None  # the item of words that goes on
        self._calls: dict[int, Open] = {}

    def chunk(self, shown: dict[str, Any]) -> bytes:
        events = []
        if not self._begun:
            self._begun = True
            self._created = shown.get("created", 0)
            made = self._response("in_progress")
            events += [self._event("response.created", response=made)]
            events += [self._event("response.in_progress", response=made)]
        for choice in shown["choices"]:
            events += self._delta(choice)
            self._finish = choice.get("finish_reason") or self._finish
        return b"".join(events)

    def last(self, usage: dict[str, Any]) -> bytes:
        status = "incomplete" if self._finish in whole.INCOMPLETE else "completed"
        events = [] if self._items else self._talk("output_text", "", [])
        for one in self._items:
            events += self._end(one, status)
        made = whole.ended(self._response(status), self._finish, usage["usage"])
        return b"".join([*events, self._event(f"response.{status}", response=made)])

    def failed(self, refused: Refused) -> bytes:
        """The Response as it failed, and an error with which clients raise."""
        fields = error_fields(refused.status, refused.message, refused.code, refused.param)
        error = {"code": "server_error", "message": refused.message}
        made = whole.response(self._ask, self._id, self._created, "failed", [])  # what was withheld is not told here
        failed = self._event("response.failed", response={**made, "error": error})
        said = {name: fields[name] for name in ("code", "message", "param")}
        return failed + self._event("error", **said, error=fields)

    def _delta(self, choice: dict[str, Any]) -> list[bytes]:
        delta = choice.get("delta") or {}
        events = []
        if thought := whole.reasoning_of(delta):
            events += self._talk("reasoning_text", thought, [])
        if delta.get("content"):
            events += self._talk("output_text", delta["content"], (choice.get("logprobs") or {}).get("content") or [])
        if delta.get("refusal"):
            events += self._talk("refusal", delta["refusal"], [])
        for call in delta.get("tool_calls") or ():
            events += self._call(call)
        return events

    def _talk(self, part: str, words: str, logprobs: list[dict[str, Any]]) -> list[bytes]:
        events = []
        one = self._talking
        if one is None or one.part != part:
            events += self._quiet()
            item = whole.reasoning(self._id, "in_progress", "")
            if part != "reasoning_text":
                item = whole.said(self._id, "in_progress", [])
            one = self._talking = self._begin(item, part)
            events += self._first(one)
        return events + self._grow(one, words, logprobs)

    def _call(self, call: dict[str, Any]) -> list[bytes]:
        function = call.get("function") or {}
        events = []
        one = self._calls.get(call["index"])
        if one is None:
            events += self._quiet()
            at = len(self._calls)
            item = whole.called(self._id, at, "in_progress", call.get("id"), function.get("name") or "", "")
            one = self._calls[call["index"]] = self._begin(item, "")
            events += self._first(one)
        return events + self._grow(one, function.get("arguments") or "", [])

    def _begin(self, item: dict[str, Any], part: str) -> Open:
        if any(one.item["id"] == item["id"] for one in self._items):  # words after a call: a second item of them
            item["id"] += f"_{len(self._items)}"
        self._items.append(Open(len(self._items), item, part))
        return self._items[-1]

    def _first(self, one: Open) -> list[bytes]:
        """The beginning of an item, unless another one is under way."""
        return self._open(one) if all(before.at in self._done for before in self._items[: one.at]) else []

    def _open(self, one: Open) -> list[bytes]:
        one.told = True
        events = [self._event("response.output_item.added", output_index=one.at, item=one.item)]
        if one.part:
            events += [self._event("response.content_part.added", **one.where, part=_part(one.part, "", []))]
        return events

    def _grow(self, one: Open, words: str, logprobs: list[dict[str, Any]]) -> list[bytes]:
        if not words:
            return []
        one.words.append(words)
        one.logprobs += logprobs
        return self._delta_of(one, words, logprobs) if one.told else []

    def _delta_of(self, one: Open, words: str, logprobs: list[dict[str, Any]]) -> list[bytes]:
        said = {"delta": words} | ({"logprobs": logprobs} if one.part == "output_text" else {})
        return [self._event(f"response.{one.part or 'function_call_arguments'}.delta", **one.where, **said)]

    def _quiet(self) -> list[bytes]:
        """What ends the words that go on, if any do."""
        one, self._talking = self._talking, None
        return self._end(one, "completed") if one is not None and one.told else []

    def _end(self, one: Open, status: str) -> list[bytes]:
        if one.at in self._done:
            return []
        words = one.text
        events = [] if one.told else [*self._open(one), *self._delta_of(one, words, one.logprobs)]
        if not one.part:
            item = {**one.item, "status": status, "arguments": words}
            said = {"name": item["name"], "arguments": words}
            events += [self._event("response.function_call_arguments.done", **one.where, **said)]
        else:
            part = _part(one.part, words, one.logprobs)
            item = {**one.item, "status": status, "content": [part]}
            said = {"refusal": words} if one.part == "refusal" else {"text": words}
            said |= {"logprobs": one.logprobs} if one.part == "output_text" else {}
            events += [self._event(f"response.{one.part}.done", **one.where, **said)]
            events += [self._event("response.content_part.done", **one.where, part=part)]
        self._done[one.at] = item
        return [*events, self._event("response.output_item.done", output_index=one.at, item=item)]

    def _response(self, status: str) -> dict[str, Any]:
        output = [self._done[at] for at in sorted(self._done)]
        return whole.response(self._ask, self._id, self._created, status, output)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        body = {"type": kind, "sequence_number": number, **fields}
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(body))


def _part(kind: str, words: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    if kind == "refusal":
        return whole.refusal(words)
    if kind == "output_text":
        return whole.text(words, logprobs)
    return {"type": kind, "text": words}
