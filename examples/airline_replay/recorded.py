"""Recorded episodes of a tool-using airline agent (tau-bench, MIT): read, checked, and taken apart into events."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FILE = "tau_bench/gpt-4o-airline.json"
SHA256 = "e9e6c0297660c537f83d4fd9c476ce7a9a86ecd2784874b7bfc13be598e37bfa"
HOME = "https://raw.githubusercontent.com/sierra-research/tau-bench/main/historical_trajectories/gpt-4o-airline.json"


class RecordingError(Exception):
    """There is no recording, or it is not the published one; says how to get it."""


class Recorded(NamedTuple):
    """One episode: ``messages`` in OpenAI's form, system prompt first. ``outcome``: 1.0 solved, 0.0 not."""

    task: int
    trial: int
    outcome: float
    messages: tuple[dict[str, Any], ...]

    @property
    def length(self) -> int:
        return len(self.messages)

    @property
    def tool_calls(self) -> int:
        return sum(len(message.get("tool_calls") or ()) for message in self.messages)


class Call(NamedTuple):
    """What the model was asked, and what it answered."""

    prompt: tuple[dict[str, Any], ...]
    output: dict[str, Any]


class ToolAnswer(NamedTuple):
    """``arguments`` is JSON text. ``error``: the tool says itself that it failed."""

    name: str
    arguments: str
    result: str
    error: bool


def find(path: Path | None, cache: Path, environment: Mapping[str, str] | None = None) -> Path:
    """The recording's file: ``path``, else below EVERLOOP_DATA, else below ``cache``. Raises RecordingError."""
    environment = os.environ if environment is None else environment
    data = environment.get("EVERLOOP_DATA")
    places = [path] if path else [*([Path(data) / FILE] if data else []), cache / FILE]
    for place in places:
        if place.is_file():
            return place
    raise RecordingError(
        "the recorded episodes are not here. Get them from their public home and try again:\n"
        f"curl -fL --create-dirs -o {cache / FILE} {HOME}"
    )


def read(path: Path) -> list[Recorded]:
    """All 200 episodes in the file's order. Raises RecordingError where it is not the published file."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise RecordingError(f"{path} is not the published file: SHA-256 {found}, expected {SHA256}")
    return [
        Recorded(one["task_id"], one["trial"], float(one["reward"]), tuple(one["traj"])) for one in json.loads(content)
    ]


def events(messages: Sequence[dict[str, Any]]) -> Iterator[Call | ToolAnswer]:
    """The model calls and tool answers of an episode, in order: what its agent would have sent while it ran."""
    asked: dict[str, dict[str, Any]] = {}
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            asked |= {call["id"]: call["function"] for call in message.get("tool_calls") or ()}
            yield Call(tuple(messages[:at]), message)
        elif message["role"] == "tool":
            arguments = asked.get(message["tool_call_id"], {}).get("arguments", "")
            result = message["content"] or ""
            yield ToolAnswer(message["name"], arguments, result, result.startswith("Error"))
