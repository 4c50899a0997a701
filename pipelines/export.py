"""Exports: a pinned data set in a folder, with a manifest that says exactly what it is.

``manifest.json`` names every file with its rows and SHA-256, the query that each came from, the versions of the
contracts, and the hash of the whole. The same store content and options give the same hash. Files are Parquet;
for trainers that read chats, ``sft.jsonl`` (messages with the answer that was right) and ``preferences.jsonl``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from everloop.contract import Contract
from everloop.errors import EverloopError
from everloop.feedback import FeedbackKind
from everloop.topics import TOPICS

from pipelines.archive import publish, write
from pipelines.rows import json_text
from pipelines.store import Store

Format = Literal["parquet", "sft", "preferences"]
FORMATS: tuple[Format, ...] = ("parquet", "sft", "preferences")
USE = "tenant = $tenant AND policy = $policy AND split = $split AND NOT synthetic"
EPISODES = f"SELECT episode FROM episodes WHERE {USE} AND quarantine IS NULL"
MINE = f"tenant = $tenant AND policy = $policy AND episode IN ({EPISODES})"

QUERIES = {
    "episodes": f"SELECT * FROM episodes WHERE {MINE} ORDER BY started, episode",
    "turns": f"SELECT * FROM turns WHERE {MINE} ORDER BY time, episode, turn, call",
    "trajectories": f"SELECT * FROM trajectories WHERE {MINE} ORDER BY episode",
    "scores": f"SELECT * FROM scores WHERE {MINE} ORDER BY episode, call",
    "feedback": f"SELECT * FROM feedback WHERE {MINE} ORDER BY time, episode, id",
    "preferences": f"SELECT * FROM preferences WHERE {MINE} ORDER BY time, episode, call, chosen, rejected",
}
SFT = f"""
SELECT messages, tools_offered, correction, answer, output, episode, call, version
FROM turns WHERE {MINE} AND error IS NULL
  AND (correction IS NOT NULL OR thumb > 0 OR rating >= 0.75 OR outcome >= 0.75)
ORDER BY time, episode, turn, call
"""
PAIRS = f"""
SELECT t.messages, t.tools_offered, t.answer, t.output, p.chosen, p.rejected, p.source, p.episode, p.call, p.version
FROM (SELECT * FROM preferences WHERE {MINE}) p
JOIN (SELECT * FROM turns WHERE {MINE} AND error IS NULL) t ON t.episode = p.episode AND t.call = p.call
ORDER BY p.time, p.episode, p.call, p.chosen, p.rejected
"""


class ExportRefused(EverloopError):
    """The folder holds something else, or the options ask for what there is not."""


def export(
    store: Store,
    folder: Path,
    *,
    tenant: str,
    policy: str,
    split: Literal["train", "gate", "report"] = "train",
    formats: Iterable[Format] = ("parquet",),
    query: str | None = None,
) -> dict[str, Any]:
    """Write the data set of a policy into an empty or new folder; returns the manifest.

    Synthetic and quarantined episodes are left out. ``query``: this SELECT's result alone, as ``query.parquet``.

    Raises:
        ExportRefused: the folder is not empty, or a format is not known.
        QueryRefused: the query cannot be answered.
    """
    wanted = list(formats)
    unknown = [name for name in wanted if name not in FORMATS]
    if unknown:
        raise ExportRefused(f"there is no format {unknown[0]!r}; choose from: {', '.join(FORMATS)}")
    if folder.exists() and any(folder.iterdir()):
        raise ExportRefused(f"{folder} is not empty; a data set gets a folder of its own")
    folder.mkdir(parents=True, exist_ok=True)
    scope = {"tenant": tenant, "policy": policy, "split": split}
    files = _files(store, folder, wanted, scope, query)
    manifest: dict[str, Any] = {
        **scope,
        "files": files,
        "hash": _hash(files),
        "versions": _versions(),
    }
    _write_text(folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def _files(
    store: Store, folder: Path, wanted: list[Format], scope: Mapping[str, str], query: str | None
) -> list[dict[str, Any]]:
    if query is not None:
        return [_parquet(folder, "query", query, store.sql(query))]
    files = []
    if "parquet" in wanted:
        files += [_parquet(folder, name, text, store.sql(text, _used(text, scope))) for name, text in QUERIES.items()]
    lines: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
        "sft": (SFT, _sft),
        "preferences": (PAIRS, _pair),
    }
    for name, (text, row) in lines.items():
        if name in wanted:
            files.append(_jsonl(folder, name, text, map(row, store.rows(text, _used(text, scope)))))
    return files


def _used(query: str, scope: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in scope.items() if f"${name}" in query}


def _parquet(folder: Path, name: str, query: str, table: pa.Table) -> dict[str, Any]:
    path = folder / f"{name}.parquet"
    write(table, path, {"everloop.query": query})
    return _entry(path, table.num_rows, query)


def _jsonl(folder: Path, name: str, query: str, rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
    lines = [json_text(row) + "\n" for row in rows]
    path = folder / f"{name}.jsonl"
    _write_text(path, "".join(lines))
    return _entry(path, len(lines), query)


def _sft(row: dict[str, Any]) -> dict[str, Any]:
    completion = _given(row) if row["correction"] is None else _words(row["correction"])
    return {**_chat(row), "completion": [completion], **_lineage(row)}


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    corrected = row["source"] == FeedbackKind.CORRECTION  # of the very answer that the call gave
    rejected = _given(row) if corrected else _words(row["rejected"])
    said = {"chosen": [_words(row["chosen"])], "rejected": [rejected]}
    return {**_chat(row), **said, "source": row["source"], **_lineage(row)}


def _words(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _given(row: dict[str, Any]) -> dict[str, Any]:
    """The answer of a call, its tool calls included."""
    calls = json.loads(row["output"]).get("tool_calls")
    return {**_words(row["answer"]), **({"tool_calls": calls} if calls else {})}


def _chat(row: dict[str, Any]) -> dict[str, Any]:
    tools = {"tools": json.loads(row["tools_offered"])} if row["tools_offered"] else {}
    return {"prompt": json.loads(row["messages"]), **tools}


def _lineage(row: dict[str, Any]) -> dict[str, Any]:
    return {"episode": row["episode"], "call": row["call"], "version": row["version"]}


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    publish(partial, path)


def _entry(path: Path, rows: int, query: str) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"name": path.name, "rows": rows, "sha256": digest, "query": " ".join(query.split())}


def _hash(files: list[dict[str, Any]]) -> str:
    return hashlib.sha256("".join(f"{f['name']} {f['sha256']}\n" for f in files).encode()).hexdigest()


def _versions() -> dict[str, Any]:
    """The package's version, and the schema version of every contract that a topic carries."""
    contracts: list[type[Contract]] = [topic.contract for topic in TOPICS.values()]
    schemas = {made.__name__: int(made.model_fields["schema_version"].default) for made in contracts}
    return {"everloop": installed("everloop"), **schemas}
