"""Words out of sampled tokens as they come: never half a character, never beyond a stop string.

A tool call is kept back from the words: an answer that begins one shows nothing after it, and the call is read
from the whole text at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.policy.base import BROKEN
from trainer.policy.tools import BEGIN, parse


class Words:
    """The text of one answer. Feed ids with :meth:`take`; read what may be shown with :meth:`show`.

    ``tools`` are those on offer, as :func:`trainer.policy.tools.offered` says them.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), tools: Mapping[str, Any] | None = None
    ) -> None:
        self._decode = decode
        self._stops = stops
        self._tools = tools
        self._marks = (BEGIN,) if tools else ()
        self._ids: list[int] = []
        self._from = 0  # ids before it are settled: a few after it give context to the newest
        self._settled = ""  # text of the ids in _ids[_from : _until]
        self._until = 0
        self._shown = 0
        self.text = ""
        self.stopped = False

    def take(self, ids: Sequence[int]) -> bool:
        """Add sampled ids. True where a stop string has come: the text ends before it."""
        self._ids.extend(ids)
        recent = self._decode(self._ids[self._from :])
        if not recent.endswith(BROKEN):
            self._grow(recent)
        return self.stopped

    def end(self) -> None:
        """No more ids come: what is left of an unfinished character stays as the decoder shows it."""
        if not self.stopped:
            self._grow(self._decode(self._ids[self._from :]))

    def show(self) -> str:
        """What is new and may be sent now: a beginning of a stop string or of a tool call is held."""
        end = len(self.text)
        if self._marks and BEGIN in self.text:
            end = self.text.index(BEGIN)
        else:
            end -= max((_overlap(self.text, mark) for mark in (*self._stops, *self._marks)), default=0)
        return self._until_now(end)

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """What was held of the words, and the tool calls of the whole answer. After :meth:`end`."""
        words, calls = parse(self.text, self._tools) if self._tools else (self.text, [])
        return self._until_now(len(words)), calls

    def _until_now(self, end: int) -> str:
        new = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new

    def _grow(self, recent: str) -> None:
        before = len(self.text)
        self.text += recent[len(self._settled) :]
        self._from, self._until = self._until, len(self._ids)
        self._settled = self._decode(self._ids[self._from :])
        self._cut(before)

    def _cut(self, before: int) -> None:
        longest = max((len(stop) for stop in self._stops), default=0)
        start = max(0, before - longest)
        found = [at for at in (self.text.find(stop, start) for stop in self._stops) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of ``text`` begin ``mark`` without completing it."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
