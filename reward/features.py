"""What the reward model sees of a call: two texts, and the structure of the episode up to it.

Beside them, a few numbers of how much was asked and what the answer takes up of it, which an encoder hardly sees.

``prompt_text`` and ``answer_text`` are also what a trainer must use for its fresh rollouts, so that the model
scores them on the same view. Style (length, lists, headings, emphasis) stands apart from the other features: the
heads are trained with it, so that it can explain away what raters owe to it, and it is left out when they score (as
in ODIN, Chen et al. 2024, arXiv:2402.07319).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from everloop.episode import Episode, Turn
from everloop.event import Message

CONTEXT_CHARS = 240  # of what stood between the user's last words and the answer
ANSWER_CHARS = 2000
Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Structure:
    """The course of the episode up to and including a call; counts are of what happened before its answer.

    ``finish`` is the engine's finish reason ("stop", "length", "tool_calls"; None: not known).
    """

    turn: int = 0
    tools: int = 0
    tool_errors: int = 0
    retries: int = 0
    calls_tool: bool = False
    finish: str | None = None

    def vector(self) -> list[float]:
        """STRUCTURE's numbers, each about 0 to 1."""
        return [
            math.log1p(self.turn) / 3,
            math.log1p(self.tools) / 3,
            self.tool_errors / (self.tools or 1),
            min(self.tool_errors, 3) / 3,
            min(self.retries, 3) / 3,
            float(self.calls_tool),
            float(self.finish == "length"),
        ]


STRUCTURE = ("turn", "tools", "tool_error_share", "tool_errors", "retries", "calls_tool", "cut_off")
CONTENT = ("asked_words", "asked_numbers", "numbers_used", "numbers_given", "words_repeated")
NAMES = (*STRUCTURE, *CONTENT)
PRIOR = {
    "turn": -0.5,
    "tools": -0.5,
    "tool_error_share": -0.5,
    "tool_errors": -1.0,
    "retries": -0.5,
    "calls_tool": 0.0,
    "cut_off": -1.0,
} | dict.fromkeys(CONTENT, 0.0)
"""Log-odds that each adds to an answer's being good, before anything was learned."""


@dataclass(frozen=True)
class Example:
    """One answer to one prompt, as the reward model sees it."""

    prompt: str
    answer: str
    structure: Structure = Structure()


def content_vector(example: Example) -> list[float]:
    """CONTENT's numbers, each -2 to 2: of how much was asked, and of what the answer takes up of it.

    The logarithms of the prompt's words and of its distinct numbers; the share of the prompt's numbers that the answer
    has, the share of the answer's that the prompt has, and the share of the answer's words that are the prompt's.
    """
    asked, given = (set(NUMBER.findall(text)) for text in (example.prompt, example.answer))
    words, said = example.prompt.lower().split(), example.answer.lower().split()
    known = set(words)
    return [
        min(max(math.log1p(len(words)) - 3.5, -2.0), 2.0),
        min(math.log1p(len(asked)) - 1, 2.0),
        _share(len(asked & given), len(asked)),
        _share(len(asked & given), len(given)),
        _share(sum(word in known for word in said), len(said)),
    ]


def _share(part: int, whole: int) -> float:
    """From -0.5 (none) to 0.5 (all); 0 of nothing."""
    return part / whole - 0.5 if whole else 0.0


NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def style_vector(answer: str) -> list[float]:
    """How an answer looks: STYLES numbers of about 0 to 1.

    The logarithm of its words, and of its words above a hundred; then, as logarithms of how often, list items,
    headings, code fences, bold words, exclamation marks and lines.
    """
    words = len(answer.split())
    marks = [len(pattern.findall(answer)) for pattern in MARKS]
    return [math.log1p(words) / 5, math.log1p(max(0, words - 100)) / 5, *(math.log1p(many) / 3 for many in marks)]


MARKS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (r"^\s*(?:[-*•]|\d+[.)])\s", r"^#{1,6}\s", r"```", r"\*\*|__", r"!", r"\n")
)
STYLES = 2 + len(MARKS)


def _field(message: Message | Mapping[str, Any], name: str) -> Any:
    return message.get(name) if isinstance(message, Mapping) else getattr(message, name)


def _words(message: Message | Mapping[str, Any]) -> str:
    """The text of a message, tool calls included as ``name(arguments)``."""
    content = _field(message, "content")
    if isinstance(content, str):
        text = content
    else:
        text = "".join(str(part.get("text", "")) for part in content or () if part.get("type") == "text")
    asked = [call.get("function", {}) for call in _field(message, "tool_calls") or ()]
    calls = [f"{function.get('name', '')}({function.get('arguments', '')})" for function in asked]
    return "\n".join(part for part in (text.strip(), *calls) if part)


def answer_text(message: Message | Mapping[str, Any]) -> str:
    """The answer as one text: its words, then its tool calls. Empty where it says and does nothing."""
    return _words(message)[:ANSWER_CHARS]


def prompt_text(messages: Sequence[Message | Mapping[str, Any]]) -> str:
    """The user's last words, and after them (shortened) what came since, or else the exchange before them.

    The system prompt is left out: it is the same in every call of a policy. Without a user's message: the last one.
    """
    spoken = [message for message in messages if _field(message, "role") not in ("system", "developer")]
    if not spoken:
        return _words(messages[-1]) if messages else ""
    last = max((i for i, m in enumerate(spoken) if _field(m, "role") == "user"), default=len(spoken) - 1)
    context = spoken[last + 1 :][-2:] or spoken[:last][-1:]
    return "\n".join([_words(spoken[last]), *(_words(message)[:CONTEXT_CHARS] for message in context)])


def _repeats(turn: Turn, before: Sequence[Turn]) -> bool:
    """The same words or the same tool calls as in the turn before: something did not work."""
    return bool(before) and answer_text(turn.call.output) == answer_text(before[-1].call.output) != ""


def structures(episode: Episode) -> Iterator[Structure]:
    """The structure at each turn of an episode, in order."""
    positions = episode.positions
    tools = [len(turn.tools) for turn in episode.turns]
    errors = [sum(result.error or says_error(result.result) for result in turn.tools) for turn in episode.turns]
    firsts = [positions.index(at) for at in positions]  # of the answers to the same request
    repeats = [i == firsts[i] and _repeats(turn, episode.turns[:i]) for i, turn in enumerate(episode.turns)]
    for number, turn in enumerate(episode.turns):
        first = firsts[number]
        yield Structure(
            turn=positions[number],
            tools=sum(tools[:first]),
            tool_errors=sum(errors[:first]),
            retries=sum(repeats[: first + 1]),
            calls_tool=bool(turn.call.output.tool_calls),
            finish=turn.call.finish_reason,
        )


def says_error(result: str) -> bool:
    """Whether a tool's answer is an error by its own word: many tools report errors as ordinary text."""
    start = result.lstrip()[:200].lower()
    if start.startswith("{"):
        try:
            fields = json.loads(result)
        except ValueError:
            return False
        return isinstance(fields, dict) and bool(fields.get("error"))
    return start.startswith(("error", "traceback", "exception"))


def course(messages: Sequence[Message | Mapping[str, Any]], turn: int) -> Structure:
    """The structure of an answer that nobody sent, as far as its prompt tells: a trainer's rollouts have no episode."""
    results = [_words(message) for message in messages if _field(message, "role") == "tool"]
    return Structure(turn=turn, tools=len(results), tool_errors=sum(map(says_error, results)))


def examples(episode: Episode) -> list[Example]:
    """What the model sees of each turn of an episode, in order."""
    return [
        Example(prompt_text(turn.call.messages), answer_text(turn.call.output), structure)
        for turn, structure in zip(episode.turns, structures(episode), strict=True)
    ]
