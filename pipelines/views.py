"""The views of the store in DuckDB: what people and the trainer query.

``raw.<table>`` is every row of a table, ``history.<table>`` every distinct version, and the views in ``main`` are
the newest version of each. A table without files is an empty one with the right types.
"""

from __future__ import annotations

import duckdb

from pipelines.tables import TABLES, Table

EPISODES = """
CREATE OR REPLACE VIEW main.episodes AS
SELECT tenant, policy, episode, version, subject, started, updated, complete, synthetic, split, outcome, quarantine,
       len(turns) AS turns
FROM newest.episodes
"""

TURNS = """
CREATE OR REPLACE VIEW main.turns AS
SELECT tenant, policy, episode, version, subject, t.turn AS turn, turns[-1].turn + 1 AS turns, t.call AS call,
       t.prompt AS prompt, t.answer AS answer, t.policy_version AS policy_version, t.arm AS arm,
       t.release AS release, t.probability AS probability, t.thumb AS thumb, t.rating AS rating,
       t.outcome AS outcome, t.correction AS correction, t.latency AS latency, t.error AS error,
       t.finish_reason AS finish_reason, t.temperature AS temperature, t.support_known AS support_known,
       t.model AS model, t.messages AS messages, t.tools_offered AS tools_offered, t.output AS output,
       t.tools AS tools, t.raters AS raters, t.trace AS trace, complete, synthetic, split,
       quarantine, started AS time, updated
FROM (SELECT *, unnest(turns) AS t FROM newest.episodes)
"""

FEEDBACK = """
CREATE OR REPLACE VIEW main.feedback AS
SELECT tenant, policy, episode, version, subject, f.id AS id, f.call AS call, f.kind AS kind, f.rater AS rater,
       f.value AS value, f.text AS text, f.chosen AS chosen, f.rejected AS rejected, f.name AS name, f.time AS time,
       split, synthetic
FROM (SELECT *, unnest(feedback) AS f FROM newest.episodes)
"""

PREFERENCES = """
CREATE OR REPLACE VIEW main.preferences AS
SELECT tenant, policy, episode, version, subject, p.call AS call, p.prompt AS prompt, p.chosen AS chosen,
       p.rejected AS rejected, p.source AS source, p.rater AS rater, split, synthetic, quarantine, updated AS time
FROM (SELECT *, unnest(preferences) AS p FROM newest.episodes)
"""

FILES = "union_by_name = true, hive_partitioning = false"
SHAPED = {"episodes": EPISODES, "turns": TURNS, "feedback": FEEDBACK, "preferences": PREFERENCES}


def prepare(connection: duckdb.DuckDBPyConnection) -> None:
    """Schemas and the empty tables that give each view its types."""
    for schema in ("empty", "raw", "history", "newest"):
        connection.execute(f"CREATE SCHEMA {schema}")
    for name, table in TABLES.items():
        connection.register("_typed", table.schema.empty_table())
        connection.execute(f"CREATE TABLE empty.{name} AS SELECT * FROM _typed")
        connection.unregister("_typed")


def define(connection: duckdb.DuckDBPyConnection, name: str, files: str | None) -> None:
    """(Re)define the views of one table over its files, a glob; None: it has none yet."""
    table = TABLES[name]
    source = f"SELECT * FROM empty.{name}"
    if files is not None:
        quoted = files.replace("'", "''")
        source += f" UNION ALL BY NAME SELECT * FROM read_parquet('{quoted}', {FILES})"
    connection.execute(f"CREATE OR REPLACE VIEW raw.{name} AS {source}")
    connection.execute(f"CREATE OR REPLACE VIEW history.{name} AS {distinct(table, f'raw.{name}', versions=True)}")
    connection.execute(f"CREATE OR REPLACE VIEW newest.{name} AS {distinct(table, f'raw.{name}')}")
    if name == "episodes":
        for statement in SHAPED.values():
            connection.execute(statement)
    else:
        hidden = "* EXCLUDE (envelope)" if "envelope" in table.schema.names else "*"
        connection.execute(f"CREATE OR REPLACE VIEW main.{name} AS SELECT {hidden} FROM newest.{name}")


def distinct(table: Table, source: str, *, versions: bool = False, kept: bool = False) -> str:
    """A query for one row of each identity: the newest; of each version; or of each that compaction keeps."""
    columns = [*table.identity]
    if versions or kept:
        columns += table.keeps
    if versions and "version" in table.schema.names:
        columns.append("version")
    by = ", ".join(dict.fromkeys(columns))
    return f"SELECT * FROM {source} QUALIFY row_number() OVER (PARTITION BY {by} ORDER BY {table.order}) = 1"
