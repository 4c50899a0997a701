"""The store: views, what is refused, an empty one, one that grows while it is read."""

from __future__ import annotations

import threading

import pytest
from everloop.event import ToolResult

from pipelines.store import QueryRefused, Store
from pipelines.tables import TABLES

VIEWS = [*TABLES, "turns", "feedback", "preferences"]


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("home") / "store")


@pytest.mark.parametrize("view", VIEWS)
def test_an_empty_store_has_every_view_empty_and_typed(empty, view):
    table = empty.sql(f"SELECT * FROM {view}")
    assert table.num_rows == 0
    assert {"tenant", "log_offset"} <= set(table.schema.names) or "tenant" in table.schema.names
    assert not any(str(field.type) == "null" for field in table.schema)


def test_numbers_of_an_empty_store_can_be_computed(empty):
    assert empty.rows("SELECT avg(thumb) AS thumb, count(*) AS n FROM turns") == [{"thumb": None, "n": 0}]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELEC 1", "that is not SQL: Parser Error: syntax error"),
        ("", "give one statement, not 0"),
        ("SELECT 1; SELECT 2", "give one statement, not 2"),
        ("SELECT nope FROM turns", 'column "nope" not found'),
        ("SELECT * FROM nope", "Table with name nope does not exist"),
        ("CREATE TABLE x (i INT)", "read-only: a CREATE statement is refused"),
        ("DROP VIEW turns", "read-only: a DROP"),
        ("INSERT INTO turns VALUES (1)", "read-only: a INSERT"),
        ("DELETE FROM episodes", "read-only: a DELETE"),
        ("UPDATE episodes SET split = 'train'", "read-only: a UPDATE"),
        ("COPY (SELECT 1) TO 'out.csv'", "read-only: a COPY"),
        ("EXPLAIN ANALYZE COPY (SELECT 1) TO 'out.csv'", "read-only: a EXPLAIN"),
        ("ATTACH 'other.db'", "read-only: a ATTACH"),
        ("SET enable_external_access = true", "read-only: a SET"),
        ("INSTALL httpfs", "read-only: a LOAD"),
        ("PRAGMA database_list", "read-only: a PRAGMA"),
        ("SELECT * FROM read_text('/etc/hostname')", "Permission Error"),
        ("SELECT * FROM read_csv('/etc/hostname')", "Permission Error"),
        ("SELECT * FROM '/etc/hostname'", "does not exist"),
        ("SELECT * FROM glob('/etc/*')", "Permission Error"),
        ("SELECT * FROM query('COPY (SELECT 1) TO ''x.csv''')", "Parser Error"),
        ("SELECT * FROM empty", "does not exist"),  # a Python variable here is no table
    ],
)
def test_a_query_that_would_do_more_than_read_the_store_is_refused(empty, query, said):
    with pytest.raises(QueryRefused) as raised:
        empty.rows(query)
    assert said in str(raised.value)


def test_nothing_beside_the_store_can_be_read(loop, make, home):
    loop.take(make.event(make.call()))
    secret = home.root / "store-secret"
    secret.mkdir()
    (secret / "x.csv").write_text("a\n1\n")
    for path in (secret / "x.csv", home.root / "store" / ".." / "store-secret" / "x.csv"):
        with pytest.raises(QueryRefused):
            loop.store.rows(f"SELECT * FROM read_csv('{path}')")


def test_turns_have_what_was_said_and_done(loop, make):
    loop.take(
        make.event(make.call("a", release="rel", arm="canary", probability=0.25, latency=0.5), seq=0, subject="sue"),
        make.event(ToolResult(id="t", name="route", arguments="{}", result="ok", call="a"), seq=1),
        make.event(make.call("b"), seq=2),
        make.event(make.thumb(-1, "a", id="1")),
        make.event(make.thumb(1, None, id="2")),
        make.event(make.correction("better", None)),
    )
    first, second = loop.store.rows("SELECT * FROM turns ORDER BY turn")
    assert (first["call"], first["thumb"], first["correction"]) == ("a", -1, None)
    assert (second["call"], second["thumb"], second["correction"]) == ("b", 1, "better")
    shown = {name: first[name] for name in ("subject", "arm", "release", "probability", "latency", "turns", "raters")}
    assert shown == {
        "subject": "sue",
        "arm": "canary",
        "release": "rel",
        "probability": 0.25,
        "latency": 0.5,
        "turns": 2,
        "raters": ["rita"],
    }
    assert first["tools"] == [
        {"name": "route", "arguments": "{}", "result": "ok", "error": False, "call": "a", "id": "t"}
    ]
    assert (first["prompt"], first["answer"]) == ("Where is my card?", "card_arrival")
    kinds = loop.store.rows("SELECT kind, count(*) AS n FROM feedback GROUP BY kind ORDER BY kind")
    assert kinds == [{"kind": "correction", "n": 1}, {"kind": "thumb", "n": 2}]


def test_views_show_the_newest_version_and_history_all(loop, make):
    loop.take(make.event(make.call()))
    loop.take(make.event(make.thumb()))
    assert loop.store.rows("SELECT version, turns FROM episodes") == [{"version": 2, "turns": 1}]
    assert loop.store.rows("SELECT version FROM history.episodes ORDER BY version") == [{"version": 1}, {"version": 2}]
    assert loop.store.rows("SELECT count(*) AS n FROM turns WHERE thumb = 1") == [{"n": 1}]


def test_withdrawn_feedback_is_gone_from_the_views(loop, make):
    loop.take(make.event(make.call()), make.event(make.thumb()))
    loop.take(make.event(make.thumb(1, id="later", time=1_763_900_100.0, withdrawn=True)))
    assert loop.store.rows("SELECT * FROM feedback") == []


def test_a_tenants_store_shows_that_tenant_alone(loop, make, home):
    loop.take(make.event(make.call()), make.event(make.call("o"), tenant="other"))
    assert loop.store.rows("SELECT count(*) AS n FROM turns") == [{"n": 2}]
    other = Store(home.root / "store", tenant="other")
    assert other.rows("SELECT tenant, call FROM turns") == [{"tenant": "other", "call": "o"}]


def test_an_open_store_sees_what_comes_later_and_survives_its_deletion(loop, make, home):
    import shutil

    assert loop.store.rows("SELECT count(*) AS n FROM turns") == [{"n": 0}]
    loop.take(make.event(make.call()))
    assert loop.store.rows("SELECT count(*) AS n FROM turns") == [{"n": 1}]
    shutil.rmtree(home.root / "store")
    assert loop.store.rows("SELECT count(*) AS n FROM turns") == [{"n": 0}]


def test_parameters_are_never_part_of_the_query(loop, make):
    loop.take(make.event(make.call(answer="it's")))
    ask = "SELECT answer FROM turns WHERE answer = ?"
    assert loop.store.rows(ask, ["it's"]) == [{"answer": "it's"}]
    assert loop.store.rows(ask, ["x' OR '1' = '1"]) == []
    assert loop.store.rows("SELECT answer FROM turns WHERE answer = $a", {"a": "it's"}) == [{"answer": "it's"}]


def test_threads_share_a_store(loop, make):
    loop.take(*(make.event(make.call(f"c{n}"), episode=f"ep_{n}") for n in range(5)))
    found = []

    def ask():
        found.extend(loop.store.rows("SELECT count(*) AS n FROM turns")[0]["n"] for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [5] * 20
