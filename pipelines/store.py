"""The trajectory store: SQL over the Parquet files that the archive writes, read-only.

::

    store = Store(home.root / "store")
    store.rows("SELECT policy_version, avg(thumb) AS thumb FROM turns GROUP BY ALL")

Views: ``events, episodes, turns, trajectories, rollouts, scores, feedback, preferences, releases, runs, adapters,
rewards, routes, commands, pauses, pins, checkpoints, dead_letters``, each the newest version of its things.
``rollouts`` are what policies in training answered: marked synthetic, and in no other view. ``history.<table>`` has
every version that compaction has not folded: of releases, runs, routes and scores all that matter, of episodes the
recent ones.
An empty store has all of them, empty. A query can read nothing outside the store's folder and write nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
from everloop import wire
from everloop.episode import Episode
from everloop.errors import EverloopError
from everloop.score import Score
from everloop.wire import BlobStore

from pipelines import compaction, views
from pipelines.tables import TABLES

T = TypeVar("T")
Parameters = Sequence[Any] | Mapping[str, Any]
RETRIES = 5  # of a query whose files were compacted away between their listing and their opening
MEMORY = "4GB"
AT_ONCE = 500  # episodes whose envelopes are held at once


class QueryRefused(EverloopError):
    """A query that is not SQL, asks for what is not there, or would do more than read."""


class Store:
    """Reads the store below ``folder``; may be shared by threads. ``tenant``: see that tenant's rows alone."""

    def __init__(self, folder: Path, *, tenant: str | None = None, blobs: BlobStore | None = None) -> None:
        self.folder = folder.absolute()
        self.tenant = tenant
        self._blobs = blobs or BlobStore(self.folder.parent / "blobs")
        self._lock = threading.Lock()
        self._present: dict[str, bool] = {}
        self._connection = self._connect()

    def sql(self, query: str, parameters: Parameters = ()) -> pa.Table:
        """The result of one SELECT as an Arrow table; ``?`` (or ``$name``) in it are filled from ``parameters``.

        Raises:
            QueryRefused: it is no single SELECT, is malformed, or reaches outside the store.
        """
        _check(query)
        return self._ask(lambda cursor: cursor.sql(query, params=parameters).to_arrow_table())

    def rows(self, query: str, parameters: Parameters = ()) -> list[dict[str, Any]]:
        """As ``sql``, one dict a row; whole numbers as int, also where DuckDB widens them to decimals (sums)."""
        return [
            {name: _narrow(value) for name, value in row.items()} for row in self.sql(query, parameters).to_pylist()
        ]

    def episodes(self, where: str = "true", parameters: Parameters = ()) -> Iterator[Episode]:
        """The newest version of each episode that meets a condition on ``episodes``'s columns, oldest first.

        Read whole, as contracts: what a re-scoring goes through.
        """
        found = self.sql(
            f"SELECT envelope FROM newest.episodes WHERE {where} ORDER BY started, tenant, episode, policy",
            parameters,
        )
        for envelope in found.column("envelope"):
            yield wire.decode(Episode, envelope.as_py(), self._blobs)

    def scores(self, tenant: str, policy: str) -> Iterator[Score]:
        """The newest score of each call of a policy, in no order."""
        named = ", ".join(f'"{name}"' for name in Score.model_fields if name != "schema_version")
        found = self.sql(f"SELECT {named} FROM scores WHERE tenant = ? AND policy = ?", [tenant, policy])
        for batch in found.to_batches(AT_ONCE):
            yield from (Score(**row) for row in batch.to_pylist())

    def versions(self, tenant: str, policy: str, wanted: Mapping[str, int]) -> Iterator[Episode]:
        """The given version of each given episode of a policy, as contracts, in no order; what is gone is left out."""
        names = sorted(wanted)
        for start in range(0, len(names), AT_ONCE):
            part = names[start : start + AT_ONCE]
            found = self.sql(
                "SELECT any_value(envelope) AS envelope FROM raw.episodes WHERE tenant = $tenant AND policy = $policy "
                "AND (episode, version) IN (SELECT unnest($names::VARCHAR[]), unnest($versions::BIGINT[])) "
                "GROUP BY episode",
                {"tenant": tenant, "policy": policy, "names": part, "versions": [wanted[name] for name in part]},
            )
            for envelope in found.column("envelope"):
                yield wire.decode(Episode, envelope.as_py(), self._blobs)

    def events_held(self, keys: Collection[str], days: Collection[str]) -> set[tuple[str, str]]:
        """(``tenant/episode``, event id) of the events of episodes that lie under these days."""
        found = self._events(keys, days, "DISTINCT key, id")
        return set(zip(*(found.column(name).to_pylist() for name in ("key", "id")), strict=True))

    def events_of(self, keys: Collection[str], days: Collection[str]) -> Iterator[tuple[str, str, int, bytes]]:
        """(``tenant/episode``, event id, offset in the log, envelope) of those events; of a repeated one the first."""
        columns = 'key, id, min(log_offset) AS "offset", arg_min(envelope, log_offset) AS envelope'
        found = self._events(keys, days, columns, "GROUP BY key, id")
        names = ("key", "id", "offset", "envelope")
        return zip(*(found.column(name).to_pylist() for name in names), strict=True)

    def _events(self, keys: Collection[str], days: Collection[str], columns: str, then: str = "") -> pa.Table:
        """Reads the files of these days alone, whatever else the store holds."""
        tenants = sorted({key.partition("/")[0] for key in keys})

        def ask(cursor: duckdb.DuckDBPyConnection) -> pa.Table:
            folders = [self.folder / "events" / f"tenant={tenant}" / f"day={day}" for tenant in tenants for day in days]
            files = [f"{folder}/*.parquet" for folder in folders if next(folder.glob("*.parquet"), None) is not None]
            source = f"read_parquet({_literal(files)}, {views.FILES})" if files else "empty.events"
            keyed = f"(SELECT tenant || '/' || episode AS key, * FROM {source})"
            query = f"SELECT {columns} FROM {keyed} WHERE key IN (SELECT unnest($keys::VARCHAR[])) {then}"
            return cursor.sql(query, params={"keys": list(keys)}).to_arrow_table()

        return self._ask(ask)

    def compact(self, *, grace: float = compaction.GRACE, min_files: int = compaction.MIN_FILES) -> int:
        """Fold small files and old versions; returns how many files were folded. See :mod:`pipelines.compaction`."""
        return compaction.compact(self.folder, grace=grace, min_files=min_files)

    def close(self) -> None:
        self._connection.close()

    def _connect(self) -> duckdb.DuckDBPyConnection:
        connection = duckdb.connect()
        views.prepare(connection)
        for name in TABLES:
            views.define(connection, name, None)
        self._present = dict.fromkeys(TABLES, False)
        self.folder.mkdir(parents=True, exist_ok=True)
        for setting, value in (
            ("autoinstall_known_extensions", False),
            ("autoload_known_extensions", False),
            ("allow_community_extensions", False),
            ("python_enable_replacements", False),
            ("memory_limit", MEMORY),
            ("temp_directory", ""),
            ("allowed_directories", [f"{self.folder}/"]),
            ("enable_external_access", False),
            ("lock_configuration", True),
        ):
            connection.execute(f"SET {setting} = {_literal(value)}")
        return connection

    def _ask(self, run: Callable[[duckdb.DuckDBPyConnection], T]) -> T:
        for attempt in range(RETRIES):
            try:
                self._see_new_tables()
                with self._connection.cursor() as cursor:
                    return run(cursor)
            except duckdb.IOException as error:
                # Folded away between listing and opening, or the whole store was deleted: look again.
                self._present = {}
                if attempt == RETRIES - 1:
                    raise QueryRefused(f"the store's files cannot be read: {error}") from None
            except duckdb.Error as error:
                raise QueryRefused(f"the query is refused: {_first_lines(error)}") from None
        raise AssertionError("unreachable")

    def _see_new_tables(self) -> None:
        """Point the views of tables at their files, once there are any."""
        with self._lock:
            for name in TABLES:
                found = self._present.get(name)
                if found:
                    continue
                pattern = f"{name}/tenant={self.tenant or '*'}/*/*.parquet"
                present = next(self.folder.glob(pattern), None) is not None
                if present != found:
                    with self._connection.cursor() as cursor:
                        views.define(cursor, name, f"{self.folder}/{pattern}" if present else None)
                    self._present[name] = present


def _check(query: str) -> None:
    try:
        statements = duckdb.extract_statements(query)
    except duckdb.Error as error:
        raise QueryRefused(f"that is not SQL: {_first_lines(error)}") from None
    if len(statements) != 1:
        raise QueryRefused(f"give one statement, not {len(statements)}")
    kind = statements[0].type
    if kind != duckdb.StatementType.SELECT:
        raise QueryRefused(f"the store is read-only: a {kind.name} statement is refused; ask with SELECT")


def _narrow(value: Any) -> Any:
    return int(value) if isinstance(value, Decimal) and value == value.to_integral_value() else value


def _first_lines(error: Exception) -> str:
    return "\n".join(line for line in str(error).splitlines()[:6] if line.strip())


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return "'" + str(value).replace("'", "''") + "'"
