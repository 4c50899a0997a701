"""Ask DuckDB about what was captured, scored and released. Read-only.

Views: episodes, turns (one row a call), trajectories, rollouts (synthetic), scores, feedback, preferences, releases,
runs, adapters, rewards, routes, commands, pauses, pins, checkpoints, dead_letters, events: the newest version of each
thing; history.<view> has all versions. Times are seconds since 1970; a table for people shows them as dates, in UTC.

  everloop sql "select policy_version, arm, count(*), avg(thumb) from turns group by all"
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from datetime import UTC, datetime
from typing import Any

from services.installation import Installation
from services.tables import table

SHOWN = 200  # rows of a table for people
TIMES = re.compile(r"(?<![a-z])(time|started|updated)(?![a-z])")
EARLIEST, LATEST = 978_307_200.0, 4_102_444_800.0  # the years 2001 to 2100, in seconds since 1970


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("query", help="one SELECT; '-' reads it from the standard input")
    parser.add_argument("--tenant", help="see this tenant's rows alone")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a row")
    form.add_argument("--csv", action="store_true")


def run(options: argparse.Namespace) -> int:
    from pipelines.store import Store

    with Installation.here() as here:
        store = Store(here.home.root / "store", tenant=options.tenant, blobs=here.home.blobs)
        try:
            query = sys.stdin.read() if options.query == "-" else options.query
            rows = store.rows(query)
            names = list(rows[0]) if rows else list(store.sql(query).schema.names)
        finally:
            store.close()
    _show(options, names, rows)
    return 0


def _show(options: argparse.Namespace, names: list[str], rows: list[dict[str, Any]]) -> None:
    if options.json:
        for row in rows:
            print(json.dumps(row, default=_plain, ensure_ascii=False))
    elif options.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([row[name] for name in names] for row in rows)
    else:
        columns = [_readable(name, [row[name] for row in rows[:SHOWN]]) for name in names]
        print(table(names, list(zip(*columns, strict=True))))
        more = f", the first {SHOWN} of them shown (--csv and --json show all)" if len(rows) > SHOWN else ""
        print(f"{len(rows)} rows{more}")


def _readable(name: str, values: list[Any]) -> list[Any]:
    """A column of times as ISO 8601, in UTC: known by a name such as time or max(time), and by numbers that fit."""
    known = [value for value in values if value is not None]
    fit = all(isinstance(value, float) and EARLIEST < value < LATEST for value in known)
    if not (TIMES.search(name) and known and fit):
        return values
    return [None if value is None else _iso(value) for value in values]


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: Any) -> Any:
    """Times, arrays and bytes for JSON."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value.hex() if isinstance(value, bytes) else str(value)
