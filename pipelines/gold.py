"""Gold items: questions with known right answers, kept from training, that gates and reports are measured on.

One JSON line an item in ``<folder>/<tenant>/<policy>.jsonl``. Adding is idempotent by content, and safe between
processes: a lock file, then one append, flushed to disk. A line that a crash cut short is dropped by the next add.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from everloop.contract import Contract
from everloop.episode import Split
from everloop.errors import ContractError
from everloop.event import Message
from everloop.release import point
from pydantic import ValidationError

from pipelines.holdout import prompt_key

GoldSplit = Literal["gate", "report"]
SHOWN_PROBLEMS = 20


class GoldItem(Contract):
    """A prompt and its right answer. ``slice`` names a skill that must not be lost; ``key`` is its cluster.

    Example: ``GoldItem.of("Where is my card?", "card_arrival", slice="cards", split="gate")``
    """

    id: str
    prompt: tuple[Message, ...]
    answer: str
    slice: str = ""
    split: GoldSplit

    @classmethod
    def of(
        cls,
        prompt: str | Iterable[Message],
        answer: str,
        *,
        slice: str = "",
        split: GoldSplit | None = None,
    ) -> GoldItem:
        """An item with the id of its content. Without a split, half of all clusters go to each.

        Raises ValueError where the prompt has no user message or the answer is empty.
        """
        messages = (Message(role="user", content=prompt),) if isinstance(prompt, str) else tuple(prompt)
        if not any(message.role == "user" and message.text.strip() for message in messages):
            raise ValueError("the prompt has no words of the user")
        if not answer.strip():
            raise ValueError("the answer is empty")
        key = prompt_key(messages)
        spoken = json.dumps([[m.role, m.text] for m in messages] + [answer], ensure_ascii=False)
        return cls(
            id="gold_" + hashlib.sha256(spoken.encode()).hexdigest()[:24],
            prompt=messages,
            answer=answer,
            slice=slice,
            split=split or ("gate" if point("gold", key) < 0.5 else "report"),
        )

    @property
    def key(self) -> str:
        return prompt_key(self.prompt)


class Added(NamedTuple):
    """How many items were new, and how many were there already."""

    new: int
    known: int


class GoldSet:
    """The gold items of every policy of an installation, below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._keys: dict[Path, tuple[tuple[int, int], dict[str, Split]]] = {}

    def path(self, tenant: str, policy: str) -> Path:
        return self.folder / tenant / f"{policy}.jsonl"

    def items(self, tenant: str, policy: str, split: GoldSplit | None = None) -> list[GoldItem]:
        """In the order in which they were added. Raises ContractError naming a line that is no item."""
        found = list(_read(self.path(tenant, policy)))
        return found if split is None else [item for item in found if item.split == split]

    def keys(self, tenant: str, policy: str) -> dict[str, Split]:
        """Near-duplicate clusters of the items, with their splits; read again only when the file has changed."""
        path = self.path(tenant, policy)
        try:
            status = path.stat()
        except FileNotFoundError:
            return {}
        stamp = (status.st_mtime_ns, status.st_size)
        held = self._keys.get(path)
        if held is None or held[0] != stamp:
            ordered = sorted(_read(path), key=lambda item: item.split)  # the report's cluster overrides the gate's
            held = (stamp, {item.key: Split(item.split) for item in ordered})
            self._keys[path] = held
        return held[1]

    def add(self, tenant: str, policy: str, items: Iterable[GoldItem]) -> Added:
        """Append what is not there yet, by content; durable on return. An item keeps the split it first had."""
        path = self.path(tenant, policy)
        path.parent.mkdir(parents=True, exist_ok=True)
        given = list(items)
        with _locked(path):
            _drop_torn_line(path)
            known = {item.id for item in _read(path)}
            new = {item.id: item for item in given if item.id not in known}
            if new:
                lines = "".join(item.model_dump_json(exclude_none=True) + "\n" for item in new.values())
                with path.open("a", encoding="utf-8") as file:
                    file.write(lines)
                    file.flush()
                    os.fsync(file.fileno())
        return Added(len(new), len(given) - len(new))

    def load(
        self, tenant: str, policy: str, path: Path, *, split: GoldSplit | None = None, system: str | None = None
    ) -> Added:
        """Import a CSV file (columns ``text``, ``category``, and ``split`` if there is one) or JSON lines.

        A JSON line has ``text`` or ``prompt`` (messages), ``answer``, and may have ``slice`` and ``split``.
        ``split`` is for rows that name none; ``system`` is put before prompts that are plain text.

        Raises:
            ContractError: the file is not of that form; nothing was added. The message numbers the bad rows.
        """
        return self.add(tenant, policy, read_file(path, split=split, system=system))


def read_file(path: Path, *, split: GoldSplit | None = None, system: str | None = None) -> list[GoldItem]:
    """The items of a CSV file or of JSON lines; see :meth:`GoldSet.load`."""
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
        ".csv": _csv_rows,
        ".jsonl": _json_rows,
        ".ndjson": _json_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ContractError(f"{path}: gold is imported from .csv or .jsonl, not from {path.suffix or 'no suffix'!r}")
    if not path.is_file():
        raise ContractError(f"there is no file {path}")
    items: list[GoldItem] = []
    problems: list[str] = []
    for number, row in reader(path):
        try:
            items.append(_item(row, split, system))
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"row {number}: {_words(error)}")
    if problems:
        more = f"\n  … and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        shown = "\n  ".join(problems[:SHOWN_PROBLEMS])
        raise ContractError(f"{path} is refused, nothing was added:\n  {shown}{more}")
    if not items:
        raise ContractError(f"{path} has no rows; give at least one line with text and answer")
    return items


def _words(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return str(error)


def _item(row: Any, split: GoldSplit | None, system: str | None) -> GoldItem:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"is a {type(row).__name__}, not an object")
    answer = row.get("answer") or row.get("category")
    if not isinstance(answer, str):
        raise ValueError("has no answer (columns: text, category; or text, answer)")
    named = row.get("split") or split
    if named not in (None, "gate", "report"):
        raise ValueError(f"split {named!r} is not known; use gate or report")
    return GoldItem.of(
        _prompt(row, system), answer, slice=str(row.get("slice") or row.get("category") or ""), split=named
    )


def _prompt(row: dict[str, Any], system: str | None) -> tuple[Message, ...]:
    prompt = row.get("prompt", row.get("text"))
    if isinstance(prompt, list):
        return tuple(Message.model_validate(message) for message in prompt)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("has no text (columns: text, category; or prompt, answer)")
    before = () if system is None else (Message(role="system", content=system),)
    return (*before, Message(role="user", content=prompt))


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = set(reader.fieldnames or ())
            if not {"text", "category"} <= columns:
                raise ContractError(
                    f"{path}: the first line must name the columns text and category; it has: "
                    f"{', '.join(sorted(columns)) or 'nothing'}"
                )
            for row in reader:
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ContractError(f"{path} is not a CSV file in UTF-8: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            yield number, ValueError(f"is not JSON: {error}")


def _read(path: Path) -> Iterator[GoldItem]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    *whole, _ = text.split("\n")  # what follows the last newline is being written, or was cut short by a crash
    for number, line in enumerate(whole, start=1):
        try:
            yield GoldItem.model_validate_json(line)
        except ValidationError as error:
            raise ContractError(f"{path} line {number} is not a gold item: {_words(error)}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
