"""The tables of the store: what fills them, their typed columns, and which of several versions counts.

A topic of the log fills each but one: rollouts come from the trainer (:mod:`pipelines.rollouts`). Every other row
carries its place in the log (``log_partition``, ``log_offset``). A table holds every version that was
written; ``identity`` names what a row is a version of and ``order`` puts the one that counts first. Nested
things stay nested (an episode's turns, a trajectory's sequences), so that one row is one version, whole.
Token ids are ``list<int32>``, log-probabilities ``list<float>``, times seconds since 1970, and what has no fixed
form is JSON text.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
from everloop import topics
from everloop.contract import Contract
from everloop.run import DeadLetter
from everloop.topics import Topic

from pipelines.rows import (
    EPISODE_COLUMNS,
    EVENT_COLUMNS,
    OWNER,
    ROLLOUT_COLUMNS,
    TRAJECTORY_COLUMNS,
    Row,
    episode_row,
    event_row,
    fields,
    flag,
    json_text,
    number,
    text,
    trajectory_row,
    whole,
)

NO_TENANT = "_"  # a name that no tenant can have: rows that belong to the installation
LATEST_DAY = 253_402_214_400.0  # the last day that a date can name: 9999-12-31
PLACE = {"log_partition": pa.int32(), "log_offset": whole}


class Table(NamedTuple):
    """One table."""

    name: str
    schema: pa.Schema
    identity: tuple[str, ...]
    order: str = "log_offset DESC"
    keeps: tuple[str, ...] = ()
    """Further columns that tell versions apart which compaction must keep (a release's history)."""


class Feed(NamedTuple):
    """What fills a table from the log.

    ``row`` makes the table's columns from a contract and its envelope, all but ``log_partition, log_offset``.
    """

    topic: Topic
    table: Table
    row: Callable[[Any, bytes], Row]


def schema_of(*columns: Mapping[str, pa.DataType]) -> pa.Schema:
    merged = {name: kind for group in (*columns, PLACE) for name, kind in group.items()}
    return pa.schema(list(merged.items()))


def day_of(seconds: float) -> str:
    """The UTC day of a time, as ``2026-11-23``; what lies outside the calendar falls on its first or last day."""
    return _named(int(min(max(seconds, 0.0), LATEST_DAY) // 86_400))


@functools.lru_cache(maxsize=1024)
def _named(day: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(day * 86_400))


# Everything else is flat: a column a field, what has no fixed form as JSON.


def _flat(columns: Mapping[str, pa.DataType], structured: frozenset[str]) -> Callable[[Contract, bytes], Row]:
    def row(thing: Contract, envelope: bytes) -> Row:
        found = fields(thing, columns)
        return {
            name: json_text(value) if name in structured and value is not None else value
            for name, value in found.items()
        }

    return row


def _feed(
    name: str,
    topic: Topic,
    columns: Mapping[str, pa.DataType],
    *,
    identity: tuple[str, ...],
    structured: tuple[str, ...] = (),
    order: str = "log_offset DESC",
    keeps: tuple[str, ...] = (),
) -> Feed:
    made = {**OWNER, **columns}
    return Feed(topic, Table(name, schema_of(made), identity, order, keeps), _flat(made, frozenset(structured)))


def _dead_letter_row(letter: DeadLetter, envelope: bytes) -> Row:
    return {"tenant": NO_TENANT, **fields(letter, DEAD_LETTER_COLUMNS)}


COMMAND_COLUMNS = {"id": text, "kind": text, "arguments": text, "by": text, "time": number}
DEAD_LETTER_COLUMNS = {
    "id": text,
    "handler": text,
    "topic": text,
    "partition": pa.int32(),
    "offset": whole,
    "record_key": text,
    "cause": text,
    "time": number,
    "value": pa.binary(),
}
NEWEST = "version DESC, log_offset DESC"
EVENTS = Table(
    "events",
    schema_of(EVENT_COLUMNS),
    ("tenant", "episode", "id"),
    order="log_offset",  # a retry is a duplicate: the first one counts
)
EPISODES = Table("episodes", schema_of(EPISODE_COLUMNS), ("tenant", "policy", "episode"), NEWEST)
TRAJECTORIES = Table("trajectories", schema_of(TRAJECTORY_COLUMNS), ("tenant", "policy", "episode"), NEWEST)
DEAD_LETTERS = Table("dead_letters", schema_of({"tenant": text}, DEAD_LETTER_COLUMNS), ("id",))
ROLLOUTS = Table(
    "rollouts",
    pa.schema(list(ROLLOUT_COLUMNS.items())),
    ("tenant", "policy", "run", "round", "number"),
    order="time DESC",
)

FEEDS: dict[str, Feed] = {
    feed.topic.name: feed
    for feed in (
        Feed(topics.EVENTS, EVENTS, event_row),
        Feed(topics.EPISODES, EPISODES, episode_row),
        Feed(topics.TRAJECTORIES, TRAJECTORIES, trajectory_row),
        _feed(
            "scores",
            topics.SCORES,
            {
                "episode": text,
                "version": whole,
                "call": text,
                "reward_version": text,
                "value": number,
                "spread": number,
                "reward": number,
                "mask": flag,
                "source": text,
                "label": number,
                "predicted": number,
                "quarantined": text,
                "ends_well_before": number,
                "ends_well_after": number,
                "time": number,
            },
            identity=("tenant", "policy", "episode", "call"),
            keeps=("reward_version",),
        ),
        _feed(
            "releases",
            topics.RELEASES,
            {
                "id": text,
                "adapter": text,
                "uri": text,
                "incumbent": text,
                "state": text,
                "step": whole,
                "reason": text,
                "evidence": text,
                "plan": text,
                "time": number,
            },
            structured=("evidence", "plan"),
            identity=("tenant", "policy", "id"),
            order="step DESC, log_offset DESC",
            keeps=("step",),
        ),
        _feed(
            "runs",
            topics.RUNS,
            {
                "id": text,
                "state": text,
                "step": whole,
                "batch": text,
                "seed": whole,
                "parent": text,
                "adapter": text,
                "trigger": text,
                "reason": text,
                "metrics": text,
                "publish": flag,
                "time": number,
            },
            structured=("metrics",),
            identity=("tenant", "policy", "id"),
            keeps=("step", "state"),
        ),
        _feed(
            "adapters",
            topics.ADAPTERS,
            {
                "hash": text,
                "base": text,
                "parent": text,
                "run": text,
                "batch": text,
                "uri": text,
                "registry_run": text,
                "rank": whole,
                "targets": pa.list_(text),
                "seed": whole,
                "metrics": text,
                "time": number,
            },
            structured=("metrics",),
            identity=("tenant", "policy", "hash"),
        ),
        _feed(
            "rewards",
            topics.REWARDS,
            {
                "version": text,
                "path": text,
                "updates": whole,
                "auc": number,
                "calibration_error": number,
                "offsets": text,
                "state": text,
                "reason": text,
                "evidence": text,
                "time": number,
            },
            structured=("offsets", "evidence"),
            identity=("tenant", "policy", "version"),
        ),
        _feed(
            "routes",
            topics.ROUTES,
            {
                "epoch": whole,
                "live": text,
                "release": text,
                "canary": text,
                "share": number,
                "uris": text,
                "time": number,
            },
            structured=("uris",),
            identity=("tenant", "policy"),
            order="epoch DESC, log_offset DESC",
            keeps=("epoch",),
        ),
        _feed(
            "commands",
            topics.COMMANDS,
            COMMAND_COLUMNS,
            structured=("arguments",),
            identity=("tenant", "id"),
            order="log_offset",
        ),
        _feed(
            "pauses",
            topics.PAUSES,
            COMMAND_COLUMNS,
            structured=("arguments",),
            identity=("tenant", "policy"),
            keeps=("id",),
        ),
        _feed(
            "pins",
            topics.PINS,
            {"id": text, "adapter": text, "state": text, "reason": text, "time": number},
            identity=("tenant", "policy", "id"),
            keeps=("state",),
        ),
        _feed(
            "checkpoints",
            topics.CHECKPOINTS,
            {"run": text, "kept": text, "running": flag, "time": number},
            structured=("kept",),
            identity=("tenant", "policy", "run"),
        ),
        Feed(topics.DEAD_LETTERS, DEAD_LETTERS, _dead_letter_row),
    )
}
"""What the archive writes, by the name of the topic."""

TABLES: dict[str, Table] = {table.name: table for table in (*(feed.table for feed in FEEDS.values()), ROLLOUTS)}
