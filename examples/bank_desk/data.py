"""The desk's messages and their right topics: banking77, a team's own CSV file, or a small built-in desk.

Splits, seeded: the prior gets 5 labels a topic of the training part, the rest of it is the stream of messages that
customers send; half of the held-out part is the gate's, the other half is the report's. No text is in two splits.
"""

from __future__ import annotations

import csv
import hashlib
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from examples.bank_desk import builtin_desk

LABELS_A_TOPIC = 5
HELD_OUT = 0.25  # share of a file without a split column
FEWEST_TOPICS, MOST_TOPICS = 2, 300
FEWEST_STREAM, FEWEST_HELD_OUT = 50, 40
SHOWN_PROBLEMS = 10
CSV_SPLITS = ("train", "test", "gate", "report")
BANKING77 = {
    "train.csv": "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
    "test.csv": "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
}
HOME_OF_BANKING77 = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/master/banking_data"


class DataError(Exception):
    """The messages cannot be used: what is wrong with them, by row, and what to do."""


class Message(NamedTuple):
    text: str
    topic: str


class Desk(NamedTuple):
    """``name`` says which data it is, ``source`` where it lay; ``note`` says how to get better data, or nothing."""

    name: str
    source: str
    note: str
    topics: tuple[str, ...]
    prior: tuple[Message, ...]
    stream: tuple[Message, ...]
    gate: tuple[Message, ...]
    report: tuple[Message, ...]


class Rows(NamedTuple):
    """Messages as a source gives them: a training part, and held-out messages already split or still together."""

    train: list[Message]
    test: list[Message]
    gate: list[Message]
    report: list[Message]


def load(csv_file: Path | None, cache: Path, seed: int = 0, environment: Mapping[str, str] | None = None) -> Desk:
    """The desk from ``csv_file``, else banking77 (EVERLOOP_DATA, then ``cache``), else the built-in one.

    Raises:
        DataError: the file is not what it should be; the message numbers the rows.
    """
    if csv_file is not None:
        return split(read_csv(csv_file), seed, csv_file.name, str(csv_file))
    found = find_banking77(cache, os.environ if environment is None else environment)
    if found is not None:
        train, test = (read_csv(found / name).train for name in BANKING77)
        return split(Rows(train, test, [], []), seed, "banking77", str(found))
    train, test = ([Message(*pair) for pair in pairs] for pairs in builtin_desk.messages(seed))
    return split(Rows(train, test, [], []), seed, "built-in desk", "generated messages", how_to_download(cache))


def find_banking77(cache: Path, environment: Mapping[str, str]) -> Path | None:
    """The folder that holds both files, their SHA-256 checked; None where there is none.

    Raises DataError where a file is there and is not the published one.
    """
    places = [cache / "banking77"]
    if environment.get("EVERLOOP_DATA"):
        places.insert(0, Path(environment["EVERLOOP_DATA"]) / "banking77")
    for folder in places:
        if all((folder / name).is_file() for name in BANKING77):
            for name, expected in BANKING77.items():
                _check(folder / name, expected)
            return folder
    return None


def _check(path: Path, expected: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is not the published file: SHA-256 {found}, expected {expected}. "
            "Delete it, or download it again whole"
        )


def how_to_download(cache: Path) -> str:
    """The commands that get banking77 from its public home to where the next demo finds it."""
    folder = cache / "banking77"
    lines = [f"curl -fL --create-dirs -o {folder / name} {HOME_OF_BANKING77}/{name}" for name in BANKING77]
    return "\n".join(["For real messages (banking77, PolyAI, CC BY 4.0), run and try again:", *lines])


def read_csv(path: Path) -> Rows:
    """A CSV file with the columns ``text``, ``category``, and ``split`` (train, test, gate or report) if there is one.

    Rows without a split are all in ``train``. Raises DataError naming every bad row, up to ten.
    """
    rows = Rows([], [], [], [])
    problems: list[str] = []
    for number, row in _numbered(path):
        problem = _problem(row)
        if problem is not None:
            problems.append(f"row {number}: {problem}")
            continue
        named = (row.get("split") or "train").strip().lower()
        getattr(rows, named).append(Message(row["text"].strip(), row["category"].strip()))
    if problems:
        more = f"\n  … and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise DataError(f"{path} is refused:\n  " + "\n  ".join(problems[:SHOWN_PROBLEMS]) + more)
    return rows


def _numbered(path: Path) -> Iterable[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"text", "category"} <= set(columns):
                raise DataError(f"{path}: the first line must name the columns text and category; it has: {columns}")
            yield from ((reader.line_num, row) for row in reader)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from None


def _problem(row: dict[str, str]) -> str | None:
    if None in row:
        return "has more columns than the first line names (quote texts that have a comma)"
    if not (row["text"] or "").strip():
        return "text is empty"
    if not (row["category"] or "").strip():
        return "category is empty"
    if len(row["category"]) > 100 or "\n" in row["category"].strip():
        return "category is longer than 100 characters or has a line break: it should be a short name"
    named = (row.get("split") or "train").strip().lower()
    return None if named in CSV_SPLITS else f"split {named!r} is not one of {', '.join(CSV_SPLITS)}"


def split(rows: Rows, seed: int, name: str, source: str, note: str = "") -> Desk:
    """Divide rows by the rules above; a text that is held out is taken from the stream.

    Raises DataError where topics or messages are too few or too many to learn and measure.
    """
    dice = random.Random(seed)
    train, test = list(rows.train), list(rows.test)
    if not (rows.test or rows.gate or rows.report):
        train, test = _stratified(train, HELD_OUT, dice)
    report, gate = _stratified(test, 0.5, dice)
    seen: set[str] = set()
    report = _unseen([*rows.report, *report], seen)
    gate = _unseen([*rows.gate, *gate], seen)
    train = _unseen(train, seen)
    dice.shuffle(train)
    prior, stream = _first_of_each(train, LABELS_A_TOPIC)
    for held_out in (gate, report):  # they come topic by topic: any part of them must be of all topics
        dice.shuffle(held_out)
    topics = tuple(sorted({message.topic for message in train}))
    desk = Desk(name, source, note, topics, tuple(prior), tuple(stream), tuple(gate), tuple(report))
    _check_size(desk)
    return desk


def _stratified(messages: list[Message], share: float, dice: random.Random) -> tuple[list[Message], list[Message]]:
    """(the rest, ``share`` of each topic's messages), drawn at random."""
    by_topic: dict[str, list[Message]] = {}
    for message in messages:
        by_topic.setdefault(message.topic, []).append(message)
    rest: list[Message] = []
    drawn: list[Message] = []
    for topic in sorted(by_topic):
        own = by_topic[topic]
        dice.shuffle(own)
        many = min(len(own) - 1, round(len(own) * share + dice.random() - 0.5))
        drawn += own[:many]
        rest += own[many:]
    return rest, drawn


def _unseen(messages: Iterable[Message], seen: set[str]) -> list[Message]:
    kept = []
    for message in messages:
        key = " ".join(message.text.lower().split())
        if key not in seen:
            seen.add(key)
            kept.append(message)
    return kept


def _first_of_each(messages: Iterable[Message], limit: int) -> tuple[list[Message], list[Message]]:
    count: dict[str, int] = {}
    first, rest = [], []
    for message in messages:
        count[message.topic] = count.get(message.topic, 0) + 1
        (first if count[message.topic] <= limit else rest).append(message)
    return first, rest


def _check_size(desk: Desk) -> None:
    if not FEWEST_TOPICS <= len(desk.topics) <= MOST_TOPICS:
        raise DataError(
            f"{desk.name} has {len(desk.topics)} topics in its training part; the desk takes {FEWEST_TOPICS} to "
            f"{MOST_TOPICS}. Join rare categories, or check that the column 'category' holds short names"
        )
    unknown = {message.topic for message in (*desk.gate, *desk.report)} - set(desk.topics)
    if unknown:
        shown = ", ".join(sorted(unknown)[:5])
        raise DataError(f"{desk.name} holds out topics that its training part never shows: {shown}. Add messages")
    for what, have, need in (
        ("messages to send", len(desk.stream), FEWEST_STREAM),
        ("held-out messages for the gate", len(desk.gate), FEWEST_HELD_OUT),
        ("held-out messages for the report", len(desk.report), FEWEST_HELD_OUT),
    ):
        if have < need:
            raise DataError(
                f"{desk.name} leaves {have} {what}, and {need} are the least that shows anything; "
                f"{LABELS_A_TOPIC} of each topic go to the prior. Give more rows"
            )
