"""The state of a handler: changes and offsets together, or not at all."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from everloop.home import Home
from everloop.log import Position
from hypothesis import given, settings
from hypothesis import strategies as st

from services.state import StateStore, own_folder, owned


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "h.db"


@pytest.fixture
def store(path: Path) -> Iterator[StateStore]:
    store = StateStore(path)
    yield store
    store.close()


def change_in_vain(store: StateStore, key: str, value: bytes) -> None:
    """Change a key inside a savepoint that fails."""
    with contextlib.suppress(KeyError), store.savepoint():
        store.put(key, value)
        assert store.get(key) == value
        raise KeyError


def test_changes_and_offsets_are_kept_together(store: StateStore, path: Path) -> None:
    store.put("a", b"1")
    store.commit({("events", 0): 7})
    store.put("a", b"2")
    again = StateStore(path)
    assert again.get("a") == b"1"
    assert again.offsets() == {("events", 0): 7}
    again.close()


def test_a_savepoint_that_fails_leaves_nothing(store: StateStore) -> None:
    store.put("a", b"1")
    change_in_vain(store, "a", b"2")
    change_in_vain(store, "b", b"2")
    assert (store.get("a"), store.get("b")) == (b"1", None)


def test_what_was_discarded_is_gone(store: StateStore) -> None:
    store.put("a", b"1")
    assert store.changed
    store.discard()
    assert not store.changed
    assert store.get("a") is None


def test_a_commit_that_fails_keeps_neither_changes_nor_offsets(store: StateStore, path: Path) -> None:
    store.put("a", b"1")
    other = sqlite3.connect(path, isolation_level=None)
    store._connection.execute("PRAGMA busy_timeout = 1")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        store.commit({("events", 0): 7})
    assert store.offsets() == {}
    other.execute("ROLLBACK")
    other.close()
    store.commit({("events", 0): 7})
    assert (store.get("a"), store.offsets()) == (b"1", {("events", 0): 7})


def test_scan_is_in_order_of_the_key_and_holds_while_the_state_changes(store: StateStore) -> None:
    for key in ("t/b", "t/a", "u/a", "t0", "t/é"):
        store.put(key, key.encode())
    store.commit({})
    store.delete("t/b")
    store.put("t/aa", b"new")
    keys = []
    for key, _ in store.scan("t/"):
        keys.append(key)
        store.delete(key)
    assert keys == ["t/a", "t/aa", "t/é"]
    assert [key for key, _ in store.scan("")] == ["t0", "u/a"]


KEYS = st.sampled_from(["a", "ab", "b", "ba", ""])
STEPS = st.lists(st.tuples(st.sampled_from(["put", "delete", "commit", "fail", "keep"]), KEYS, st.binary(max_size=3)))


@settings(max_examples=50, deadline=None)
@given(steps=STEPS)
def test_it_reads_like_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, bytes]]
) -> None:
    store, model = StateStore(tmp_path_factory.mktemp("state") / "h.db"), dict[str, bytes]()
    for what, key, value in steps:
        if what == "put":
            store.put(key, value)
            model[key] = value
        elif what == "delete":
            store.delete(key)
            model.pop(key, None)
        elif what == "commit":
            store.commit({})
        elif what == "keep":
            with store.savepoint():
                store.put(key, value)
            model[key] = value
        else:
            change_in_vain(store, key, value)
        for prefix in ("", "a", "b"):
            assert list(store.scan(prefix)) == sorted((k, v) for k, v in model.items() if k.startswith(prefix))
        assert store.get(key) == model.get(key)
    store.close()


def test_failures_are_counted_apart_from_the_changes_until_the_record_is_passed(store: StateStore, path: Path) -> None:
    store.put("a", b"1")
    position = Position("events", 0, 5)
    assert [store.count_failure(position) for _ in range(2)] == [1, 2]
    assert StateStore(path).get("a") is None
    store.commit({("events", 0): 6})
    assert store.count_failure(position) == 1


def test_one_process_owns_a_state(path: Path) -> None:
    stop = threading.Event()
    with owned(path, stop) as first:
        assert first
        stop.set()
        with owned(path, stop) as second:
            assert not second
    with owned(path, stop) as third:
        assert third


def test_a_commit_has_a_mark_and_a_rebuilt_state_is_that_of_its_entries(home: Home) -> None:
    path = home.folder("state") / "s.db"
    store = StateStore(path)
    assert store.mark() == ""
    store.put("old", b"1")
    assert store.changes == {"old": b"1"}
    store.commit({("events", 0): 4}, "4 a 1")
    store.commit({("events", 0): 5})
    assert store.mark() == "4 a 1", "a commit without one keeps it"
    entries = iter([("k", b"1"), ("gone", b"1"), ("k", b"2"), ("gone", None)])
    store.rebuild(entries, {("events", 0): 9}, "9 b 1")
    store.close()
    again = StateStore(path)
    assert list(again.scan("")) == [("k", b"2")]
    assert (again.offsets(), again.mark()) == ({("events", 0): 9}, "9 b 1")
    again.close()


def test_a_state_whose_rebuilding_fails_stays_as_it_was(home: Home) -> None:
    def entries():
        yield "k", b"1"
        raise OSError("the broker is gone")

    store = StateStore(home.folder("state") / "s.db")
    store.put("old", b"1")
    store.commit({}, "m")
    with pytest.raises(OSError, match="gone"):
        store.rebuild(entries(), {}, "n")
    assert (list(store.scan("")), store.mark()) == ([("old", b"1")], "m")
    store.close()


def test_workers_of_one_home_have_folders_of_their_own_and_find_them_again(home: Home) -> None:
    parent = home.folder("state") / "assemble"
    with own_folder(parent) as first:
        with own_folder(parent) as second:
            assert first != second
        with own_folder(parent) as third:
            assert third == second
    with own_folder(parent) as again:
        assert again == first
